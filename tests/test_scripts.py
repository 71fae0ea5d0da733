"""The launch scripts: what they start, when they start it again, and that a run which was killed loses nothing."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

import train
from engine import checkpoint
from engine.config import RunConfig
from engine.models.gpt2 import MODEL_FILE
from engine.training import OPTIMIZER_FILE
from tests.conftest import ROOT, TIMEOUT, Run, data, finish

SCRIPTS = ROOT / "scripts"
RECIPES = sorted(SCRIPTS.glob("run_gpt2_*.sh"))
MPIRUN = Path(sys.executable).parent / "mpirun"
needs_mpirun = pytest.mark.skipif(not MPIRUN.exists(), reason='no mpirun: pip install -e ".[mpi]"')

# Appended to a recipe's options, it is a small run.
SMALL = ("--device", "cpu", "-e", "l2h2c16", "-b", 2, "-t", 16, "-d", 64, "-u", 5, "-m", 2, "-v", 100, "-s", 0)


def hear_all_signals() -> None:
    """Where the tests run in the background these are ignored, and bash does not hear what was ignored at its start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(script: Path, *args: object, **env: object) -> subprocess.Popen:
    """A script, running in this environment's Python, on one rank unless env says otherwise."""
    alone = {"PYTHON": sys.executable, "RANKS": 1, "PAUSE": 0, "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [str(script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {name: str(value) for name, value in (alone | env).items()},
        preexec_fn=hear_all_signals,
    )


def run(script: Path, *args: object, **env: object) -> Run:
    return finish(start(script, *args, **env))


