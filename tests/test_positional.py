"""Where a token stands: the table by a worked example, learned rows, offsets, and running out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchformer
import torchformer.positional
from npformer.positional import LearnedPositions, SinusoidalPositions, sinusoidal_table
from npformer.testing.conformance import (
    Example,
    check_contract,
    check_gradient,
    check_peer,
    check_twin,
)
from npformer.testing.strategies import layouts, random_like, seeds, sizes

EPS = float(np.finfo(np.float64).eps)


# --- The table --------------------------------------------------------------------------------


def test_worked_example():
    """C = 4: the frequencies are 10000^(-0/4) = 1 and 10000^(-2/4) = 1/100."""
    expected = [
        [0, 1, 0, 1],
        [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)],
        [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)],
    ]
    # The exponential, the product and the sine are each rounded; angles go up to 2.
    np.testing.assert_allclose(sinusoidal_table(3, 4), expected, rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("d_model", [1, 2, 5, 6, 7, 64])
def test_the_definition_entry_by_entry(d_model):
    n = 50
    table = sinusoidal_table(n, d_model)
    assert table.shape == (n, d_model)
    assert table.dtype == np.float64
    for t in range(n):
        for c in range(d_model):
            angle = t / 10000 ** (2 * (c // 2) / d_model)
            expected = math.cos(angle) if c % 2 else math.sin(angle)
            # exp(log) costs log(10000) eps of the angle, on either side.
            assert abs(table[t, c] - expected) <= 16 * EPS * max(angle, 1)


@pytest.mark.parametrize("d_model", [1, 5, 8])
def test_both_twins_have_one_table(d_model):
    theirs = torchformer.positional.sinusoidal_table(300, d_model)
    assert theirs.dtype == torch.float64
    np.testing.assert_allclose(
        sinusoidal_table(300, d_model), theirs.numpy(), rtol=0, atol=8 * EPS * 300
    )


def test_a_step_is_a_rotation():
    """PE[t + k] is PE[t] turned by an angle that depends on k alone: what § 3.5 is after."""
    table, k = sinusoidal_table(40, 6), 7
    for i in range(3):
        angle = k / 10000 ** (2 * i / 6)
        rotation = np.array(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        )
        pair = table[:, 2 * i : 2 * i + 2]
        np.testing.assert_allclose(pair[k:], pair[:-k] @ rotation.T, rtol=0, atol=16 * EPS * 40)


def test_the_table_is_no_parameter_and_is_cast_at_use():
    positions = SinusoidalPositions(9, 6)
    assert positions.state_dict() == {}
    x = np.zeros((1, 9, 6), np.float32)
    np.testing.assert_array_equal(positions(x)[0][0], sinusoidal_table(9, 6).astype(np.float32))
    twin = torchformer.SinusoidalPositions(9, 6)
    assert twin.state_dict() == {}
    # A round trip through a coarser dtype does not round the table.
    table = twin.bfloat16().double().table
    np.testing.assert_array_equal(table.numpy(), torchformer.SinusoidalPositions(9, 6).table)


# --- The modules ------------------------------------------------------------------------------


@st.composite
def positions(draw):
    B, T, C = draw(sizes("BTC"))
    offset, spare, seed = draw(st.integers(0, 4)), draw(st.integers(0, 3)), draw(seeds)
    max_len, learned = offset + T + spare, draw(st.booleans())

    def make(dtype):
        if learned:
            return LearnedPositions(max_len, C, rng=np.random.default_rng(seed), dtype=dtype)
        return SinusoidalPositions(max_len, C)

    twin = torchformer.LearnedPositions if learned else torchformer.SinusoidalPositions
    x = draw(layouts(random_like((B, T, C), np.float64, seed)))
    return Example(make, lambda: twin(max_len, C), (x,), {"offset": offset}, n_summed=B)


learned_positions = positions().filter(lambda e: e.make(np.float64).parameters())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(example=positions())
def test_contract(example, dtype):
    check_contract(example, dtype)


@given(learned_positions)
def test_gradient_is_the_derivative(example):
    check_gradient(example)


@given(positions())
def test_agrees_with_the_twin(example):
    check_twin(example)


@given(positions())
def test_float32_is_as_exact_as_the_twin(example):
    check_peer(example)


def make_both(kind, max_len, d_model):
    if kind == "sinusoidal":
        return (
            SinusoidalPositions(max_len, d_model),
            torchformer.SinusoidalPositions(max_len, d_model),
        )
    ours = LearnedPositions(max_len, d_model, rng=np.random.default_rng(0))
    return ours, torchformer.LearnedPositions(max_len, d_model)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_an_offset_continues_where_the_first_part_ended(kind):
    ours, _ = make_both(kind, 9, 6)
    x = random_like((2, 9, 6), np.float32, 0)
    whole, _ = ours(x)
    parts = [ours(x[:, :4])[0], ours(x[:, 4:], offset=4)[0]]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@pytest.mark.parametrize("twin", ["npformer", "torchformer"])
def test_running_out_of_positions_is_refused(kind, twin):
    ours, theirs = make_both(kind, 5, 6)
    module, x = (ours, np.ones((1, 5, 6), np.float32))
    if twin == "torchformer":
        module, x = theirs, torch.ones(1, 5, 6)
    module(x)
    with pytest.raises(ValueError, match=r"7 positions, the model has 5 \(max_len\)"):
        module(x, offset=2)
    with pytest.raises(ValueError, match="offset must be at least 0, got -1"):
        module(x, offset=-1)
