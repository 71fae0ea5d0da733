"""Run under mpirun by tests/test_ranks.py: build the run that a directory holds, and save it to another."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from engine import checkpoint, training
from engine.comm import connect, ending_together
from engine.config import RunConfig

comm = connect(os.environ)
with ending_together(comm):
    source, target = map(Path, sys.argv[1:])
    saved = checkpoint.load_latest(source, report=print)
    assert saved
    run = replace(RunConfig(**saved.state["options"]), resume=True, B=1, total_batch=-1, checkpoint_every=1)
    t = training.build(run, comm, say=lambda line: None)
    t.run = replace(run, out_dir=str(target))
    target.mkdir(exist_ok=True)
    t.save(t.start)
