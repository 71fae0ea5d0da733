"""Run under mpirun by tests/test_cuda_ranks.py: train.py's command, again and again in one process, because a process
takes longer to start on a GPU than a short run does.

    rank_trains.py FILE

FILE: a list of lists of arguments, in JSON. The exit code is that of the first run that fails, and the last then.
"""

import gc
import json
import sys
from pathlib import Path

import train

train.have_matplotlib = lambda: False
for args in json.loads(Path(sys.argv[1]).read_text()):
    try:
        # A watchdog is made to watch as long as its process lasts.
        train.main.main([*args, "--watchdog", "0"], standalone_mode=False)
    except SystemExit as end:
        if end.code:
            print(f"exit code {end.code}: {' '.join(args)}", file=sys.stderr, flush=True)
            raise
    gc.collect()
