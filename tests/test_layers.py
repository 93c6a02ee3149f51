"""Linear, Embedding and LayerNorm: the contract, the derivative, and torch.nn's under the name."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npformer.layers import Embedding, LayerNorm, Linear
from npformer.testing import as_op, gradient_check
from npformer.testing.conformance import (
    Example,
    check_contract,
    check_gradient,
    check_peer,
    check_twin,
    randomise,
)
from npformer.testing.strategies import (
    layouts,
    leading_axes,
    random_like,
    seeds,
    sizes,
    token_batches,
)


@st.composite
def linears(draw):
    leading, (n_in, n_out), seed = draw(leading_axes()), draw(sizes("IO")), draw(seeds)
    x = draw(layouts(random_like((*leading, n_in), np.float64, seed)))
    return Example(
        lambda dtype: randomise(
            Linear(n_in, n_out, rng=np.random.default_rng(seed), dtype=dtype), seed
        ),
        lambda: torch.nn.Linear(n_in, n_out),
        (x,),
        n_summed=n_in + n_out + x.size,
    )


@st.composite
def embeddings(draw):
    shape, (V, C), seed = draw(leading_axes()), draw(sizes("VC")), draw(seeds)
    padding_idx = draw(st.integers(0, V - 1))
    ids = draw(token_batches(shape, V, padding_idx))
    return Example(
        lambda dtype: Embedding(V, C, padding_idx, rng=np.random.default_rng(seed), dtype=dtype),
        lambda: LongIds(V, C, padding_idx=padding_idx),
        (ids,),
        n_summed=ids.size,
    )


class LongIds(torch.nn.Embedding):
    """torch takes int32 and int64; NumPy's ids may have any integer type."""

    def forward(self, ids):
        return super().forward(ids.long())


@st.composite
def layer_norms(draw):
    leading, (C,), seed = draw(leading_axes()), draw(sizes("C")), draw(seeds)
    eps = draw(st.sampled_from([1e-5, 1e-2]))
    x = draw(layouts(random_like((*leading, C), np.float64, seed)))
    return Example(
        lambda dtype: randomise(LayerNorm(C, eps, dtype=dtype), seed),
        lambda: torch.nn.LayerNorm(C, eps),
        (x,),
        n_summed=4 * C + x.size,
    )


layers = linears() | embeddings() | layer_norms()
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@each_dtype
@given(example=layers)
def test_contract(example, dtype):
    check_contract(example, dtype)


@given(linears() | layer_norms())
def test_gradient_is_the_derivative(example):
    check_gradient(example)


@given(layers)
def test_agrees_with_torch(example):
    check_twin(example)


@given(layers)
def test_float32_is_as_exact_as_torch(example):
    check_peer(example)


# --- Where the weights start ------------------------------------------------------------------


def test_linear_starts_xavier_uniform_and_without_bias():
    linear = Linear(300, 200, rng=np.random.default_rng(0))
    weight, bound = linear.weight.data, np.sqrt(6 / 500)
    assert weight.shape == (200, 300)
    assert abs(weight).max() <= bound
    # 60 000 draws: the variance of a uniform is bound²/3, known to 4 standard errors of 0.4 %.
    assert abs(weight.var() / (bound**2 / 3) - 1) < 4 * np.sqrt(0.8 / weight.size)
    assert not linear.bias.data.any()


def test_embedding_starts_normal_with_a_zero_pad_row():
    weight = Embedding(1000, 40, 7, rng=np.random.default_rng(0)).weight.data
    assert not weight[7].any()
    drawn = np.delete(weight, 7, axis=0)
    assert abs(drawn.var() * 40 - 1) < 4 * np.sqrt(2 / drawn.size)  # of a normal: 2 / n


def test_layer_norm_starts_as_the_identity_of_what_is_normal_already():
    norm = LayerNorm(3)
    np.testing.assert_array_equal(norm.weight.data, [1, 1, 1])
    np.testing.assert_array_equal(norm.bias.data, [0, 0, 0])


# --- One table, used twice --------------------------------------------------------------------


class TiedTable(Embedding):
    """Reads a table and asks it for logits, as a model with a tied head does."""

    def forward(self, ids):
        y, backward_embedding = super().forward(ids)
        logits, backward_head = self.as_head(y)
        return logits, lambda dlogits: backward_embedding(backward_head(dlogits))


def test_a_table_read_both_ways_collects_both_gradients():
    rng = np.random.default_rng(0)
    table, ids = TiedTable(5, 3, 0, rng=rng, dtype=np.float64), np.array([[1, 4, 4], [2, 1, 3]])
    # The pad row has logits, but no gradient: it is left out of the difference quotient as well.
    rows = np.arange(1, 5)
    op = as_op(table)

    def of_the_rows(weight):
        logits, backward = op(ids, np.concatenate([np.zeros((1, 3)), weight]))

        def backward_rows(dlogits):
            (dweight,) = backward(dlogits)
            assert not dweight[0].any(), "the pad row has a gradient"
            return dweight[rows]

        return logits, backward_rows

    gradient_check("tied table", of_the_rows, table.weight.data[rows])


def test_as_head_may_go_backward_twice():
    rng = np.random.default_rng(0)
    table, x = Embedding(5, 3, 2, rng=rng), random_like((2, 4, 3), np.float32, 0)
    _, backward = table.as_head(x)
    dlogits = random_like((2, 4, 5), np.float32, 1)
    dx = backward(dlogits)
    first = table.weight.grad.copy()
    np.testing.assert_array_equal(backward(dlogits), dx)
    np.testing.assert_array_equal(table.weight.grad, 2 * first)
    assert first[[0, 1, 3, 4]].all()
    assert not first[2].any()
