#!/usr/bin/env bash
# GPT-2 1558M on 33.6B tokens of FineWeb-Edu 100B: 32,000 steps of 1,048,576 tokens. llm.c's run of this recipe took
# 24 h on 8 H100.
#
# 1, 2, 4, ..., 64 GPUs take the same steps. Options given here come last, and the last of an option counts. How it goes
# on by itself, and how to stop it: run.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" \
  -i "data/edu_fineweb100B/edu_fineweb_train_*.bin" \
  -j "data/edu_fineweb100B/edu_fineweb_val_*.bin" \
  -o runs/gpt2_1558M \
  -e d48 -b 16 -t 1024 -d 1048576 -x 32000 -r 0 -z 1 \
  -l 0.0006 -q 0.1 -u 700 -c 0.1 \
  -v 250 -s 20000 -n 2000 -nk 5 \
  "$@"
