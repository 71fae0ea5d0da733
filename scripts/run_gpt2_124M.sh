#!/usr/bin/env bash
# GPT-2 124M on one epoch of FineWeb 10B: 19,560 steps of 524,288 tokens. llm.c's run of this recipe ended at a
# validation loss of 3.2722; it took 45 min on 8 H100, 94 min on 8 A100 80GB.
#
# 1, 2, 4 or 8 GPUs take the same steps. With less memory than 80 GB: -b 32, -r 1. Options given here come last, and
# the last of an option counts. How it goes on by itself, and how to stop it: run.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" \
  -i "data/fineweb10B/fineweb_train_*.bin" \
  -j "data/fineweb10B/fineweb_val_*.bin" \
  -o runs/gpt2_124M \
  -e d12 -b 64 -t 1024 -d 524288 -r 0 -z 1 \
  -l 0.0006 -q 0.0 -u 700 -c 0.1 \
  -v 250 -s 20000 -n 5000 \
  "$@"
