#!/usr/bin/env bash
# Trains until it is done: train.py with the given options, started again from the newest checkpoint when it dies.
#
#   scripts/run.sh -e d12 -i "data/train_*.bin" -j "data/val_*.bin" -o runs/mine -n 1000 [any option of train.py]
#
# It ends with train.py's exit code when that says that the run is done (0), was stopped on request (75, 130), or can't
# go on until someone mends something (2 usage, 3 data, 4 checkpoint or disk, 5 memory). After anything else, as a rank
# that was killed or hung (17), it resumes, unless several tries in a row have left no new checkpoint.
#
# To stop it: Ctrl-C, kill (TERM or USR1), or a file STOP in the run directory. The step is finished and saved; the same
# command goes on. A second signal ends the run at once.
#
# From the environment:
#   RANKS    how many ranks mpirun starts here; default: one for each GPU, or one
#   LAUNCH   the words before `python train.py`, in place of mpirun: see multi_node_mpirun.sh, slurm.sh
#   PYTHON   default: python
#   TRIES    so many tries in a row without a new checkpoint, and it gives up; default: 3
#   PAUSE    seconds between tries, in which ranks of the last one end and free what they hold; default: 10
set -uo pipefail

train=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/train.py
tries=${TRIES:-3}

say() {
  printf '%(%F %T)T run.sh: %s\n' -1 "$*" >&2
}

# The run directory that train.py's options name: of several, the last.
out_dir() {
  local dir=
  while (($#)); do
    case $1 in
      -o | --out-dir) dir=${2-} ;;
      --out-dir=*) dir=${1#*=} ;;
    esac
    shift
  done
  printf '%s\n' "$dir"
}

# The step of the newest checkpoint in a directory; -1 without one. A checkpoint gets its name when it is whole.
newest_step() {
  local path step newest=-1
  for path in "$1"/step-*; do
    step=${path##*/step-}
    [[ $step =~ ^[0-9]+$ ]] && ((10#$step > newest)) && newest=$((10#$step))
  done
  echo "$newest"
}

# Runs a command to its end, and passes on what stops it: USR1, upon which ranks save, and mpirun hands it on to them;
# after TERM or INT it kills them within half a second. In a session of its own, so that Ctrl-C reaches it through us
# alone.
signals=0
child=
stop() {
  signals=$((signals + 1))
  kill -s "$( ((signals == 1)) && echo USR1 || echo TERM)" "$child" 2>/dev/null
}
run() {
  local heard
  setsid "$@" </dev/null &
  child=$!
  ((signals)) && kill -s TERM "$child" # one came before there was anything to pass it on to
  while :; do
    heard=$signals
    wait "$child"
    code=$?
    ((signals == heard)) && break # else it may have been a signal to us that ended the wait
  done
}

dir=$(out_dir "$@")
if [[ -z $dir ]]; then
  say "-o is missing: without a run directory there is nothing to resume from"
  exit 2
fi
if [[ -n ${LAUNCH-} ]]; then
  read -ra launch <<<"$LAUNCH"
else
  ranks=${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')}
  launch=()
  ((ranks > 1)) && launch=(mpirun -np "$ranks")
fi

# Open MPI would tie each rank, with all its threads, to one core, as long as there are few ranks. (4 and earlier; 5.)
export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none}

trap stop HUP INT TERM USR1
newest=$(newest_step "$dir")
failures=0
while :; do
  run ${launch[@]+"${launch[@]}"} "${PYTHON:-python}" "$train" "$@" -y 1
  case $code in
    0)
      say "done: $dir"
      exit 0
      ;;
    75 | 130)
      say "stopped on request (exit code $code); the same command goes on"
      exit "$code"
      ;;
    2 | 3 | 4 | 5 | 126 | 127)
      say "exit code $code: trying again would not help; the message above says what is wrong"
      exit "$code"
      ;;
  esac # 6, numbers not finite, is not told from a rank that has aborted (signal 6) under MPICH
  if ((signals)); then
    say "stopped on request before it could save (exit code $code); the same command goes on"
    exit "$code"
  fi
  before=$newest
  newest=$(newest_step "$dir")
  failures=$((newest > before ? 0 : failures + 1))
  if ((failures >= tries)); then
    say "exit code $code, and no new checkpoint in $dir in $failures tries: giving up"
    exit "$code"
  fi
  died_with=$code
  say "exit code $code: resuming in ${PAUSE:-10} s from $( ((newest < 0)) && echo "the start" || echo "step $newest")"
  run sleep "${PAUSE:-10}"
  ((signals)) && exit "$died_with"
done
