"""bench/operations.py: it runs, its peers do the same work, and its figures follow from each other."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from bench.operations import randomize
from bench.step import Call, Recorded, in_turns, make_step, random_batches, set_up
from engine import device
from tests.conftest import ROOT
from tests.twins import EPS16, EPS32

B, T, V, C, Vp = 2, 64, 700, 128, 768  # of which no two multiplies are of one size
SIZE = ("-e", f"l3h2c{C}", "-b", str(B), "-t", str(T), "--vocabulary", str(V))
PRODUCTS = {
    **{f"linear.forward {a}>{b}": 2 * a * b for a, b in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, Vp))},
    **{f"linear.backward {a}<{b}": 4 * a * b for a, b in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, Vp))},
    "attention.forward": 2 * 2 * (T + 1) / 2 * C,  # over the keys that a query sees
    "attention.backward": 5 * 2 * (T + 1) / 2 * C,
}  # FLOPs of a token
COPIES = {f"{name}.{way}" for name in ("embedding", "layernorm") for way in ("forward", "backward")}
COPIES |= {"classifier.forward_backward", "norm.squared", "adamw.update"}

BACKENDS = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
have_torch = importlib.util.find_spec("torch") is not None


def run(folder, *options, start=("bench/operations.py",)):
    """(what it printed, its figures)."""
    target = folder / "operations.json"
    times = ("--warm-up", "0.1", "--seconds", "0.3", "--json", target)
    command = [sys.executable, *start, *SIZE, *times, *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(target.read_text())


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operation_is_there_beside_its_peers(tmp_path, backend):
    printed, figures = run(tmp_path, "--device", backend, "--determinism")
    rows = {row["operation"]: row for row in figures["operations"]}
    assert set(rows) == set(PRODUCTS) | COPIES
    assert len(rows) == len(figures["operations"])
    for name, row in rows.items():
        if name in PRODUCTS:
            assert row["unit"] == "FLOP/s"
            works = [side["rate"] * side["ms"] / 1000 for side in (row["ours"], *row["peers"].values())]
            assert works == pytest.approx([PRODUCTS[name] * B * T] * len(works))
        else:
            assert list(row["peers"]) == ["copy"]
        for peer in row["peers"].values():
            ratio = f"{row['ours']['rate'] / peer['rate']:.3f}"
            assert any(f"{peer['ms']:.3f}" in line and line.endswith(ratio) for line in printed.splitlines()), name
    peers = {name: set(rows[name]["peers"]) | set(rows[name]["missing"]) for name in PRODUCTS}
    if have_torch:
        both = {"SDPA cuDNN", "SDPA flash"}
        assert peers.pop("attention.forward") == both
        assert peers.pop("attention.backward") == both | {"SDPA flash, deterministic"}
        assert all(peers[name] == {"torch.mm" if "forward" in name else "2 torch.mm"} for name in peers)
    assert ("PyTorch is not installed" in printed) != have_torch
    for always in ("ours", "SDPA flash, deterministic"):
        assert figures["same_bits"].get(always, True)
    assert len(figures["fp32_sums"]) == (15 if backend == "cuda" else 0)
    for record in figures["fp32_sums"].values():
        assert 0 < record["any_us"] <= record["fp32_us"]


def test_without_pytorch_ours_stand_alone(tmp_path):
    start = (
        "-c",
        "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('bench/operations.py', run_name='__main__')",
    )
    printed, figures = run(tmp_path, "--device", "cpu", start=start)
    assert "PyTorch is not installed: multiplies and attention without their peers" in printed
    assert all(row["peers"] == {} for row in figures["operations"] if row["operation"] in PRODUCTS)


def test_operations_are_timed_on_random_matrices(monkeypatch):
    """To their last number; what is no matrix, as statistics and flat buffers are not, stays."""
    monkeypatch.setattr("bench.operations.NOISE", 100)
    arrays = {n: np.zeros(shape, np.float32) for n, shape in enumerate([(30, 11), (2, 3, 5), (7,), ()])}
    arrays["inp"] = np.zeros((4, 4), np.int32)
    randomize(Call("linear.forward", arrays, print, 0, 0), device.load("numpy"))
    assert all(arrays[n].all() for n in (0, 1))
    assert not np.array_equal(arrays[0].ravel()[:30], arrays[1].ravel())
    assert not any(arrays[n].any() for n in (2, 3, "inp"))


@pytest.fixture(scope="module", params=BACKENDS)
def recorded(request):
    """(the device, the calls of linear and attention in a step on it)."""
    setting = set_up(V, 1, model=f"l1h2c{C}", B=B, T=T, recompute=0, gemm_search="off", device=request.param)
    operations = Recorded(setting.operations, setting.dev)
    batches = random_batches(setting.run, setting.config)
    step = make_step(setting.config, batches, setting.dev, operations, recompute=0)
    operations.calls = []
    step()
    return setting.dev, [call for call in operations.calls if call.name.startswith(("linear", "attention"))]


def test_the_peers_do_the_same_work(recorded):
    """Each within the roundings of its intermediate results, in the norm: scores, probabilities and their gradients in
    bf16, and the result; as many on both sides."""
    torch_operations = pytest.importorskip("tests.torch_operations", exc_type=ImportError)
    dev, calls = recorded
    eps = EPS16 if dev.WORKS_ALONE else EPS32 * np.sqrt(B * T * C)  # on a CPU those of the sums
    attend = next(call for call in calls if call.name == "attention.forward")
    for call in calls:
        randomize(call, dev)
        host = {key: dev.to_host(x).astype(np.float64).reshape(-1, x.shape[-1]) for key, x in call.arrays.items()}
        if call.name == "linear.forward":
            expected = [host[1][:, : host[2].shape[1]] @ host[2].T]
        elif call.name == "linear.backward":
            expected = [host[2] @ host[4], host[2].T @ host[3][:, : host[4].shape[1]]]
        else:
            attend.again()
            call.again()
            heads = dev.to_host(call.arrays[0]).astype(np.float64).reshape(B, T, -1, 2, C // 2).transpose(2, 0, 3, 1, 4)
            expected = list(heads)
        peers, _ = torch_operations.peers(call)
        assert peers
        for name, peer in peers.items():
            results = peer()
            results = results if isinstance(results, tuple) else (results,)
            for found, exact in zip(results, expected, strict=True):
                error = found.detach().double().cpu().numpy() - exact
                assert np.linalg.norm(error) <= 8 * eps * np.linalg.norm(exact), (call.name, name)


class Clock:
    """A device that takes 1 s for the first contender, 2 s for the second; and the host's clock, which is the same."""

    now = 0.0

    def mark(self):
        return self.now

    def seconds_between(self, began, ended):
        return ended - began

    def work(self, seconds, order):
        self.now += seconds
        order.append(seconds)


@pytest.mark.parametrize(
    ("warm_up", "seconds", "calls", "timed"),
    [(0, 12, 8, (4, 3)), (6, 6, 8, (3, 2)), (0, 0, 3, (1, 1)), (7, 0, 6, (1, 1))],
)
def test_contenders_take_turns_and_the_warm_up_is_not_counted(monkeypatch, warm_up, seconds, calls, timed):
    """A turn is timed when the one after it has begun, so the last is not, and of the warm-up the last but one is."""
    clock, order = Clock(), []
    monkeypatch.setattr("bench.step.time.monotonic", lambda: clock.now)
    times = in_turns(clock, [lambda: clock.work(1, order), lambda: clock.work(2, order)], warm_up, seconds)
    assert order == ([1, 2] * calls)[:calls]
    assert times == [[1] * timed[0], [2] * timed[1]]
