"""llm.c's model file, byte by byte, and what is done with files that only claim to be one."""

import resource
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import llmc_model
from engine.errors import CheckpointError
from engine.llmc_model import file_bytes, read, shapes, write
from tests.test_checkpoint import in_child, names

GPT2_124M = {"max_seq_len": 1024, "V": 50257, "Vp": 50304, "L": 12, "NH": 12, "C": 768}
TINY = {"max_seq_len": 5, "V": 11, "Vp": 16, "L": 2, "NH": 2, "C": 4}
# In the order of the file, with the sizes of TINY counted by hand.
TINY_ORDER = [
    ("wte", 64), ("wpe", 20), ("ln1w", 8), ("ln1b", 8), ("qkvw", 96), ("qkvb", 24),
    ("attprojw", 32), ("attprojb", 8), ("ln2w", 8), ("ln2b", 8), ("fcw", 128), ("fcb", 32),
    ("fcprojw", 128), ("fcprojb", 8), ("lnfw", 4), ("lnfb", 4),
]  # fmt: skip

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
int32 = st.integers(-(2**31), 2**31 - 1)
float_bits = st.integers(0, 2**32 - 1)


def tensors_of(dims: dict[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes(dims).items()}


def header(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values).ljust(1024, b"\0")


def tiny_header(**changes: int) -> bytes:
    fields = {"magic": 20240326, "version": 3, "max_seq_len": 5, "V": 11, "L": 2, "NH": 2, "C": 4, "Vp": 16}
    return header(*{**fields, **changes}.values())


def to_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 patterns of float32 bit patterns, rounded to nearest even in integers; NaN is not covered."""
    bits = bits.astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)


def test_the_file_is_laid_out_as_llmc_has_it(tmp_path):
    tensors = tensors_of(TINY)
    write(tmp_path / "model.bin", TINY, tensors)
    body = b"".join(tensors[name].tobytes() for name, _ in TINY_ORDER)
    assert [(name, tensors[name].size) for name in shapes(TINY)] == TINY_ORDER
    assert (tmp_path / "model.bin").read_bytes() == tiny_header() + body
    assert names(tmp_path) == ["model.bin"]


def test_weights_are_out_in_and_layers_come_first():
    expected = {"qkvw": (2, 12, 4), "attprojw": (2, 4, 4), "fcw": (2, 16, 4), "fcprojw": (2, 4, 16)}
    assert {name: shapes(TINY)[name] for name in expected} == expected
    assert (shapes(TINY)["wte"], shapes(TINY)["wpe"], shapes(TINY)["lnfw"]) == ((16, 4), (5, 4), (4,))


def test_sizes_of_the_published_124m_files():
    assert file_bytes(GPT2_124M, "bfloat16") == 248_952_832
    assert file_bytes(GPT2_124M, "float32") == 1024 + 4 * 124_475_904


def test_float32_round_trip_is_bit_exact_and_mapped(tmp_path):
    tensors = tensors_of(TINY)
    tensors["lnfw"][:] = np.array([0x7FC01234, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)
    write(tmp_path / "model.bin", TINY, tensors, "float32")
    dims, found = read(tmp_path / "model.bin")
    assert dims == TINY
    assert list(found) == [name for name, _ in TINY_ORDER]
    for name, array in tensors.items():
        assert type(found[name]) is np.ndarray
        assert (found[name].dtype, found[name].shape) == (np.float32, array.shape)
        assert found[name].tobytes() == array.tobytes()
        assert not found[name].flags.writeable


def test_reading_a_large_float32_file_reads_nothing_yet(tmp_path):
    """A file of 1 TB, all of it a hole: only mapping can open it."""
    dims = {"max_seq_len": 1, "V": 1, "Vp": 2**31 - 1, "L": 1, "NH": 1, "C": 128}
    with (tmp_path / "model.bin").open("wb") as file:
        file.write(header(20240326, 3, 1, 1, 1, 1, 128, 2**31 - 1))
        file.truncate(file_bytes(dims, "float32"))
    found_dims, tensors = read(tmp_path / "model.bin")
    assert found_dims == dims
    assert tensors["wte"].shape == (2**31 - 1, 128)
    assert tensors["lnfb"][-1] == 0


def test_bfloat16_round_trip(tmp_path):
    tensors = tensors_of(TINY)
    write(tmp_path / "model.bin", TINY, tensors, "bfloat16")
    data = (tmp_path / "model.bin").read_bytes()
    assert data[:1024] == tiny_header(version=5)
    assert len(data) == file_bytes(TINY, "bfloat16") == 1024 + 2 * sum(size for _, size in TINY_ORDER)
    dims, found = read(tmp_path / "model.bin")
    assert dims == TINY
    for name, array in tensors.items():
        widened = to_bfloat16(array.view(np.uint32)).astype(np.uint32) << np.uint32(16)
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name].view(np.uint32), widened)
    write(tmp_path / "again.bin", dims, found, "bfloat16")  # what is bfloat16 already is not rounded again
    assert (tmp_path / "again.bin").read_bytes() == data


@quick
@given(bits=st.lists(float_bits | float_bits.map(lambda b: b & ~0xFFFF | 0x8000), min_size=64, max_size=64))
def test_bfloat16_is_the_nearest_and_even_on_ties(tmp_path, bits):
    tensors = tensors_of(TINY)
    tensors["wte"] = np.array(bits, np.uint32).view(np.float32).reshape(16, 4)
    write(tmp_path / "model.bin", TINY, tensors, "bfloat16")
    stored = np.frombuffer((tmp_path / "model.bin").read_bytes(), "<u2", 64, 1024)
    nan = np.isnan(tensors["wte"]).ravel()
    assert np.array_equal(stored[~nan], to_bfloat16(np.array(bits, np.uint32))[~nan])
    assert np.all((stored[nan] & 0x7FFF) > 0x7F80)  # NaN stays NaN, it does not become infinity


def test_any_memory_layout_is_written_in_order(tmp_path):
    tensors = tensors_of(TINY)
    strange = {
        **tensors,
        "qkvw": np.asfortranarray(tensors["qkvw"]),
        "fcw": tensors["fcw"][:, ::-1][:, ::-1],
        "wpe": np.repeat(tensors["wpe"], 2, axis=0)[::2],
    }
    for dtype in ("float32", "bfloat16"):
        write(tmp_path / "plain.bin", TINY, tensors, dtype)
        write(tmp_path / "strange.bin", TINY, strange, dtype)
        assert (tmp_path / "plain.bin").read_bytes() == (tmp_path / "strange.bin").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": 20240520}, "20240520, expected 20240326"),
        ({"version": 1}, r"version is 1, expected 3 \(float32\) or 5 \(bfloat16\)"),
        ({"version": 5}, r"it has 3,344 bytes, its header needs 2,184 \(bfloat16"),
        ({"L": 0}, "L is 0, expected 1 to"),
        ({"V": -1}, "V is -1, expected 1 to"),
        ({"max_seq_len": -(2**31)}, "max_seq_len is -2147483648"),
        ({"NH": 3}, "C is 4, expected a multiple of NH, 3"),
        ({"Vp": 10}, "Vp is 10, expected at least V, 11"),
        ({"L": 3}, "it has 3,344 bytes, its header needs 4,320"),
        ({"C": 2**30, "L": 2**31 - 1}, "it has 3,344 bytes, its header needs 118,8.."),
    ],
)
def test_a_header_that_cannot_be_true(tmp_path, changes, message):
    path = tmp_path / "model.bin"
    path.write_bytes(tiny_header(**changes) + bytes(4 * sum(size for _, size in TINY_ORDER)))
    with pytest.raises(CheckpointError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "fix:" in str(error.value)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 3343, 3345, 6000])
def test_a_file_of_the_wrong_size(tmp_path, size):
    path = tmp_path / "model.bin"
    path.write_bytes((tiny_header() + bytes(6000))[:size])
    with pytest.raises(CheckpointError, match=f"it has {size:,} bytes"):
        read(path)


@quick
@given(
    fields=st.tuples(*[int32 | st.integers(-1, 4)] * 6),
    version=st.sampled_from([3, 5]) | int32,
    extra=st.integers(0, 500),
)
def test_any_header_is_refused_or_true(tmp_path, fields, version, extra):
    path = tmp_path / "model.bin"
    path.write_bytes(header(20240326, version, *fields) + bytes(extra * 4))
    try:
        dims, tensors = read(path)
    except CheckpointError:
        return
    stored = {3: 4, 5: 2}[version]
    assert path.stat().st_size == 1024 + stored * sum(array.size for array in tensors.values())
    assert dims["C"] % dims["NH"] == 0
    assert dims["Vp"] >= dims["V"] >= 1


@quick
@given(data=st.binary(max_size=1100))
def test_any_bytes_are_refused(tmp_path, data):
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(CheckpointError):
        read(tmp_path / "model.bin")


def test_what_is_no_file_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read(tmp_path / "missing.bin")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("dims", "change", "dtype", "message"),
    [
        ({"NH": 3}, {}, "float32", "multiple of NH"),
        ({"L": 0}, {}, "float32", "L is 0"),
        ({"Vp": 2**31}, {}, "float32", "Vp is 2147483648"),
        (
            {},
            {"wte": np.zeros((11, 4), np.float32)},
            "float32",
            r"wte is float32\(11, 4\), expected .*\(16, 4\)",
        ),
        ({}, {"wte": np.zeros((16, 4))}, "float32", "wte is float64"),
        ({}, {"lm_head": np.zeros(1, np.float32)}, "float32", "lm_head"),
        ({}, {}, "float16", "dtype is 'float16'"),
    ],
)
def test_what_does_not_fit_together_is_not_written(tmp_path, dims, change, dtype, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "model.bin", {**TINY, **dims}, {**tensors_of(TINY), **change}, dtype)
    assert names(tmp_path) == []


def write_within(limit: int, path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(CheckpointError, match=r"(?s)File too large.*fix:.* 3,344 bytes"):
        write(path, TINY, tensors_of(TINY))


@pytest.mark.parametrize("limit", [0, 1, 1023, 1024, 1025, 2000, 3343])
def test_a_full_disk_leaves_the_old_file(tmp_path, limit):
    path = tmp_path / "model.bin"
    path.write_text("old")
    assert in_child(partial(write_within, limit, path)) == 0
    assert path.read_text() == "old"
    assert names(tmp_path) == ["model.bin"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "model.bin").mkdir()
    for path in (tmp_path / "file" / "model.bin", tmp_path / "missing" / "model.bin", tmp_path / "model.bin"):
        with pytest.raises(CheckpointError, match=str(path)):
            write(path, TINY, tensors_of(TINY))
    assert names(tmp_path) == ["file", "model.bin"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    replace = Path.replace

    def spy(path, target):
        order.append(f"rename {path.name} {target.name}")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", spy)
    monkeypatch.setattr(llmc_model, "sync", lambda path: order.append(f"sync {path.name}"))
    write(tmp_path / "model.bin", TINY, tensors_of(TINY))
    assert order == ["sync .model.bin.tmp", "rename .model.bin.tmp model.bin", f"sync {tmp_path.name}"]
