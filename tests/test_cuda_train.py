"""train.py on a GPU: the same runs, checkpoints and promises as on the CPU."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.log import read_jsonl
from tests.conftest import ROOT, data, run_command, running, write_shards

pytestmark = pytest.mark.gpu

SIZE = ("-e", "l2h2c32", "-b", 4, "-t", 16, "-l", 1e-3, "-s", 0, "-v", 0)
GPU = (*SIZE, "--device", "cuda")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    sizes = {"train_000000.bin": 9001, "val_000000.bin": 1001}
    return data(write_shards(tmp_path_factory.mktemp("data") / "shards", sizes))


def train(*args, code=0):
    result = run_command("train.py", *args)
    assert result.code == code, result.err
    return result


def records(folder, kind="train"):
    """What a run logged of its steps, without the time that they took."""
    kept = [record for record in read_jsonl(folder / "log.jsonl") if record["kind"] == kind]
    return [{name: value for name, value in record.items() if name != "ms"} for record in kept]


def losses(folder):
    return np.array([record["loss"] for record in records(folder)])


def checkpoint(folder, step):
    path = folder / f"step-{step:08d}"
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


def assert_same_checkpoint(a, b):
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name)


@pytest.mark.parametrize(
    "options", [(), ("-w", 0), ("--grad-dtype", "fp32", "-d", 128), ("-r", 2, "-ge", 0), ("--lanes", 2, "-d", 128)]
)
def test_the_same_command_gives_the_same_bits_and_goes_on_where_it_stopped(shards, tmp_path, options):
    for name in ("whole", "again"):
        train(*GPU, *shards, *options, "-x", 12, "-n", 6, "-o", tmp_path / name)
    assert records(tmp_path / "whole") == records(tmp_path / "again")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]

    train(*GPU, *shards, *options, "-x", 6, "-n", 6, "-o", tmp_path / "parts")
    train(*GPU, *shards, *options, "-x", 12, "-n", 6, "-o", tmp_path / "parts", "-y", 1)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    for other in ("again", "parts"):
        assert_same_checkpoint(checkpoint(tmp_path / other, 12), checkpoint(tmp_path / "whole", 12))


def test_algorithms_are_timed_once_and_a_run_keeps_to_its_own(shards, tmp_path, monkeypatch):
    """With the cache, with the checkpoint's table where the cache is lost, and without a search."""
    monkeypatch.setenv("BACKHAND_CACHE", str(tmp_path / "cache"))
    first = train(*GPU, *shards, "-x", 6, "-n", 6, "-o", tmp_path / "parts")
    assert "timed 17 kinds of matrix multiply in" in first.out
    assert "timed GELU inside the matrix multiply: forward" in first.out
    whole = train(*GPU, *shards, "-x", 12, "-n", 6, "-o", tmp_path / "whole")
    assert "\ntimed " not in whole.out
    for file in (tmp_path / "cache").rglob("*.table"):
        file.unlink()
    second = train(*GPU, *shards, "-x", 12, "-n", 6, "-o", tmp_path / "parts", "-y", 1)
    assert "\ntimed " not in second.out
    assert_same_checkpoint(checkpoint(tmp_path / "parts", 12), checkpoint(tmp_path / "whole", 12))
    tables = [json.loads((tmp_path / name / "config.json").read_text())["tuning"] for name in ("whole", "parts")]
    assert tables[0] == tables[1]
    assert len(tables[0]["algorithms"]) == 17
    assert tables[0]["gelu_fusion"]["level"] in (0, 1, 2)

    asked = train(*GPU, *shards, "-x", 14, "-ge", 1, "-o", tmp_path / "parts", "-y", 1)
    assert "timed GELU" not in asked.out
    assert "gelu_fusion" not in json.loads((tmp_path / "parts" / "config.json").read_text())["tuning"]
    plain = train(*GPU, *shards, "-x", 6, "--gemm-search", "off", "-o", tmp_path / "plain")
    assert "\ntimed " not in plain.out
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["tuning"] == {}


def test_killed_the_run_goes_on(shards, tmp_path):
    train(*GPU, *shards, "-x", 60, "-n", 5, "-o", tmp_path / "whole")
    with running(*GPU, *shards, "-x", 60, "-n", 5, "-o", tmp_path / "killed") as process:
        for line in process.stdout:
            if "saved" in line:
                process.kill()
                break
        process.wait()
    train(*GPU, *shards, "-x", 60, "-n", 5, "-o", tmp_path / "killed", "-y", 1)
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert_same_checkpoint(checkpoint(tmp_path / "killed", 60), checkpoint(tmp_path / "whole", 60))


