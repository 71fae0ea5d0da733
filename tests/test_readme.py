"""The README's commands, run; the Makefile says the same ones; the file map is true."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)  # (language, content)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]

MPIRUN = Path(sys.executable).parent / "mpirun"

# Added to every `python train.py`: the last of an option counts, so a long run becomes a short one.
SHORT = ["-x", "4", "-v", "2", "-s", "2", "-g", "5", "-n", "2"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a user has after cloning."""
    root = tmp_path_factory.mktemp("clone") / "backhand"
    made_here = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "data", "runs", "build"
    )
    shutil.copytree(ROOT, root, ignore=made_here)
    return root


def test_every_command_runs(checkout):
    """In the README's order, in one checkout, with this environment's Python. What installs is tested below."""
    ran = 0
    for line in COMMANDS:
        words = shlex.split(line)
        launcher: list[str] = []
        if words[0] == "mpirun" and MPIRUN.exists():
            launcher, words = [str(MPIRUN), *words[1 : words.index("python")]], words[words.index("python") :]
        if words[0] != "python" or words[1:3] == ["-m", "pytest"]:
            continue
        if words[1] == "bench/cpu.py":
            words = [word for word in words if word != "--beside-torch"] + ["--rounds", "1"]
        if words[1] == "train.py" and "--help" not in words:
            words += SHORT
        command = [*launcher, sys.executable, *words[1:]]
        result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        ran += 1
    assert ran >= 7 + MPIRUN.exists()
    assert (checkout / "runs/sotu/loss.png").stat().st_size > 10_000
    assert (checkout / "runs/docs/model.bin").exists()


@pytest.mark.parametrize("target", ["train", "test"])
def test_make_runs_the_plain_commands(target, tmp_path):
    """What `make -n` prints for the README's two commands is what the README shows for other environments."""
    command = ["make", "-n", target, f"VENV={tmp_path}/venv", "CUDA_EXTRA="]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    prefix = f"{tmp_path}/venv/bin/python "
    commands = [line.replace(prefix, "python ").strip() for line in printed.splitlines() if line.startswith(prefix)]
    shown = [line.replace("pip install", "python -m pip install --quiet") for line in COMMANDS]
    assert commands
    assert all(command in shown for command in commands), commands


def test_the_file_map_is_true():
    """Every file and folder that it names exists, and it names every module of the engine."""
    block = next(block for _, block in BLOCKS if block.startswith("train.py"))
    named, folder = set(), Path()
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = Path(name) if name.endswith("/") else Path()
            named.add(Path(name))
        else:
            named.add(folder / name)
    missing = [str(path) for path in named if not (ROOT / path).exists()]
    assert not missing
    modules = {p.relative_to(ROOT) for p in (ROOT / "engine").glob("*.py")} - {Path("engine/__init__.py")}
    assert modules <= named, modules - named


def test_make_is_there_for_each_target_of_contributing():
    targets = re.findall(r"^make (\w+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
