"""bench/mfu.py: it runs, and what it counts is what the formulas say."""

import json
import subprocess
import sys

import pytest

from bench.mfu import Row, peak_of, write_up
from engine.config import model_from_descriptor
from tests.conftest import ROOT

B, T, V = 2, 32, 200


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mfu")
    command = [sys.executable, "bench/mfu.py", *"-e l2h2c64 --device cpu --warm-up 0.2 --seconds 0.5".split()]
    sizes = ["-b", str(B), "-t", str(T), "--vocabulary", str(V)]
    outputs = ["--json", str(folder / "mfu.json"), "--png", str(folder / "mfu.png")]
    result = subprocess.run([*command, *sizes, *outputs], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads((folder / "mfu.json").read_text())
    assert f"{found['tokens_per_second']:,.0f} tokens/s" in result.stdout
    if "matplotlib" in found["versions"]:
        assert (folder / "mfu.png").stat().st_size > 5000
    return found


def test_the_products_that_it_counts_are_those_of_the_model(figures):
    """Three for each weight and token; of attention two forward and five backward, over the keys that a query sees."""
    config = model_from_descriptor("l2h2c64", V, T)
    weights = 12 * config.L * config.C**2 + config.Vp * config.C
    attention = 7 * 2 * config.L * config.C * B * T * (T + 1) / 2
    assert sum(row["flops"] for row in figures["operations"]) == 6 * weights * B * T + attention


def test_tokens_and_mfu_follow_from_the_time(figures):
    config = model_from_descriptor("l2h2c64", V, T)
    per_second = B * T / figures["ms"] * 1000
    assert figures["tokens_per_second"] == pytest.approx(per_second)
    assert figures["peak_flops"] is None
    for formula, causal in (("6N+6LCT", True), ("6N+12LCT", False)):
        expected = per_second * config.flops_per_token(T, causal=causal) / figures["measured_flops"]
        assert figures["mfu"][formula] == pytest.approx(expected)


def test_every_operation_is_there(figures):
    names = {row["name"].split()[0] for row in figures["operations"]}
    assert {"linear.forward", "attention.backward", "layernorm.backward", "adamw.update", "guard.decide"} <= names
    assert all(row["ms"] > 0 for row in figures["operations"])


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3, driver 580", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("AMD EPYC", None),
    ],
)
def test_a_peak_is_that_of_the_very_gpu(name, teraflops):
    assert peak_of(name) == (teraflops and teraflops * 1e12)


FIGURES = {
    "command": "",
    "date": "",
    "machine": "",
    "versions": "",
    "measured_flops": 1.0,
    "measured_bytes": 1.0,
    "ms": 300.0,
    "steps": 1,
    "tokens_per_second": 1.0,
    "mfu": {},
    "gpu": None,
    "peak_flops": None,
    "tuning": {},
}
ROW = Row("linear.forward", 1, 1.0, 1.0, 1.0, 1.0)


def test_what_the_search_gained_is_told():
    record = {"algo": "00", "us": 600.0, "first_us": 1000.0}
    told = "2 kinds of matrix multiply"
    text = write_up(FIGURES | {"tuning": {"algorithms": {"one": record, "other": record}}}, [ROW], "d12")
    assert f"{told} by the algorithms" in text
    assert "they take 1,200 us, by cublasLt's first proposals 2,000 us" in text
    assert told not in write_up(FIGURES, [ROW], "d12")


def test_what_a_step_costs_is_told():
    gpu = {"clock_mhz": 1450, "watts": 700, "peak_mib": 1000, "samples": 5}
    assert "1,450 MHz, 700 W (means), peak of memory 1,000 MiB, 210.0 J a step" in write_up(
        FIGURES | {"gpu": gpu}, [ROW], "d12"
    )
