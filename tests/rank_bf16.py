"""Run under mpirun by tests/test_ranks.py: a few steps in bf16 with fp32 masters, on the CUDA operations by the shim.

Everything is as it is on GPUs, but that arrays are numpy's and MPI carries them. Rank 0 writes the losses, the summed
gradients of the first step, and the parameters and masters after the last, to the file it is given.
"""

import os
import sys
from pathlib import Path

import numpy as np

from engine import device, ops
from engine.arena import own_slot
from engine.comm import connect, ending_together
from engine.config import GPT2Config, RunConfig
from engine.models.gpt2 import GPT2, decayed, slots_by_turns
from engine.optimizer import AdamW
from engine.zero import Zero
from tests.test_gpt2 import batch, make_parameters
from tests.twins import BF16, F32, on

CONFIG = GPT2Config(maxT=16, V=60, L=3, NH=2, C=32)
B, T, STEPS = 4, 16, 3

comm = connect(os.environ)
with ending_together(comm), on("forward"):
    target, stage, grad_dtype = Path(sys.argv[1]), int(sys.argv[2]), {"bf16": BF16, "fp32": F32}[sys.argv[3]]
    # Arrays are numpy's here, so moving them is numpy's business too.
    dev, operations = device.load("numpy"), ops.load("cuda")
    share = B // comm.world
    model = GPT2(
        *(CONFIG, operations, dev),
        **{"B": share, "T": T, "dtype": BF16, "grad_dtype": grad_dtype, "shares": comm.world},
        grad_slots=slots_by_turns if stage == 2 and comm.world > 1 else own_slot,
    )
    zero = Zero(comm, model.params, model.lanes, stage, operations, dev)
    run = RunConfig(B=share, T=T, weight_decay=0.1)
    optimizer = AdamW(model.params, decayed(CONFIG), zero, run, operations, dev)
    values = {name: np.zeros(view.shape, F32) for name, view in model.params.views.items()}
    make_parameters(CONFIG, values, std=0.1)
    optimizer.set_parameters(values)
    inp, targets = (tokens[comm.rank * share :][:share].copy() for tokens in batch(CONFIG, B, T))
    results = {}
    for step in range(STEPS):
        model.forward(inp)
        on_ready = zero.when_ready(first=True, last=True)
        losses = model.backward(inp, targets, 1 / (B * T), on_ready=on_ready, accumulate=False)
        if step == 0:
            whole = np.zeros(model.params.flat.size, F32)
            for own, part in zip(zero.owned, zero.owned_by_bucket, strict=True):
                whole[own] = zero.gradient(own, part)
            for bucket in model.params.buckets if stage else []:
                comm.all_gather(whole[bucket])
            results |= {f"grad.{name}": view.copy() for name, view in model.params.split(whole).items()}
        loss = np.array(comm.gather(np.array([losses.mean(dtype=np.float64)])).mean())
        optimizer.step(step + 1, 1e-2, loss)
        results[f"loss.{step}"] = loss
    results |= {f"param.{name}": view.astype(F32) for name, view in model.params.views.items()}
    results |= {f"master.{name}": view for name, view in optimizer.parameters().items()}
    if comm.rank == 0:
        np.savez(target, **results)
