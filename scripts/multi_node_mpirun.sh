#!/usr/bin/env bash
# A run on the GPUs of several machines, by the mpirun of Open MPI or of MPICH and its kin, over ssh.
#
#   scripts/multi_node_mpirun.sh HOSTS scripts/run_gpt2_124M.sh [OPTIONS]
#
# HOSTS is a file with a line for each machine, and how many GPUs it has, in the way of either MPI:
#
#   node1:8            # MPICH
#   node2 slots=8      # Open MPI
#   node3              # 8, or what $RANKS_PER_HOST says
#
# Every machine finds at the same paths this folder, the Python environment, the data and the run directory (a shared
# file system), and ssh gets from the first to the others without a password. Variables named NCCL_*, CUDA_*,
# OMP_* and BACKHAND_*, PATH, LD_LIBRARY_PATH and PYTHONPATH hold on all machines.
set -euo pipefail

fail() {
  echo "multi_node_mpirun.sh: $*" >&2
  exit 2
}

(($# >= 2)) || fail "usage: scripts/multi_node_mpirun.sh HOSTS SCRIPT [OPTIONS]"
[[ -r $1 ]] || fail "cannot read the host file $1"

hosts=
ranks=0
while read -r host rest || [[ -n $host ]]; do
  [[ -z $host || $host == \#* ]] && continue
  rest=${rest%%#*}
  slots=${RANKS_PER_HOST:-8}
  if [[ $host =~ ^(.+):([0-9]+)$ ]]; then
    host=${BASH_REMATCH[1]} slots=${BASH_REMATCH[2]}
  elif [[ $rest =~ ^slots=([0-9]+) ]]; then
    slots=${BASH_REMATCH[1]}
  elif [[ -n ${rest// /} ]]; then
    fail "$1: expected 'HOST', 'HOST:8' or 'HOST slots=8', found '$host $rest'"
  fi
  hosts+=${hosts:+,}$host:$slots
  ranks=$((ranks + slots))
done <"$1"
[[ -n $hosts ]] || fail "$1 names no host"

version=$(mpirun --version 2>&1) || fail "no mpirun in PATH: pip install -e \".[mpi]\" brings one"
case $version in
  *"Open MPI"*)
    launch="mpirun -np $ranks --host $hosts --bind-to none"
    for name in $(compgen -e); do # Open MPI passes on only what it is told to
      case $name in
        NCCL_* | CUDA_* | OMP_* | BACKHAND_* | PATH | LD_LIBRARY_PATH | PYTHONPATH) launch+=" -x $name" ;;
      esac
    done
    ;;
  *HYDRA* | *Intel*) launch="mpirun -np $ranks -hosts $hosts" ;; # they pass on everything
  *) fail "mpirun is neither Open MPI's nor MPICH's: ${version%%$'\n'*}" ;;
esac
shift
LAUNCH=$launch exec "$@"
