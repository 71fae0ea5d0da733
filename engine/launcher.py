"""How many processes were started together, as the launcher's environment variables say."""

from collections.abc import Mapping

from engine.config import LATER
from engine.errors import UsageError

# (number of ranks, this one's rank) under MPICH and its kin, Open MPI, and srun
VARIABLES = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """(number of ranks, this process's rank); (1, 0) where nothing launched several."""
    for size, rank in VARIABLES:
        if environ.get(size, "").isdigit():
            found = environ.get(rank, "0")
            return int(environ[size]), int(found) if found.isdigit() else 0
    return 1, 0


def require_one_rank(environ: Mapping[str, str]) -> None:
    """UsageError if several ranks were started."""
    world, _ = ranks(environ)
    if world > 1:
        raise UsageError(f"{world} ranks were started: training on several ranks {LATER}. Run python train.py alone")
