"""Run under mpirun by tests/test_nccl.py: steps of training.build's run on GPUs of which numpy, the shim and MPI are
the stand-ins. Rank 0 writes losses, norms, parameters, masters and moments to the file it is given.

    rank_nccl.py TARGET CARRIER SABOTAGE OPTIONS

CARRIER: as it is on GPUs; or mpi, whose collectives are done when they return. SABOTAGE: a method of NCCLRanks, or
Copies, that does nothing, or "". OPTIONS: of RunConfig, in JSON, and "late": from how many tokens on a micro-batch's
gradients travel late; "again": such a run comes before, in the same processes; "unreachable": a rank whose memory the
others cannot open.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

import train
from engine import training, zero
from engine.comm import connect, copies, ending_together, nccl
from engine.config import RunConfig
from tests.nccl_on_cpu import Runtime, several_gpus


def take_steps(t, log) -> int:
    """All that a stand-in can do of train.train."""
    for step in range(t.steps):
        train.train_step(t, step)
    return 0


target, carrier, sabotage, options = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
comm = connect(os.environ)
with ending_together(comm), several_gpus(target.parent) as gpu:
    zero.PIECE = 1000  # more than one piece of a bucket
    if carrier == "mpi":
        training.on_gpus = lambda comm, carrier, say: comm
    Runtime.seconds = 0.002 * comm.rank * (carrier == "copies")  # so that ranks do not keep pace by chance
    if sabotage:
        setattr(copies.Copies if carrier == "copies" else nccl.NCCLRanks, sabotage, lambda *_: None)
    training.LATE_TOKENS = options.pop("late", training.LATE_TOKENS)
    again, Runtime.unreachable = options.pop("again", False), options.pop("unreachable", None)
    run = RunConfig(**options, carrier="auto" if carrier == "mpi" else carrier)
    if again:
        training.plan = lambda t: "what a GPU is, nobody knows here"
        train.train = take_steps
        assert train.build_and_train(run, comm) == 0
    said = []
    t = training.build(run, comm, said.append)
    copies.Copies._open = None  # which ranks do together, so not where one of them finds something new
    results = {}
    for step in range(t.start, t.steps):
        train.train_step(t, step)
        results |= {f"{step}.loss": np.array(t.loss)}
        results |= {f"{step}.{name}": np.array(value) for name, value in t.optimizer.decision._asdict().items()}
    t.require_same_parameters()
    if run.out_dir:
        t.save(t.steps)
    results |= t.optimizer.state()
    results |= {f"master.{name}": values for name, values in t.optimizer.parameters().items()}
    results |= {f"param.{name}": np.array(view, np.float32) for name, view in t.model.params.views.items()}
    results |= {"beside": np.array(gpu.beside), "copied": np.array(Runtime.copied), "said": np.array(said)}
    t.loader.close()
    if comm.rank == 0:
        np.savez(target, **results)
