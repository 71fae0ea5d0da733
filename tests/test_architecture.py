"""The shape of the project: imports point one way, the vocabulary is complete, forbidden things are absent."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine import ops

ROOT = Path(__file__).parent.parent

# What a line names may import what the lines above it name, and nothing else of the engine.
LAYERS = (
    ("disk", "launcher"),
    ("errors",),
    ("config", "shards", "tokenizer"),
    ("comm", "arena", "device", "data", "checkpoint", "llmc_model"),
    ("ops",),
    ("models", "zero", "interrupt", "watchdog"),
    ("optimizer", "log"),
    ("evaluate", "sample", "report", "options", "export", "memory", "doctor"),
    ("training",),
)
# And of those, a model sees no data, an operation no model.
FORBIDDEN = {"models": {"comm", "data", "checkpoint", "shards"}}


def product() -> list[Path]:
    """What is shipped: everything but the tests."""
    return [ROOT / "train.py"] + [p for d in ("engine", "prep", "bench") for p in sorted((ROOT / d).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def room(path: Path) -> str:
    """The part of engine/ that a file belongs to: engine/ops/numpy/gelu.py -> ops."""
    return path.relative_to(ROOT / "engine").with_suffix("").parts[0]


def test_every_room_has_its_place():
    rooms = {room(path) for path in (ROOT / "engine").rglob("*.py")} - {"__init__"}
    assert rooms == {name for layer in LAYERS for name in layer}


def test_every_package_is_installed():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    found = {p.parent.relative_to(ROOT) for d in ("engine", "prep") for p in (ROOT / d).rglob("__init__.py")}
    assert listed
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == {".".join(path.parts) for path in found}


@pytest.mark.parametrize("path", sorted((ROOT / "engine").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    place = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
    own = room(path)
    if own == "__init__":
        return
    for module in imported(path):
        if module.split(".")[0] in ("prep", "bench", "tests", "train"):
            pytest.fail(f"{path}: the engine imports {module}")
        parts = module.split(".")
        if parts[0] == "engine" and len(parts) > 1 and parts[1] in place and parts[1] != own:
            other = parts[1]
            assert place[other] < place[own], f"{own} imports {other}, which does not lie below it"
            assert other not in FORBIDDEN.get(own, ()), f"{own} must not know of {other}"


def test_prep_sees_only_the_token_side_of_the_engine():
    allowed = {"engine.shards", "engine.tokenizer", "engine.errors", "engine.disk"}
    for path in (ROOT / "prep").glob("*.py"):
        for module in imported(path):
            if module.startswith("engine."):
                assert any(module == name or module.startswith(f"{name}.") for name in allowed), f"{path}: {module}"


# numpy's linear does GELU block by block; on a GPU it is a pass, or inside the multiply.
WITHIN_NUMPY = {"gelu.apply", "gelu.apply_backward"}


def test_both_devices_have_the_same_vocabulary():
    """Names, order and defaults of arguments: whoever finds one twin can call the other."""
    numpy, cuda = (ops.load(name) for name in ("numpy", "cuda"))

    def functions(module):
        members = vars(module).items()
        own = {k: v for k, v in members if inspect.isfunction(v) and v.__module__ == module.__name__ and k[0] != "_"}
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for name, f in own.items()
        }

    assert numpy.__all__ == cuda.__all__
    assert functions(numpy) == functions(cuda)
    for module in numpy.__all__:
        ours, twins = functions(getattr(numpy, module)), functions(getattr(cuda, module))
        for name, parameters in ours.items():
            if f"{module}.{name}" not in WITHIN_NUMPY:
                assert twins[name] == parameters, f"{module}.{name}"


def test_both_sides_of_every_operation_stand_together():
    """An operation is one file; what goes backward has a forward beside it."""
    for path in (ROOT / "engine/ops/numpy").glob("*.py"):
        functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        if "backward" in functions:
            assert "forward" in functions, path


@pytest.mark.parametrize("path", product(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_forbidden(path):
    """PyTorch only in tests; no pickle, no exec; no tofile, which loses data silently on a full disk."""
    text = path.read_text()
    packages = {name.split(".")[0] for name in imported(path)}
    assert not packages & {"torch", "transformers", "pickle", "shelve", "marshal"}
    assert not re.search(r"\.tofile\(|allow_pickle=True|\bexec\(|\beval\(", text)


def test_everything_can_be_imported_without_cuda_s_packages():
    """Importing needs neither CuPy nor nvmath-python, whatever is imported: a laptop has none."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in product() if path.name != "__init__.py"
    ]
    code = "import sys\nsys.modules.update(cupy=None, cupyx=None, nvmath=None)\n"
    code += "\n".join(f"import {module}" for module in modules if module != "engine.comm.mpi")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
