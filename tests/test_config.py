"""Sizes, parameter counts and arithmetic of models; every option of a run and every fault of one."""

import math
from dataclasses import fields

import pytest

from engine.config import GPT2_SIZES, GPT3_SIZES, GPT2Config, RunConfig, model_from_descriptor
from engine.errors import UsageError

GPT2_VOCABULARY = 50257

# Of llm.c, whose program prints these.
PARAMETERS = {
    "d6": 30_357_504,
    "d12": 124_475_904,
    "d24": 354_871_296,
    "d36": 774_090_240,
    "d48": 1_557_686_400,
    "gpt3:c768": 125_262_336,
}


@pytest.mark.parametrize(("descriptor", "count"), PARAMETERS.items())
def test_parameter_counts_are_llmc_s(descriptor, count):
    assert model_from_descriptor(descriptor, GPT2_VOCABULARY, 1024).num_parameters == count


@pytest.mark.parametrize(("descriptor", "billions"), [("d60", 2.754), ("d72", 7.317), ("d84", 12.22)])
def test_large_gpt2s_have_the_published_size(descriptor, billions):
    count = model_from_descriptor(descriptor, GPT2_VOCABULARY, 1024).num_parameters
    digits = len(str(billions).split(".")[1])
    assert round(count / 1e9, digits) == billions


@pytest.mark.parametrize("L", GPT2_SIZES)
@pytest.mark.parametrize("prefix", ["", "gpt2:"])
def test_gpt2_descriptors(prefix, L):
    C, NH = GPT2_SIZES[L]
    assert model_from_descriptor(f"{prefix}d{L}", 256, 64) == GPT2Config(maxT=1024, V=256, L=L, NH=NH, C=C)


@pytest.mark.parametrize("C", [C for C in GPT3_SIZES if C != 5140])
def test_gpt3_descriptors(C):
    L, HS = GPT3_SIZES[C]
    config = model_from_descriptor(f"gpt3:c{C}", 256, 64)
    assert (config.maxT, config.L, config.C, config.HS) == (2048, L, C, HS)


def test_gpt3_sizes_are_the_paper_s():
    """Table 2.1 of Brown et al. 2020: layers and heads by channels; its XL cannot be built as printed."""
    published = {
        768: (12, 12),
        1024: (24, 16),
        1536: (24, 16),
        2560: (32, 32),
        4096: (32, 32),
        12288: (96, 96),
    }
    for C, (L, NH) in published.items():
        config = model_from_descriptor(f"gpt3:c{C}", GPT2_VOCABULARY, 2048)
        assert (config.L, config.NH) == (L, NH)


def test_any_size_takes_the_run_s_sequence_length():
    assert model_from_descriptor("l3h2c32", 256, 48) == GPT2Config(maxT=48, V=256, L=3, NH=2, C=32)


def test_13b_is_refused_with_the_reason_and_a_size_that_works():
    with pytest.raises(UsageError, match="5140 channels do not divide into heads of 128") as refused:
        model_from_descriptor("gpt3:c5140", GPT2_VOCABULARY, 2048)
    remedy = str(refused.value).split("-e ")[-1]
    config = model_from_descriptor(remedy, GPT2_VOCABULARY, 2048)
    assert (config.L, config.HS) == (40, 128)


@pytest.mark.parametrize(
    "descriptor",
    ["", "d13", "D12", "gpt2:12", "gpt3:d12", "gpt3:c5", "l4h4", "l4h4c128x", "x.bin.gz", "d-12", "d12 "],
)
def test_an_unknown_descriptor_is_refused_with_those_there_are(descriptor):
    with pytest.raises(UsageError) as refused:
        model_from_descriptor(descriptor, 256, 64)
    message = str(refused.value)
    assert f"-e {descriptor}: not a model size" in message
    for known in ("d12", "d84", "gpt3:c768", "l4h4c128", ".bin"):
        assert known in message
    assert "c5140" not in message  # no advice that is refused when taken


@pytest.mark.parametrize("descriptor", ["l0h1c16", "l1h0c16", "l1h1c0", "l2h3c16"])
def test_an_impossible_size_is_refused_by_the_flag_that_gave_it(descriptor):
    with pytest.raises(UsageError, match="-e"):
        model_from_descriptor(descriptor, 256, 64)


@pytest.mark.parametrize(("V", "Vp"), [(1, 128), (128, 128), (129, 256), (256, 256), (50257, 50304)])
def test_padded_vocabulary(V, Vp):
    assert GPT2Config(maxT=8, V=V, L=1, NH=1, C=4).Vp == Vp


def test_flops_of_gpt2():
    """6N + 6LCT with the causal half of attention counted, 6N + 12LCT without; N is that of llm.c."""
    config = model_from_descriptor("d12", GPT2_VOCABULARY, 1024)
    N, L, C, T = 124_475_904, 12, 768, 1024
    assert config.flops_per_token(T, causal=True) == 6 * N + 6 * L * C * T
    assert config.flops_per_token(T, causal=False) == 6 * N + 12 * L * C * T
    assert round(config.flops_per_token(T, causal=True) / 1e6, 1) == 803.5
    assert round(config.flops_per_token(T, causal=False) / 1e6, 1) == 860.1


def test_every_field_is_an_option_with_a_help_text():
    for item in fields(RunConfig):
        assert item.metadata["help"], item.name
        assert any(flag.startswith("--") for flag in item.metadata["flags"]), item.name


def test_no_flag_means_two_things():
    flags = [flag for item in fields(RunConfig) for flag in item.metadata["flags"]]
    assert len(flags) == len(set(flags))


