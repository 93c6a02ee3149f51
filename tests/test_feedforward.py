"""The feed-forward network: the contract, the derivative, the twin, each activation by its name."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import torchformer
from npformer.feedforward import ACTIVATIONS, FeedForward
from npformer.testing.conformance import (
    Example,
    check_contract,
    check_gradient,
    check_peer,
    check_twin,
    randomise,
)
from npformer.testing.strategies import layouts, leading_axes, random_like, seeds, sizes

KINK = 1e-3  # no input of relu is nearer to 0, and a difference quotient moves it by some 1e-5


@st.composite
def feed_forwards(draw):
    leading, (C, F), seed = draw(leading_axes()), draw(sizes("CF")), draw(seeds)
    activation = draw(st.sampled_from(sorted(ACTIVATIONS)))
    x = draw(layouts(random_like((*leading, C), np.float64, seed)))

    def make(dtype):
        rng = np.random.default_rng(seed)
        return randomise(FeedForward(C, F, activation, rng=rng, dtype=dtype), seed)

    if activation == "relu":
        assume(abs(make(np.float64).linear1(x)[0]).min() > KINK)
    return Example(
        make,
        lambda: torchformer.FeedForward(C, F, activation),
        (x,),
        n_summed=C + F + x.size,
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(example=feed_forwards())
def test_contract(example, dtype):
    check_contract(example, dtype)


@given(feed_forwards())
def test_gradient_is_the_derivative(example):
    check_gradient(example)


@given(feed_forwards())
def test_agrees_with_the_twin(example):
    check_twin(example)


@given(feed_forwards())
def test_float32_is_as_exact_as_the_twin(example):
    check_peer(example)


def test_both_twins_know_the_same_activations():
    assert list(ACTIVATIONS) == list(torchformer.feedforward.ACTIVATIONS)


def test_the_three_activations_are_three():
    x = random_like((4, 5), np.float64, 0)
    outputs = [
        FeedForward(5, 7, name, rng=np.random.default_rng(0), dtype=np.float64)(x)[0]
        for name in ACTIVATIONS
    ]
    assert len({y.tobytes() for y in outputs}) == len(ACTIVATIONS)


def test_each_position_is_by_itself():
    x = random_like((2, 3, 5), np.float64, 0)
    network = FeedForward(5, 7, rng=np.random.default_rng(0), dtype=np.float64)
    y, _ = network(x)
    eps = float(np.finfo(np.float64).eps)
    for b in range(2):
        for t in range(3):  # BLAS may add the products of one row in another order
            alone, _ = network(x[b, t])
            assert abs(alone - y[b, t]).max() <= 12 * eps * abs(y).max()
