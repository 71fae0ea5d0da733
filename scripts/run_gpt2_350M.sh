#!/usr/bin/env bash
# GPT-2 350M on 31.5B tokens of FineWeb 100B: 60,000 steps of 524,288 tokens. llm.c's run of this recipe ended at a
# validation loss of 2.928; it took 5.8 h on 8 H100, 13.7 h on 8 A100 80GB.
#
# 1, 2, 4 or 8 GPUs take the same steps. Options given here come last, and the last of an option counts. How it goes on
# by itself, and how to stop it: run.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" \
  -i "data/fineweb100B/fineweb_train_*.bin" \
  -j "data/fineweb100B/fineweb_val_*.bin" \
  -o runs/gpt2_350M \
  -e d24 -b 64 -t 1024 -d 524288 -x 60000 -r 0 -z 1 \
  -l 0.0003 -q 0.0 -u 700 -c 0.1 \
  -v 250 -s 20000 -n 2000 -nk 5 \
  "$@"
