#!/usr/bin/env bash
# GPT-2 774M on 150B tokens of FineWeb 100B, more than an epoch: 286,102 steps of 524,288 tokens. llm.c's run of this
# recipe took 135 h on 8 A100 80GB.
#
# 1, 2, 4, 8 or 16 GPUs take the same steps. Options given here come last, and the last of an option counts. How it goes
# on by itself, and how to stop it: run.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" \
  -i "data/fineweb100B/fineweb_train_*.bin" \
  -j "data/fineweb100B/fineweb_val_*.bin" \
  -o runs/gpt2_774M \
  -e d36 -b 32 -t 1024 -d 524288 -x 286102 -r 0 -z 1 \
  -l 0.00025 -q 0.0 -u 700 -c 0.1 \
  -v 250 -s 20000 -n 4000 -nk 5 \
  "$@"
