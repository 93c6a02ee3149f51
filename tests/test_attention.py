"""Multi-head attention: the contract, the derivative, the twin, and what heads and masks mean."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchformer
import torchformer.attention
from npformer.attention import MultiHeadAttention, merge_heads, split_heads
from npformer.testing.conformance import (
    Example,
    check_contract,
    check_gradient,
    check_peer,
    check_twin,
    numpy_step,
    randomise,
)
from npformer.testing.strategies import layouts, masks, random_like, seeds, sizes


@st.composite
def attentions(draw):
    B, T, S, H, D = draw(sizes("BTSHD", 5))
    C, seed, mask = H * D, draw(seeds), draw(masks((B, H), T, S))
    inputs = [random_like((B, n, C), np.float64, seed + i) for i, n in enumerate((T, S, S))]
    return Example(
        lambda dtype: randomise(
            MultiHeadAttention(C, H, rng=np.random.default_rng(seed), dtype=dtype), seed
        ),
        lambda: torchformer.MultiHeadAttention(C, H),
        tuple(draw(layouts(x)) for x in inputs),
        {"mask": mask},
        n_summed=2 * C + D + S + B * T,
    )


each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@each_dtype
@given(example=attentions())
def test_contract(example, dtype):
    check_contract(example, dtype)


@given(attentions())
def test_gradient_is_the_derivative(example):
    check_gradient(example)


@given(attentions())
def test_agrees_with_the_twin(example):
    check_twin(example)


@given(attentions())
def test_float32_is_as_exact_as_the_twin(example):
    check_peer(example)


# --- What is 0 --------------------------------------------------------------------------------


@given(attentions())
def test_the_bias_of_the_keys_has_no_gradient(example):
    """It adds the same number to every score of a row, and softmax does not see that.

    What is left is the rounding of sums that cancel: some eps of what the keys' weights get.
    """
    gradients = numpy_step(example, np.float64)
    others = max(abs(gradients[f"{name}.weight"]).max() for name in ("q_proj", "k_proj", "v_proj"))
    eps = float(np.finfo(np.float64).eps)
    assert abs(gradients["k_proj.bias"]).max() <= example.n_summed * eps * others


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_query_without_any_key_gets_the_output_bias_and_gives_no_gradient(dtype):
    rng = np.random.default_rng(0)
    attention = randomise(MultiHeadAttention(6, 2, rng=rng, dtype=dtype), 0)
    query, key = random_like((2, 3, 6), dtype, 1), random_like((2, 5, 6), dtype, 2)
    mask = np.full((2, 1, 3, 5), True)
    mask[0, 0, 1] = False
    y, backward = attention(query, key, key, mask)
    np.testing.assert_array_equal(y[0, 1], attention.out_proj.bias.data)
    dy = np.zeros_like(y)
    dy[0, 1] = 1
    for dx in backward(dy):
        assert not dx.any()
    for name, parameter in attention.named_parameters():
        assert parameter.grad.any() == (name == "out_proj.bias"), name


# --- Heads ------------------------------------------------------------------------------------


@given(sizes("BTHD"), seeds)
def test_split_and_merge_are_each_others_inverse(dims, seed):
    B, T, H, D = dims
    x = random_like((B, T, H * D), np.float64, seed)
    heads = split_heads(x, H)
    assert heads.shape == (B, H, T, D)
    np.testing.assert_array_equal(merge_heads(heads), x)
    for h in range(H):  # a head is a slice of the model width
        np.testing.assert_array_equal(heads[:, h], x[:, :, h * D : (h + 1) * D])
    y = random_like((B, H, T, D), np.float64, seed)
    np.testing.assert_array_equal(split_heads(merge_heads(y), H), y)
    # ... and backward: <dy, split(x)> = <merge(dy), x>, up to the order of the sum.
    magnitude = np.vdot(abs(y), abs(heads))
    difference = np.vdot(y, heads) - np.vdot(merge_heads(y), x)
    assert abs(difference) <= x.size * np.finfo(np.float64).eps * magnitude

    theirs = torchformer.attention.split_heads(torch.tensor(x.copy()), D)
    np.testing.assert_array_equal(theirs.numpy(), heads)
    np.testing.assert_array_equal(torchformer.attention.merge_heads(theirs).numpy(), x)


def test_dropout_happens_when_there_is_an_rng_and_a_probability():
    x = random_like((2, 3, 6), np.float64, 0)
    drops = MultiHeadAttention(6, 2, 0.5, rng=np.random.default_rng(0), dtype=np.float64)
    keeps = MultiHeadAttention(6, 2, 0.0, rng=np.random.default_rng(0), dtype=np.float64)
    y, _ = drops(x, x, x)
    np.testing.assert_array_equal(keeps(x, x, x, rng=np.random.default_rng(1))[0], y)
    assert (drops(x, x, x, rng=np.random.default_rng(1))[0] != y).any()


# --- What is refused --------------------------------------------------------------------------


def test_a_width_that_the_heads_cannot_share_is_refused_by_both_twins():
    with pytest.raises(ValueError, match="d_model=10 is not a multiple of n_heads=4"):
        MultiHeadAttention(10, 4, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="d_model=10 is not a multiple of n_heads=4"):
        torchformer.MultiHeadAttention(10, 4)


def bad_call(**changes):
    x = np.ones((2, 3, 6), np.float32)
    arguments = {"query": x, "key": x, "value": x, "mask": None} | changes
    attention = MultiHeadAttention(6, 2, rng=np.random.default_rng(0))
    return attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": np.ones((3, 6), np.float32)}, ValueError, r"query must be .*\(3, 6\).* x\[None"),
        ({"value": np.ones((1, 2, 3, 6), np.float32)}, ValueError, r"value must be \(B, T or S, C"),
        ({"key": np.ones((3, 6), np.float32)}, ValueError, r"key must be \(B, T or S, C"),
        (
            {"key": np.ones((2, 3, 5), np.float32)},
            ValueError,
            r"x must be \(\.\.\., I\) with I = 6",
        ),
        ({"query": np.ones((3, 3, 6), np.float32)}, ValueError, "the same leading axes"),
        ({"value": np.ones((2, 4, 6), np.float32)}, ValueError, "one value for every key"),
        ({"key": np.ones((2, 3, 6))}, TypeError, "mixed dtypes"),
        ({"mask": np.tril(np.ones((3, 3)))}, TypeError, "0s and 1s: pass mask == 1 if 1 means"),
        (
            {"mask": np.triu(np.full((3, 3), -np.inf), 1)},
            TypeError,
            r"float64, an additive mask \(0 and very negative numbers\): pass mask == 0",
        ),
        ({"mask": np.full((3, 4), True)}, ValueError, r"\(3, 4\) does not broadcast to \(B, H, T"),
        ({"mask": np.full((2, 3), True)}, ValueError, r"a padding mask is \(B, 1, 1, S\)"),
    ],
)
def test_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        bad_call(**changes)


def test_the_twin_refuses_a_mask_of_numbers():
    x, attention = torch.ones(2, 3, 6), torchformer.MultiHeadAttention(6, 2)
    with pytest.raises(TypeError, match=r"mask must be boolean, True = may attend, .* mask == 1"):
        attention(x, x, x, torch.ones(3, 3).tril())