def test_defaults_are_llmc_s():
    run = RunConfig()
    assert (run.model, run.B, run.T, run.total_batch, run.steps) == ("d12", 4, 1024, -1, -1)
    assert (run.schedule, run.lr, run.warmup, run.final_lr, run.weight_decay) == ("cosine", 3e-4, 0, 1.0, 0.0)
    assert (run.beta1, run.beta2, run.eps, run.max_norm, run.seed) == (0.9, 0.95, 1e-8, 1.0, 42)
    assert (run.val_every, run.val_batches, run.sample_every, run.sample_tokens) == (20, 20, 20, 64)
    assert (run.recompute, run.zero_stage, run.checkpoint_every, run.keep_checkpoints) == (1, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("B", [0, -1]),
        ("T", [0, -1]),
        ("steps", [0, -2]),
        ("total_batch", [0, -2]),
        ("checkpoint_every", [-1]),
        ("keep_checkpoints", [-1]),
        ("keep_major", [-1]),
        ("val_every", [-1]),
        ("val_batches", [0, -2]),
        ("sample_every", [-1]),
        ("sample_tokens", [0]),
        ("temperature", [-0.1, math.nan, math.inf]),
        ("lr", [-1e-9, math.nan, math.inf]),
        ("warmup", [-1]),
        ("final_lr", [-0.1, 1.1, math.nan]),
        ("weight_decay", [-0.1, math.nan, math.inf]),
        ("beta1", [-0.1, 1.0, math.nan]),
        ("beta2", [-0.1, 1.0, math.nan]),
        ("eps", [0.0, -1e-8, math.nan, math.inf]),
        ("max_norm", [-1.0, math.nan, math.inf]),
        ("max_loss_z", [-1.0, math.nan]),
        ("max_norm_z", [-1.0, math.nan]),
        ("seed", [-1, 2**32]),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(name, values):
    for value in values:
        with pytest.raises(UsageError) as refused:
            RunConfig(**{name: value})
        message = str(refused.value)
        assert any(flag in message.split() for flag in (RunConfig.flag(name), f"({RunConfig.flag(name)})"))
        assert str(value) in message


def test_one_fault_is_told_once():
    """NaN is neither in range nor finite: one line says so."""
    with pytest.raises(UsageError) as refused:
        RunConfig(lr=math.nan)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"B": 4, "T": 16, "total_batch": 96}, ["-d 96", "-b 4", "-t 16", "-d 128"]),
        ({"B": 4, "T": 16, "total_batch": 1}, ["-d 1", "-d 64"]),
        ({"resume": True}, ["-y", "-o"]),
        ({"checkpoint_every": 5}, ["-n 5", "-o"]),
        ({"keep_checkpoints": 2, "out_dir": "o"}, ["-nk", "-n"]),
        ({"keep_checkpoints": 2, "keep_major": 5, "out_dir": "o"}, ["-nm", "-n"]),
        ({"keep_major": 5, "checkpoint_every": 5, "out_dir": "o"}, ["-nm", "-nk"]),
    ],
)
def test_options_that_contradict_each_other_are_refused_together(options, flags):
    with pytest.raises(UsageError) as refused:
        RunConfig(**options)
    for flag in flags:
        assert flag in str(refused.value)


@pytest.mark.parametrize("warmup", [5, 6])
def test_a_run_may_end_before_its_warm_up_does(warmup):
    assert RunConfig(steps=5, warmup=warmup).warmup == warmup


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"hellaswag": True}, "-h"),
        ({"gpu_log_every": 1}, "-lg"),
        ({"num_processes": 2}, "-pn"),
        ({"process_rank": 1}, "-pr"),
        ({"init_method": "fs"}, "-pi"),
        ({"init_method": "tcp"}, "-pi"),
        ({"server_ip": "10.0.0.1"}, "-ps"),
        ({"fs_path": "/shared"}, "-pf"),
    ],
)
def test_what_does_not_exist_yet_is_refused_and_never_ignored(options, flag):
    with pytest.raises(UsageError, match="later version") as refused:
        RunConfig(**options)
    assert flag in str(refused.value)


@pytest.mark.parametrize("n", [0, -1])
def test_no_processes_is_not_a_feature_to_come(n):
    with pytest.raises(UsageError, match="-pn") as refused:
        RunConfig(num_processes=n)
    assert "later version" not in str(refused.value)


def test_all_faults_are_told_at_once():
    with pytest.raises(UsageError) as refused:
        RunConfig(B=0, lr=-1.0, resume=True, hellaswag=True)
    for flag in ("-b", "-l", "-y", "-h"):
        assert any(
            line.removeprefix("usage error (exit 2): ").startswith(flag) for line in str(refused.value).split("\n")
        )


@pytest.mark.parametrize(("B", "total_batch", "accumulation"), [(4, -1, 1), (4, 64, 1), (2, 64, 2), (1, 64, 4)])
def test_accumulation(B, total_batch, accumulation):
    run = RunConfig(B=B, T=16, total_batch=total_batch)
    assert (run.accumulation(1), run.samples_per_step(1)) == (accumulation, accumulation * B)
    assert run.accumulates(1) == (accumulation > 1)


@pytest.mark.parametrize(
    ("options", "world", "accumulates"),
    [
        ({"lanes": 4}, 1, False),
        ({"lanes": 2}, 1, True),
        ({"lanes": 2}, 2, True),
        ({"lanes": 4}, 2, False),
        ({}, 4, False),
        ({"zero_stage": 1}, 2, True),
        ({"zero_stage": 2}, 1, True),
        ({"zero_stage": 2}, 2, False),
    ],
)
def test_gradients_accumulate_where_a_lane_has_several_micro_batches_that_stay(options, world, accumulates):
    """Four micro-batches in a step, of all ranks."""
    assert RunConfig(B=1, T=16, total_batch=64, **options).accumulates(world) == accumulates