def test_a_checkpoint_goes_from_the_cpu_to_the_gpu_and_back(shards, tmp_path):
    """Nothing is lost at the border; the steps on the GPU differ by the roundings of bf16."""
    cpu = (*SIZE, "--device", "cpu")
    train(*cpu, *shards, "-x", 15, "-n", 5, "-o", tmp_path / "cpu")
    for steps, side in ((5, cpu), (10, GPU), (15, cpu)):
        train(*side, *shards, "-x", steps, "-n", 5, "-o", tmp_path / "both", "-y", int(steps > 5))
    assert_same_checkpoint(checkpoint(tmp_path / "both", 5), checkpoint(tmp_path / "cpu", 5))
    assert losses(tmp_path / "both")[:5].tolist() == losses(tmp_path / "cpu")[:5].tolist()
    np.testing.assert_allclose(losses(tmp_path / "both"), losses(tmp_path / "cpu"), rtol=2**-8)


def test_gelu_in_the_multiply_gives_the_same_first_loss_with_and_without_recomputation(shards, tmp_path):
    for level in (0, 1, 2):
        train(*GPU, *shards, "-ge", 2, "-r", level, "-x", 4, "-o", tmp_path / str(level))
    first = [losses(tmp_path / str(level))[0] for level in (0, 1, 2)]
    assert first[0] == first[1] == first[2]


def test_accumulation_is_the_same_step(shards, tmp_path):
    """4 micro-batches of 1 sequence, or 1 of 4: the same samples; sums in another order, and of gradients in bf16."""
    for B in (4, 1):
        train(*GPU, "-b", B, "-d", 64, *shards, "-x", 6, "-o", tmp_path / str(B))
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "4"), rtol=2**-8)


def test_validation_and_text(shards, tmp_path):
    options = ("-v", 3, "-m", -1, "-s", 3, "-g", 20, "-x", 6, "-o", tmp_path / "run")
    result = train(*SIZE, "--device", "auto", *shards, *options)
    assert "MiB on NVIDIA" in result.out
    on_gpu = records(tmp_path / "run", "val")
    assert [record["step"] for record in on_gpu] == [0, 3, 6]
    assert len(records(tmp_path / "run", "sample")) == 2
    train(*SIZE, "--device", "cpu", *shards, "-v", 3, "-m", -1, "-x", 6, "-o", tmp_path / "cpu")
    on_cpu = records(tmp_path / "cpu", "val")
    np.testing.assert_allclose([r["loss"] for r in on_gpu], [r["loss"] for r in on_cpu], rtol=2**-8)


def test_what_does_not_fit_is_refused_with_flags_that_do(shards):
    result = train("-e", "d48", "-b", 1024, "-t", 1024, *shards, "-x", 1, "-v", 0, "-s", 0, "--device", "cuda", code=5)
    assert "GiB are free" in result.err
    assert "this fits, with the same steps but for rounding: -b" in result.err


@pytest.mark.parametrize(("size", "words"), [("l1h4c32", "heads of 16, 32, 64"), ("l1h128c16384", "up to 8192")])
def test_what_has_no_kernel_is_refused(shards, size, words):
    result = train(*GPU, "-e", size, *shards, "-x", 1, code=2)
    assert words in result.err
    assert "--device cpu" in result.err


def test_the_doctor_finds_it_all():
    result = subprocess.run(
        [sys.executable, "-m", "engine.doctor"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "GPU: yes" in result.stdout, result.stdout + result.stderr


def test_an_edited_kernel_runs_at_once(shards, tmp_path):
    """A copy of the project, whose GELU is edited between two runs: nothing else is done."""
    copy = tmp_path / "copy"
    for name in ("engine", "kernels_cu"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "train.py", copy)
    found = []
    for factor in ("0.5f", "0.25f"):
        source = copy / "kernels_cu/gelu.cuh"
        before, half, behind = source.read_text().partition("return 0.5f * x")
        assert half
        source.write_text(f"{before}return {factor} * x{behind}")
        out = tmp_path / factor
        command = [*map(str, (*GPU, "-ge", 0, *shards, "-x", 2, "-o", out))]
        subprocess.run([sys.executable, "train.py", *command], cwd=copy, check=True, capture_output=True)
        found.append(losses(out)[0])
    assert found[0] != found[1]