def stand_in(path: Path, body: str) -> Path:
    """A program that does what body, in bash, says."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)
    return path


def wait_for(what: str, condition) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, f"no {what} in {TIMEOUT} seconds"
        time.sleep(0.02)


@pytest.mark.parametrize("script", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_scripts_are_bash_and_can_be_started(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


# --- recipes


@pytest.mark.parametrize(
    ("name", "model", "tokens", "steps", "lr", "final", "most_ranks"),
    [
        ("124M", "d12", 2**19, -1, 6e-4, 0.0, 8),
        ("350M", "d24", 2**19, 60_000, 3e-4, 0.0, 8),
        ("774M", "d36", 2**19, 286_102, 2.5e-4, 0.0, 16),
        ("1558M", "d48", 2**20, 32_000, 6e-4, 0.1, 64),
    ],
)
def test_a_recipe_is_the_published_one(name, model, tokens, steps, lr, final, most_ranks, tmp_path):
    """And train.py takes its options, at every number of ranks that its comment names."""
    says = stand_in(tmp_path / "python", 'printf "%s\\n" "$@"')
    started = run(SCRIPTS / f"run_gpt2_{name}.sh", PYTHON=says)
    program, *options = started.out.splitlines()
    assert Path(program) == ROOT / "train.py"
    recipe = RunConfig(**train.main.make_context("train.py", options).params)
    of_this_size = (recipe.model, recipe.total_batch, recipe.steps, recipe.lr, recipe.final_lr)
    assert of_this_size == (model, tokens, steps, lr, final)
    of_all = (recipe.warmup, recipe.weight_decay, recipe.zero_stage, recipe.recompute, recipe.schedule)
    assert of_all == (700, 0.1, 1, 0, "cosine")
    assert recipe.resume
    assert recipe.checkpoint_every > 0
    assert recipe.out_dir == f"runs/gpt2_{name}"
    assert recipe.accumulation(most_ranks) * most_ranks * recipe.B * recipe.T == tokens
    assert recipe.accumulation(1) * recipe.B * recipe.T == tokens


def test_all_recipes_are_tested():
    assert [path.stem for path in RECIPES] == [f"run_gpt2_{size}" for size in ("124M", "1558M", "350M", "774M")]


# --- the loop


def tensors(out_dir: Path) -> dict[str, bytes]:
    """Everything in the newest checkpoint, as bytes."""
    saved = checkpoint.load_latest(out_dir, report=pytest.fail)
    assert saved
    arrays = saved.tensors(MODEL_FILE) | saved.tensors(OPTIMIZER_FILE)
    return {name: array.tobytes() for name, array in arrays.items()}


def test_a_run_killed_in_the_middle_ends_as_one_that_was_not(shards_dir, tmp_path):
    recipe = SCRIPTS / "run_gpt2_124M.sh"
    options = (*data(shards_dir), *SMALL, "-x", 240, "-n", 20)
    assert run(recipe, *options, "-o", tmp_path / "whole").code == 0
    killed = tmp_path / "killed"
    with start(recipe, *options, "-o", killed) as process:
        for step in (40, 80):
            wait_for("checkpoint", (killed / f"step-{step:08d}").exists)
            os.kill(int((killed / ".lock").read_text().split()[1]), signal.SIGKILL)  # "pid 123 on ..."
        result = finish(process)
    assert result.code == 0, result.err
    assert result.err.count("exit code 137: resuming in 0 s from step ") == 2
    assert tensors(killed) == tensors(tmp_path / "whole")
    again = run(recipe, *options, "-o", killed)
    assert again.code == 0
    assert "/240 |" not in again.out  # no step was made


@pytest.fixture
def scripted(tmp_path):
    """scripted("17 40", "0"): run.sh with a train.py that ends so, try by try: exit code, and the checkpoint left."""

    def go(*ends: str, **env: object) -> tuple[Run, int]:
        (tmp_path / "ends").write_text("".join(f"{end}\n" for end in ends))
        body = f"""
            cd {tmp_path}
            echo "$@" >>calls
            read -r code step < <(sed -n "$(wc -l <calls)p" ends)
            [[ -n $step ]] && mkdir -p run/step-$(printf %08d "$step")
            exit "$code"
        """
        result = run(SCRIPTS / "run.sh", "-o", tmp_path / "run", PYTHON=stand_in(tmp_path / "python", body), **env)
        calls = (tmp_path / "calls").read_text().splitlines()
        assert all(call.endswith(" -y 1") for call in calls)
        return result, len(calls)

    return go


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 75, 126, 127, 130])
def test_exit_codes_that_end_the_loop(scripted, code):
    result, tries = scripted(f"{code} 10", "0")
    assert (result.code, tries) == (code, 1)


@pytest.mark.parametrize("code", [1, 6, 9, 17, 134, 137, 139, 255])
def test_exit_codes_after_which_it_resumes(scripted, code):
    result, tries = scripted(f"{code} 10", "0")
    assert (result.code, tries) == (0, 2)
    assert f"exit code {code}: resuming in 0 s from step 10" in result.err


@pytest.mark.parametrize(
    ("ends", "env", "code", "tries"),
    [
        (("17", "9", "1", "0"), {}, 1, 3),
        (("17", "0"), {"TRIES": 1}, 17, 1),
        (("17", "17", "17 5", "17", "17", "17 5", "0"), {}, 17, 6),
        (("17", "17", "17 5", "17", "17", "17 10", "17", "17", "0"), {}, 0, 9),
    ],
)
def test_it_gives_up_where_nothing_is_gained(scripted, ends, env, code, tries):
    result, tried = scripted(*ends, **env)
    assert (result.code, tried) == (code, tries)
    assert ("giving up" in result.err) == (code != 0)


def test_without_a_run_directory_it_does_not_start():
    assert run(SCRIPTS / "run.sh", "-e", "d12", PYTHON="false").code == 2


@pytest.mark.parametrize("options", [("--out-dir", "{}"), ("--out-dir={}",), ("-o", "elsewhere", "-o", "{}")])
def test_the_run_directory_is_found_in_the_options(options, tmp_path):
    (tmp_path / "step-00000012").mkdir()
    fails_once = stand_in(tmp_path / "python", f"mkdir {tmp_path}/tried 2>/dev/null && exit 17 || exit 0")
    result = run(SCRIPTS / "run.sh", *(word.format(tmp_path) for word in options), PYTHON=fails_once)
    assert "from step 12" in result.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_what_stops_the_loop_is_passed_on_to_be_saved(number, tmp_path):
    body = f"trap 'exit 75' USR1; trap 'exit 1' INT TERM HUP; touch {tmp_path}/up; while :; do sleep 0.05; done"
    with start(SCRIPTS / "run.sh", "-o", tmp_path, PYTHON=stand_in(tmp_path / "python", body)) as process:
        wait_for("start", (tmp_path / "up").exists)
        process.send_signal(number)
        assert finish(process).code == 75


def test_a_second_signal_ends_at_once_and_nothing_is_started_again(tmp_path):
    body = f"trap 'touch {tmp_path}/told' USR1; touch {tmp_path}/up; while :; do sleep 0.05; done"
    with start(SCRIPTS / "run.sh", "-o", tmp_path, PYTHON=stand_in(tmp_path / "python", body)) as process:
        for name in ("up", "told"):
            wait_for(name, (tmp_path / name).exists)
            process.send_signal(signal.SIGTERM)
        result = finish(process)
    assert result.code == 143
    assert "before it could save" in result.err


def test_a_signal_between_two_tries_ends_the_loop(tmp_path):
    """Until then it has nothing to pass on but the pause."""
    fails = stand_in(tmp_path / "python", f"echo >>{tmp_path}/calls; exit 17")
    with start(SCRIPTS / "run.sh", "-o", tmp_path, PYTHON=fails, PAUSE=TIMEOUT) as process:
        assert process.stderr
        while "resuming" not in process.stderr.readline():
            pass
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert finish(process, timeout=10).code == 17
    assert (tmp_path / "calls").read_text() == "\n"


@needs_mpirun
def test_ranks_are_started_by_mpirun_and_save_when_the_loop_is_stopped(shards_dir, tmp_path):
    options = (*data(shards_dir), *SMALL, "-x", 10**6, "-n", 20, "-nk", 2, "-o", tmp_path / "run")
    env = {"RANKS": 2, "PATH": f"{MPIRUN.parent}:{os.environ['PATH']}"}
    with start(SCRIPTS / "run_gpt2_350M.sh", *options, **env) as process:
        wait_for("checkpoint", (tmp_path / "run/step-00000020").exists)
        process.send_signal(signal.SIGTERM)
        result = finish(process)
    assert result.code == 75, result.err
    assert "stopped by SIGUSR1" in result.out


def test_open_mpi_ties_no_rank_to_a_core_unless_it_is_told_to(tmp_path):
    names = ("OMPI_MCA_hwloc_base_binding_policy", "PRTE_MCA_hwloc_default_binding_policy")
    python = stand_in(tmp_path / "python", f"env >{tmp_path}/env")
    for env, policies in (({}, ("none", "none")), ({names[0]: "core"}, ("core", "none"))):
        assert run(SCRIPTS / "run.sh", "-o", tmp_path / "run", PYTHON=python, **env).code == 0
        lines = (tmp_path / "env").read_text().splitlines()
        assert all(f"{name}={policy}" in lines for name, policy in zip(names, policies, strict=True))


# --- several machines

HOSTS = """# two MPIs' ways of saying it
one:4
two slots=2   # the old one

