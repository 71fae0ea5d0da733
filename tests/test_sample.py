"""Generation depends on the seed, the step and the text so far, and on nothing else."""

import numpy as np
import pytest

from engine import device, ops
from engine.config import GPT2Config
from engine.models.gpt2 import GPT2, parameter_table
from engine.sample import PADDING, generate

CONFIG = GPT2Config(maxT=80, V=50, L=2, NH=2, C=16)
NUMPY = device.load("numpy")
T = 80  # more than the padding, and no multiple of it
assert PADDING < T < 2 * PADDING


def make(B: int = 1, T: int = T) -> GPT2:
    """A model whose next token depends on all that it sees, and where: without much bias for any."""
    model = GPT2(CONFIG, ops.load("numpy"), NUMPY, B=B, T=T, dtype=np.float64, statistic_dtype=np.float64)
    rng = np.random.default_rng(0)
    for name, line, _ in parameter_table(CONFIG):
        view = model.params.views[name]
        view[...] = rng.normal(1.0 if line.init == "1" else 0.0, 1.0, view.shape)
    model.params.views["lnfb"][...] = 0
    model.params.views["wpe"][...] *= 3
    model.params.views["wte"][CONFIG.V :] = 0
    return model


def write(model: GPT2, prompt=(1,), count=10, *, T=T, seed=3, step=5, temperature=1.0) -> list[int]:
    return generate(model, NUMPY, list(prompt), count, T=T, seed=seed, step=step, temperature=temperature)


def unpadded(prompt: list[int], count: int, T: int) -> list[int]:
    """The most likely tokens, from a model that is given each context at its own length."""
    context = list(prompt)
    for _ in range(count):
        window = np.array([context[-T:]], np.int32)
        logits = make(T=window.shape[1]).forward(window)
        context.append(int(logits[0, -1, : CONFIG.V].argmax()))
    return context[len(prompt) :]


def test_the_same_seed_and_step_draw_the_same_text():
    assert write(make()) == write(make())


def test_what_was_computed_before_leaves_no_trace():
    """The model's memory is that of training, and full of it."""
    model = make(B=3)
    fresh = write(model)
    tokens = np.random.default_rng(1).integers(0, CONFIG.V, (3, T)).astype(np.int32)
    model.forward(tokens)
    model.backward(tokens, tokens, 1.0, accumulate=False)
    assert write(model) == fresh


def test_another_seed_or_step_draws_another_text():
    texts = {tuple(write(make(), count=30, seed=seed, step=step)) for seed in (3, 4) for step in (5, 6)}
    assert len(texts) == 4


def test_a_shorter_text_is_the_beginning_of_a_longer_one():
    assert write(make(), count=20)[:7] == write(make(), count=7)


@pytest.mark.parametrize("length", [1, 5, PADDING - 1, PADDING, PADDING + 1, T - 1, T])
def test_padding_changes_nothing(length):
    prompt = np.random.default_rng(length).integers(0, CONFIG.V, length).tolist()
    assert write(make(), prompt, 3, temperature=0) == unpadded(prompt, 3, T)


@pytest.mark.parametrize("window", [1, 4, 9])
def test_the_window_slides_when_the_text_is_longer_than_the_model_sees(window):
    model = make(T=window)
    prompt = [7, 3, 9]
    found = write(model, prompt, 15, T=window, temperature=0)
    assert found == unpadded(prompt, 15, window)
    assert len(found) == 15


def test_the_window_matters():
    """Or the test above would prove nothing."""
    prompt = [7, 3, 9]
    assert unpadded(prompt, 15, 1) != unpadded(prompt, 15, 9)


def test_a_prompt_longer_than_the_window_counts_by_its_end():
    prompt = np.random.default_rng(2).integers(0, CONFIG.V, 2 * T).tolist()
    assert write(make(), prompt) == write(make(), prompt[-T:])


def test_the_prompt_is_not_part_of_the_text_and_stays_as_it_is():
    prompt = [1, 2, 3]
    assert len(generate(make(), NUMPY, prompt, 4, T=T, seed=0, step=0, temperature=1.0)) == 4
    assert prompt == [1, 2, 3]


def test_no_token_beyond_the_vocabulary_is_drawn():
    """Hot enough that the 78 logits of the padding, all zero, would be drawn if they counted."""
    model = make()
    assert set(write(model, count=60, temperature=50.0)) <= set(range(CONFIG.V))


def test_draws_follow_the_model_s_probabilities():
    """4,000 first tokens, each count within five standard deviations of its expectation."""
    model, draws = make(T=1), 4000
    logits = model.forward(np.array([[1]], np.int32))[0, 0, : CONFIG.V].copy() / 2.0
    p = np.exp(logits - logits.max())
    p /= p.sum()
    found = [write(model, count=1, T=1, step=step, temperature=2.0)[0] for step in range(draws)]
    counts = np.bincount(found, minlength=CONFIG.V)
    assert (np.abs(counts - draws * p) <= 5 * np.sqrt(draws * p * (1 - p)) + 1).all()
    assert p.max() < 0.9  # or there would be nothing to see
