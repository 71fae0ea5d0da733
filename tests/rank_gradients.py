"""Run under mpirun by tests/test_ranks.py: a few steps in float64 on one global batch, whatever the number of ranks.

Rank 0 writes the summed gradients of the first step and the parameters after the last to the file it is given.
"""

import os
import sys
from pathlib import Path

import numpy as np

from engine import device, ops
from engine.arena import own_slot
from engine.comm import connect, ending_together
from engine.config import RunConfig
from engine.data import Loader, Samples
from engine.models.gpt2 import GPT2, decayed, slots_by_turns
from engine.optimizer import AdamW
from engine.shards import open_shard
from engine.zero import Zero
from tests.test_gpt2 import make_parameters
from tests.test_ranks import CONFIG, GLOBAL_BATCH, STEPS, T

comm = connect(os.environ)
with ending_together(comm):
    target, shard, stage, reduce = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dev, operations = device.load("numpy"), ops.load("numpy")
    B = GLOBAL_BATCH // comm.world
    model = GPT2(
        *(CONFIG, operations, dev),
        **{"B": B, "T": T, "dtype": np.float64, "statistic_dtype": np.float64, "shares": comm.world},
        grad_slots=slots_by_turns if stage == 2 and comm.world > 1 else own_slot,
    )
    make_parameters(CONFIG, model.params.views)
    zero = Zero(comm, model.params, model.lanes, stage, operations, dev, by_library=reduce == "nccl")
    run = RunConfig(B=B, T=T, weight_decay=0.1)
    optimizer = AdamW(model.params, decayed(CONFIG), zero, run, operations, dev, np.float64)
    loader = Loader(Samples([open_shard(shard)], T), B, seed=1, rank=comm.rank, world=comm.world)
    results = {}
    for step in range(STEPS):
        inp, targets = loader.next()
        model.forward(inp)
        on_ready = zero.when_ready(first=True, last=True)
        losses = model.backward(inp, targets, 1 / (GLOBAL_BATCH * T), on_ready=on_ready, accumulate=False)
        if step == 0:
            whole = np.zeros_like(model.params.flat)
            for own, part in zip(zero.owned, zero.owned_by_bucket, strict=True):
                whole[own] = zero.gradient(own, part)
            for bucket in model.params.buckets if stage else []:
                comm.all_gather(whole[bucket])
            results |= {f"grad.{name}": view.copy() for name, view in model.params.split(whole).items()}
        loss = np.array(comm.gather(losses.mean()).mean())
        optimizer.step(step + 1, 1e-2, loss)
        results[f"loss.{step}"] = loss
    results |= {f"param.{name}": view for name, view in model.params.views.items()}
    if comm.rank == 0:
        np.savez(target, **results)
