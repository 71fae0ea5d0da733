"""How many ranks a launcher has started, from the variables that it sets: as seen under each, cut to what matters."""

import pytest

from engine.launcher import mismatch, ranks, ranks_on_this_machine
from tests.conftest import TINY, data

ALONE: dict[str, str] = {}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "12", "SLURM_TASKS_PER_NODE": "4(x3)", "SLURM_NTASKS_PER_NODE": "4"}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
STEP = JOB | {"SLURM_STEP_NUM_TASKS": "12", "SLURM_STEP_TASKS_PER_NODE": "4(x3)"}
SRUN = STEP | {"SLURM_PROCID": "9", "SLURM_NODEID": "2"}
SRUN_PMI2 = SRUN | {"PMI_SIZE": "12", "PMI_RANK": "9"}
SRUN_PMIX = SRUN | {"PMIX_RANK": "9", "PMIX_NAMESPACE": "slurm.pmix.7.0"}
SRUN_ONE = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"}
# mpirun in a job reaches the machines by an srun of one task on each
HELPERS = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_PROCID": "2", "SLURM_NODEID": "2"}


@pytest.mark.parametrize(
    ("environ", "expected", "here"),
    [
        (ALONE, (1, 0), 1),
        (MPICH, (4, 3), 2),
        (OPEN_MPI, (4, 3), 2),
        (BATCH, (1, 0), 1),
        (SRUN, (12, 9), 4),
        (SRUN_PMI2, (12, 9), 4),
        (SRUN_PMIX, (12, 9), 4),
        (SRUN_ONE | {"SLURM_NODEID": "0"}, (1, 0), 1),
        (JOB | HELPERS | MPICH, (4, 3), 2),
        (JOB | HELPERS | OPEN_MPI, (4, 3), 2),
        ({"PMI_SIZE": "some"}, (1, 0), 1),
        ({"PMI_SIZE": "2", "PMI_RANK": "first"}, (2, 0), 1),
    ],
)
def test_ranks(environ, expected, here):
    assert ranks(environ) == expected
    assert ranks_on_this_machine(environ) == here


@pytest.mark.parametrize(("node", "tasks"), [("0", 8), ("1", 8), ("2", 4), ("3", 1), ("4", 1), ("?", 1)])
def test_machines_with_different_numbers_of_ranks(node, tasks):
    assert ranks_on_this_machine({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4,1", "SLURM_NODEID": node}) == tasks


@pytest.mark.parametrize("environ", [MPICH, OPEN_MPI, JOB | HELPERS | MPICH, JOB | HELPERS | OPEN_MPI, ALONE])
def test_ranks_of_another_mpi_are_told_of_mpirun(environ):
    assert mismatch(environ, "MPICH 5").startswith("mpirun belongs to another MPI than mpi4py, which uses MPICH 5.")


@pytest.mark.parametrize("environ", [SRUN, SRUN_PMI2, SRUN_PMIX])
def test_ranks_that_srun_does_not_connect_are_told_of_its_option(environ):
    message = mismatch(environ, "MPICH 5")
    assert "MPICH 5" in message
    assert "--mpi=pmi2 for MPICH" in message


def test_ranks_that_srun_does_not_connect_do_not_train_side_by_side(run_train, shards_dir):
    pytest.importorskip("mpi4py", reason='mpi4py is not installed: pip install -e ".[mpi]"')
    result = run_train(*data(shards_dir), *TINY, "-x", 1, env=SRUN | {"SLURM_PROCID": "0"})
    assert (result.code, result.out) == (2, "")
    assert "the launcher has started 12 ranks, but MPI sees 1: srun does not" in result.err
