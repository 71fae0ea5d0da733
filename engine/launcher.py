"""Which launcher started this process, and how many with it, as the launcher's environment variables say."""

import re
from collections.abc import Mapping

# (number of ranks, this one's rank) under MPICH and its kin, Open MPI, and srun. srun comes last: both mpirun use it to
# reach other machines, and its variables then count their helpers. Its variables of a job, as SLURM_NTASKS, are there
# too where a batch script runs something alone; those of a step are not.
VARIABLES = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
OF_MPIRUN = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")  # the number of ranks on this machine
OF_SRUN = "SLURM_STEP_TASKS_PER_NODE"  # the same for all machines, as 8(x2),4


def ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """(number of ranks, this process's rank); (1, 0) where nothing launched several."""
    for size, rank in VARIABLES:
        if environ.get(size, "").isdigit():
            found = environ.get(rank, "0")
            return int(environ[size]), int(found) if found.isdigit() else 0
    return 1, 0


def ranks_on_this_machine(environ: Mapping[str, str]) -> int:
    """How many of the ranks share this machine's cores; 1 where the launcher does not say."""
    for name in OF_MPIRUN:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    machines = [
        int(tasks)
        for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get(OF_SRUN, ""))
        for _ in range(int(times or 1))
    ]
    machine = environ.get("SLURM_NODEID", "0")
    return machines[int(machine)] if machine.isdigit() and int(machine) < len(machines) else 1


def mismatch(environ: Mapping[str, str], library: str) -> str:
    """Why the MPI library of mpi4py does not see the other ranks, and what to do."""
    if OF_SRUN in environ and not any(name in environ for name in OF_MPIRUN):
        return (
            f"srun does not tell them of each other in the way of mpi4py's MPI, which is {library}. Start with "
            "srun --mpi=pmi2 for MPICH, or --mpi=pmix for Open MPI; srun --mpi=list names what this cluster has"
        )
    return f"mpirun belongs to another MPI than mpi4py, which uses {library}. Start with the mpirun of that one"