three
"""
MPICH, OPEN_MPI, OTHER = "HYDRA build details:", "mpirun (Open MPI) 4.1.4", "mpirun of another kind"


def multi_node(tmp_path: Path, version: str, hosts: str, **env: object) -> Run:
    """What multi_node_mpirun.sh would start by an mpirun that says it is of this version."""
    stand_in(tmp_path / "bin/mpirun", f'echo "{version}"')
    (tmp_path / "hosts").write_text(hosts)
    recipe = stand_in(tmp_path / "recipe", 'echo "$LAUNCH" "$@"')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    return run(SCRIPTS / "multi_node_mpirun.sh", tmp_path / "hosts", recipe, "-b", 16, PATH=path, **env)


def test_a_host_file_for_mpich(tmp_path):
    result = multi_node(tmp_path, MPICH, HOSTS)
    assert result.out == "mpirun -np 14 -hosts one:4,two:2,three:8 -b 16\n"


def test_a_host_file_for_open_mpi(tmp_path):
    """Which must be told what to pass on."""
    result = multi_node(tmp_path, OPEN_MPI, HOSTS, RANKS_PER_HOST=1, NCCL_DEBUG="WARN", SECRET="no")
    words = result.out.split()
    assert words[:5] == ["mpirun", "-np", "7", "--host", "one:4,two:2,three:1"]
    passed = {name for option, name in pairwise(words) if option == "-x"}
    assert {"NCCL_DEBUG", "PATH"} <= passed
    assert "SECRET" not in passed


@pytest.mark.parametrize(
    ("version", "hosts", "told"),
    [(OTHER, "one\n", "neither"), (MPICH, "# none\n", "names no host"), (MPICH, "one two\n", "found 'one two'")],
)
def test_what_several_machines_cannot_be_started_with(version, hosts, told, tmp_path):
    result = multi_node(tmp_path, version, hosts)
    assert (result.code, result.out) == (2, "")
    assert told in result.err


@needs_mpirun
def test_the_machines_of_a_host_file_train(shards_dir, tmp_path):
    (tmp_path / "hosts").write_text("localhost:2\n")
    options = (*data(shards_dir), *SMALL, "-x", 3, "-o", tmp_path / "run")
    path = f"{MPIRUN.parent}:{os.environ['PATH']}"
    result = run(
        SCRIPTS / "multi_node_mpirun.sh", tmp_path / "hosts", SCRIPTS / "run_gpt2_124M.sh", *options, PATH=path
    )
    assert result.code == 0, result.err
    assert "for each rank" in result.out
    assert (tmp_path / "run/step-00000003").is_dir()


# --- Slurm


@pytest.mark.parametrize(
    ("library", "kind"), [("MPICH Version: 5", "pmi2"), ("Open MPI v5", "pmix"), ("A new one", "")]
)
def test_slurm_starts_ranks_in_the_way_of_the_mpi_library(library, kind, tmp_path):
    python = stand_in(tmp_path / "python", f'echo "{library}"')
    recipe = stand_in(tmp_path / "recipe", 'echo "$SLURM_MPI_TYPE: $LAUNCH $*"')
    result = run(SCRIPTS / "slurm.sh", recipe, "-b", 16, PYTHON=python, SLURM_JOB_ID=1)
    assert result.out == f"{kind}: srun --kill-on-bad-exit=1 --cpu-bind=none -b 16\n"
    chosen = run(SCRIPTS / "slurm.sh", recipe, PYTHON=python, SLURM_JOB_ID=1, SLURM_MPI_TYPE="mine")
    assert chosen.out.startswith("mine: ")


def test_slurm_is_told_from_a_shell():
    result = run(SCRIPTS / "slurm.sh", "scripts/run_gpt2_124M.sh", SLURM_JOB_ID="")
    assert result.code == 2
    assert "sbatch" in result.err
