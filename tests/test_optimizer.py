"""Schedules against their formulas, who decays, a textbook AdamW, and a bad step that leaves no trace."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from engine import device, ops, training
from engine.arena import Arena, Tensor
from engine.comm.one import OneRank
from engine.config import GPT2Config, RunConfig
from engine.models.gpt2 import decayed, parameter_table, parameter_tensors
from engine.optimizer import AdamW, _decay_segments, learning_rate
from engine.zero import Zero

CONFIG = GPT2Config(maxT=7, V=11, L=3, NH=2, C=6)
NUMPY, OPS = device.load("numpy"), ops.load("numpy")
SCHEDULES = ("cosine", "linear", "constant", "wsd")


def rates(steps: int, **options) -> list[float]:
    run = RunConfig(**options)
    return [learning_rate(step, steps, run) for step in range(steps)]


def make(seed: int = 0, dtype=np.float32, **options) -> tuple[AdamW, Arena, Arena]:
    """An optimizer over random parameters, with its parameters and gradients."""
    params, grads = (Arena(parameter_tensors(CONFIG, dtype), NUMPY.zeros) for _ in range(2))
    rng = np.random.default_rng(seed)
    for arena in (params, grads):
        for view in arena.views.values():
            view[...] = rng.normal(size=view.shape)
    zero = Zero(OneRank(), params, [grads], 0, OPS, NUMPY)
    optimizer = AdamW(params, decayed(CONFIG), zero, RunConfig(**options), OPS, NUMPY, dtype)
    return optimizer, params, grads


def snapshot(optimizer: AdamW, params: Arena) -> dict[str, bytes]:
    arrays = {f"params.{name}": view for name, view in params.views.items()} | optimizer.state()
    return {name: array.tobytes() for name, array in arrays.items()}


# --- schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak_with_its_last_step(schedule):
    found = rates(20, schedule=schedule, lr=1.0, warmup=4, final_lr=0.1)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_shorter_than_its_warm_up_only_warms_up(schedule):
    assert rates(3, schedule=schedule, lr=1.0, warmup=4, final_lr=0.1) == [0.25, 0.5, 0.75]


def test_cosine_by_hand():
    """10 steps, 2 of warm-up, down to a tenth: 0.1 + 0.9 (1 + cos(pi r)) / 2 at r = 0, 1/4, 1/2."""
    found = rates(10, schedule="cosine", lr=1.0, warmup=2, final_lr=0.1)
    assert found[2] == 1.0
    assert found[4] == pytest.approx(0.55 + 0.45 * math.sqrt(0.5), rel=1e-14)
    assert found[6] == pytest.approx(0.55, rel=1e-14)
    assert found[8] == pytest.approx(0.55 - 0.45 * math.sqrt(0.5), rel=1e-14)


def test_linear_by_hand():
    found = rates(10, schedule="linear", lr=2.0, warmup=2, final_lr=0.25)
    assert found[2:] == pytest.approx([0.5 + 1.5 * (8 - i) / 8 for i in range(8)], rel=1e-14)


def test_constant_stays_at_the_peak_after_the_warm_up_whatever_the_end():
    assert rates(6, schedule="constant", lr=3.0, warmup=2, final_lr=0.0) == [1.5, 3.0, 3.0, 3.0, 3.0, 3.0]


def test_wsd_by_hand():
    """Of 20 steps, 16 at the peak; then 1 - sqrt(r) at r = 0, 1/4, 1/2, 3/4."""
    found = rates(20, schedule="wsd", lr=1.0, final_lr=0.2)
    assert found[:16] == [1.0] * 16
    assert found[16:] == pytest.approx([0.2 + 0.8 * (1 - math.sqrt(r)) for r in (0, 0.25, 0.5, 0.75)], rel=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("final_lr", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (7, 0), (100, 10), (100, 95), (5, 5)])
def test_every_schedule_stays_between_its_ends_and_never_rises_again(schedule, final_lr, steps, warmup):
    found = rates(steps, schedule=schedule, lr=1e-3, warmup=warmup, final_lr=final_lr)
    assert max(found) == 1e-3
    after = found[max(0, warmup - 1) :]
    assert all(later <= earlier * (1 + 1e-15) for earlier, later in pairwise(after))
    assert min(after) >= final_lr * 1e-3 * (1 - 1e-15)
    if final_lr == 1.0:
        assert after == pytest.approx([1e-3] * len(after), rel=1e-15)


# --- weight decay


def test_segments_cover_the_flat_buffer_exactly_once():
    params = Arena(parameter_tensors(CONFIG, np.float32), NUMPY.zeros)
    covered = np.zeros(params.flat.size, int)
    for span, _ in _decay_segments(params, decayed(CONFIG)):
        covered[span] += 1
    np.testing.assert_array_equal(covered, 1)


def test_segments_agree_with_the_table_and_are_few():
    params = Arena(parameter_tensors(CONFIG, np.float32), NUMPY.zeros)
    segments = list(_decay_segments(params, decayed(CONFIG)))
    decays = np.zeros(params.flat.size, bool)
    for span, count in segments:
        decays[span.start : span.start + count] = True
    for name, line, _ in parameter_table(CONFIG):
        assert (decays[params.spans()[name]] == line.decay).all(), name
    assert len(segments) == CONFIG.L


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_segments_of_any_order(first, names):
    """Alternating tensors, all, or none: there is no table whose first or last tensor is lost."""
    arena = Arena([Tensor(name, (3,), np.float32) for name in names], NUMPY.zeros)
    for flags in ({names[::2]}, set(names), set()):
        chosen = {name for flag in flags for name in flag}
        chosen = chosen if first else set(names) - chosen
        segments = list(_decay_segments(arena, chosen))
        assert [i for span, _ in segments for i in range(span.start, span.stop)] == list(range(arena.flat.size))
        for name, span in arena.spans().items():
            found = [span.start - s.start < count for s, count in segments if s.start <= span.start < s.stop]
            assert found == [name in chosen]


def test_matrices_decay_and_vectors_do_not():
    """Without gradients, AdamW multiplies by 1 - lr * weight_decay what decays, and nothing else."""
    optimizer, params, grads = make(dtype=np.float64, weight_decay=0.5)
    grads.flat.fill(0)
    before = {name: view.copy() for name, view in params.views.items()}
    optimizer.step(1, 0.25, np.array(1.0))
    for name, line, _ in parameter_table(CONFIG):
        is_matrix = params.views[name].ndim == 2
        assert is_matrix == line.decay
        factor = 1 - 0.25 * 0.5 if is_matrix else 1.0
        np.testing.assert_allclose(params.views[name], before[name] * factor, rtol=1e-15, err_msg=name)


# --- a step


def test_ten_steps_are_those_of_the_textbook():
    """Loshchilov and Hutter's algorithm 2, tensor by tensor, with clipping to a global norm of 1."""
    options = {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "max_norm": 1.0}
    optimizer, params, grads = make(dtype=np.float64, **options)
    rng = np.random.default_rng(7)
    x = {name: view.copy() for name, view in params.views.items()}
    m = {name: np.zeros_like(view) for name, view in x.items()}
    v = {name: np.zeros_like(view) for name, view in x.items()}
    decays = decayed(CONFIG)
    for t in range(1, 11):
        for view in grads.views.values():
            view[...] = rng.normal(size=view.shape)
        optimizer.step(t, 1e-2, np.array(1.0))
        norm = math.sqrt(sum((view**2).sum() for view in grads.views.values()))
        for name, view in grads.views.items():
            g = view / norm  # far above 1
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g**2
            update = (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-6)
            x[name] = x[name] - 1e-2 * (update + (0.1 * x[name] if name in decays else 0))
    for name, view in params.views.items():
        np.testing.assert_allclose(view, x[name], rtol=1e-11, atol=1e-13, err_msg=name)
    assert float(optimizer.decision.norm) == pytest.approx(norm, rel=1e-14)


