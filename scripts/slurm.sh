#!/usr/bin/env bash
# A run on a Slurm cluster: srun starts a rank for each GPU. From the repository's root, in the Python environment:
#
#   sbatch --nodes=2 --time=12:00:00 scripts/slurm.sh scripts/run_gpt2_124M.sh [OPTIONS]
#
# Five minutes before the time is up, the run saves and ends with exit code 75; submitted again, it goes on. A run that
# takes several jobs: submit it several times with --dependency=singleton, and they run one after the other. One that
# comes too late finds the run done.
#
#SBATCH --job-name=backhand
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# < 1)) || [[ -z ${SLURM_JOB_ID-} ]]; then
  echo "slurm.sh: usage: sbatch [OPTIONS OF SBATCH] scripts/slurm.sh SCRIPT [OPTIONS]" >&2
  exit 2
fi

# srun has several ways to tell ranks of each other; which, depends on the MPI library that mpi4py uses.
if [[ -z ${SLURM_MPI_TYPE-} ]]; then
  library=$("${PYTHON:-python}" -c '
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version())')
  case $library in
    *"Open MPI"*) export SLURM_MPI_TYPE=pmix ;;
    *MPICH* | *Intel*) export SLURM_MPI_TYPE=pmi2 ;;
  esac # else: the cluster's default
fi

# All GPUs of a machine are visible to each of its ranks (no --gpus-per-task): the engine takes one for each.
LAUNCH="srun --kill-on-bad-exit=1 --cpu-bind=none" exec "$@"
