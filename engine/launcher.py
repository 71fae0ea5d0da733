"""How many processes were started together, as the launcher's environment variables say."""

from collections.abc import Mapping

# (number of ranks, this one's rank) under MPICH and its kin, Open MPI, and srun
VARIABLES = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
ON_THIS_MACHINE = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")


def ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """(number of ranks, this process's rank); (1, 0) where nothing launched several."""
    for size, rank in VARIABLES:
        if environ.get(size, "").isdigit():
            found = environ.get(rank, "0")
            return int(environ[size]), int(found) if found.isdigit() else 0
    return 1, 0


def ranks_on_this_machine(environ: Mapping[str, str]) -> int:
    """How many of the ranks share this machine's cores; 1 where the launcher does not say."""
    return next((int(environ[name]) for name in ON_THIS_MACHINE if environ.get(name, "").isdigit()), 1)