def test_without_a_clip_the_gradient_counts_as_it_is():
    """The first moment after one step is (1 - beta1) times the gradient, clipped or not."""
    for max_norm, clipped in ((0.0, False), (1.0, True), (1e9, False)):
        optimizer, _, grads = make(dtype=np.float64, max_norm=max_norm)
        optimizer.step(1, 1e-3, np.array(1.0))
        scale = 1 / float(optimizer.decision.norm) if clipped else 1.0
        np.testing.assert_allclose(optimizer.m, 0.1 * scale * grads.flat, rtol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_leaves_every_bit_and_training_goes_on(value, where):
    optimizer, params, grads = make()
    optimizer.step(1, 1e-3, np.array(2.0))
    before = snapshot(optimizer, params)
    loss, good = np.array(2.0), grads.views["h.1.fcw"][0, 0]
    if where == "loss":
        loss = np.array(value)
    else:
        grads.views["h.1.fcw"][0, 0] = value
    optimizer.step(2, 1e-3, loss)
    assert optimizer.decision.skip
    after = snapshot(optimizer, params)
    windows = {"loss_window", "norm_window"}  # a finite loss beside a bad gradient counts, so these may move
    assert {k: b for k, b in after.items() if k not in windows} == {k: b for k, b in before.items() if k not in windows}
    assert np.isfinite(optimizer.state()["loss_window"]).all()
    assert np.isfinite(optimizer.state()["norm_window"]).all()

    grads.views["h.1.fcw"][0, 0] = good
    optimizer.step(3, 1e-3, np.array(2.0))
    assert not optimizer.decision.skip
    assert np.isfinite(params.flat).all()
    assert params.views["wte"].tobytes() != before["params.wte"]


@pytest.mark.parametrize("limit", ["max_loss_z", "max_norm_z"])
def test_an_outlier_is_skipped_once_the_window_is_full(limit):
    optimizer, params, grads = make(**{limit: 5.0})
    rng = np.random.default_rng(3)
    gradient = grads.flat.copy()
    t = 0

    def step(spike: float) -> bool:
        """A usual step, but for what the limit watches, which is spike times as large."""
        nonlocal t
        t += 1
        loss, scale = 1 + 0.01 * rng.normal(), 1 + 0.01 * rng.normal()
        grads.flat[...] = gradient * (scale * (spike if limit == "max_norm_z" else 1))
        optimizer.step(t, 1e-3, np.array(loss * (spike if limit == "max_loss_z" else 1)))
        return bool(optimizer.decision.skip)

    assert not step(10.0)  # nothing to compare with yet
    assert not any(step(1.0) for _ in range(OPS.guard.WINDOW))
    before = params.flat.tobytes()
    assert step(10.0)
    assert params.flat.tobytes() == before
    assert not step(1.0)
    assert params.flat.tobytes() != before


def test_state_names_everything_that_the_next_step_depends_on():
    """An optimizer given another's state and parameters goes on with the same bits."""
    first, params, grads = make()
    second, other_params, other_grads = make(seed=1)
    for t in range(1, 4):
        first.step(t, 1e-3, np.array(float(t)))
    other_params.flat[...] = params.flat
    other_grads.flat[...] = grads.flat
    second.restore(first.state())
    for optimizer in (first, second):
        optimizer.step(4, 1e-3, np.array(4.0))
    assert snapshot(first, params) == snapshot(second, other_params)


@pytest.mark.parametrize("stage", [0, 1])
def test_the_squares_are_added_up_in_one_order_whoever_has_them(stage):
    """By the lanes' rule, that they give the same bits on any number of ranks."""
    lanes, config = 4, GPT2Config(L=2, C=8, NH=2, V=30, maxT=4)
    tensors = parameter_tensors(config, np.float32)

    class Rank(OneRank):
        def __init__(self, rank, world, everyones):
            self.rank, self.world, self.everyones = rank, world, everyones

        def gather(self, values):
            self.everyones[self.rank] = values.copy()
            return np.stack(self.everyones)

    def addends(world):
        found, everyones = [], [np.zeros(lanes // world * (config.L + 1))] * world
        operations = SimpleNamespace(
            norm=OPS.norm, scalars=SimpleNamespace(total=lambda out, parts: found.append(parts.copy()))
        )
        for rank in [*range(world), 0]:  # the first again: now it knows what the others have
            arenas = [Arena(tensors, NUMPY.zeros, lanes) for _ in range(lanes // world)]
            arenas[0].flat[:] = np.random.default_rng(0).standard_normal(arenas[0].flat.size)
            zero = Zero(Rank(rank, world, everyones), arenas[0], arenas, stage, operations, NUMPY)
            zero.norm_squared(np.zeros(()))
        return found[-1]

    one = addends(1)
    assert len(set(one)) == lanes * (config.L + 1)
    for world in (2, 4):
        np.testing.assert_array_equal(addends(world), one)


@pytest.mark.parametrize(("late", "exchanged"), [(False, [*range(1, 14)]), (True, [*[0] * 9, 10, 11, 12, 13])])
def test_late_gradients_travel_once_a_quarter_is_missing(late, exchanged):
    params = Arena(parameter_tensors(GPT2Config(L=12, C=4, NH=1, V=16, maxT=4), np.float32), NUMPY.zeros)
    zero = Zero(OneRank(), params, [params], 1, OPS, NUMPY, late=late)
    seen = []
    zero.reduce = seen.append
    for _ in range(2):  # steps
        seen.clear()
        zero.when_ready(first=True, last=False)(12)
        ready, counts = zero.when_ready(first=False, last=True), []
        for bucket in reversed(range(13)):
            ready(bucket)
            counts.append(len(seen))
        assert counts == exchanged
        assert seen == [*reversed(range(13))]


@pytest.mark.parametrize(
    ("B", "on_this_machine", "late"), [(1024, 2, True), (1023, 2, False), (1024, 1, False)], ids=str
)
def test_gradients_travel_late_where_micro_batches_are_large_and_links_are_fast(B, on_this_machine, late, monkeypatch):
    """Two ranks, sequences of 16 tokens."""
    seen = []
    monkeypatch.setattr(training, "Zero", lambda *args, late, **options: seen.append(late) or Zero(*args, **options))
    comm = OneRank()
    comm.world, comm.local_world = 2, on_this_machine
    config = GPT2Config(L=1, C=4, NH=1, V=16, maxT=16)
    training.assemble(RunConfig(B=B, T=16, zero_stage=1), comm, config, NUMPY, OPS)
    assert seen == [late]
