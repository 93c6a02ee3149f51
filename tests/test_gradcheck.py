"""The check is checked: the wrong gradients that people really write must not pass it."""

import numpy as np
import pytest

from npformer import ops
from npformer.layers import Embedding, LayerNorm, Linear
from npformer.module import Module
from npformer.testing import as_op, gradient_check

rng = np.random.default_rng(0)
x, weight, bias = rng.standard_normal((3, 5)), rng.standard_normal(5), rng.standard_normal(5)
q, k, v = (rng.standard_normal(shape) for shape in ((3, 4), (5, 4), (5, 6)))


def wrong(name, op, *inputs, names):
    """It is refused, with the name of the op and of the wrong inputs, and of no right one."""
    with pytest.raises(AssertionError, match=f"^{name}: ") as failure:
        gradient_check(name, op, *inputs)
    text = str(failure.value).split("wrong for")[1]
    for wrong_name in names:
        assert f"{wrong_name} (" in text
    assert text.count("(") == 2 * len(names)


# --- Right gradients pass ---------------------------------------------------------------------


def test_right_gradients_are_within_rounding():
    assert gradient_check("layer_norm", ops.layer_norm, x, weight, bias) < 2
    assert gradient_check("attention", ops.attention, q, k, v) < 2


def test_ids_and_masks_are_not_moved():
    targets, mask = np.array([0, 4, 1]), np.eye(3, 5) == 0
    assert gradient_check("cross_entropy", ops.cross_entropy, x, targets) < 2
    assert gradient_check("softmax", ops.softmax, x, mask) < 2


def test_float32_is_refused():
    with pytest.raises(TypeError, match="input 0 of relu is float32"):
        gradient_check("relu", ops.relu, x.astype(np.float32))


# --- Wrong gradients do not -------------------------------------------------------------------


def test_layer_norm_with_gamma_outside_the_means():
    def layer_norm(x, weight, bias):
        y, backward_norm = ops.layer_norm(x, np.ones_like(weight), bias)
        xhat = y - bias

        def backward(dy):
            dx, _, dbias = backward_norm(dy)
            return dx * weight, (dy * xhat).sum(axis=0), dbias

        return weight * xhat + bias, backward

    wrong("layer_norm", layer_norm, x, weight, bias, names=["x"])
    gradient_check("layer_norm", layer_norm, x, np.ones(5), bias)  # which is why gamma must vary


def test_softmax_without_the_inner_product():
    def softmax(x):
        y, _ = ops.softmax(x)
        return y, lambda dy: y * (1 - y) * dy  # the diagonal of the Jacobian alone

    wrong("softmax", softmax, x, names=["x"])


def test_softmax_divided_by_the_batch():
    def softmax(x):
        y, backward_softmax = ops.softmax(x)
        return y, lambda dy: backward_softmax(dy) / len(x)

    wrong("softmax", softmax, x, names=["x"])


def test_attention_without_the_scale_in_its_gradient():
    def attention(q, k, v):
        y, backward_attention = ops.attention(q, k, v)

        def backward(dy):
            dq, dk, dv = backward_attention(dy)
            return dq * 2, dk * 2, dv  # √D = 2

        return y, backward

    wrong("attention", attention, q, k, v, names=["q", "k"])


def test_values_multiplied_by_the_weights_before_dropout():
    def attention(q, k, v):
        weights, backward_weights = ops.attention_weights(q, k)
        dropped, backward_dropout = ops.dropout(weights, 0.5, np.random.default_rng(1))

        def backward(dy):
            return *backward_weights(backward_dropout(dy @ v.T)), weights.T @ dy

        return dropped @ v, backward

    wrong("attention", attention, q, k, v, names=["v"])


def test_a_bias_gradient_averaged_over_the_batch():
    def linear(x, weight, bias):
        y, backward_linear = ops.linear(x, weight, bias)

        def backward(dy):
            dx, dweight, dbias = backward_linear(dy)
            return dx, dweight, dbias / len(x)

        return y, backward

    wrong("linear", linear, q, v.T[:, :4], v[0], names=["bias"])


def test_a_missing_and_a_transposed_gradient():
    with pytest.raises(AssertionError, match=r"gradients of shapes \[\(3, 4\)\] for inputs of"):
        gradient_check("linear", lambda x, w: (x @ w.T, lambda dy: dy @ w), q, k)
    with pytest.raises(AssertionError, match=r"gradients of shapes \[\(3, 4\), \(4, 5\)\]"):
        gradient_check("linear", lambda x, w: (x @ w.T, lambda dy: (dy @ w, q.T @ dy)), q, k)


# --- Modules ----------------------------------------------------------------------------------


def test_a_module_is_an_op_of_its_inputs_and_parameters():
    linear = Linear(4, 3, rng=rng, dtype=np.float64)
    data = [p.data for p in linear.parameters()]
    linear.weight.grad += 1
    op = as_op(linear)
    gradient_check("Linear", op, q, *(2 * p for p in data))
    assert linear.weight.data is data[0]  # left as it was found
    assert (linear.weight.grad == 1).all()
    _, backward = op(q, *data)
    dy = rng.standard_normal((3, 3))
    for first, again in zip(backward(dy), backward(dy), strict=True):
        np.testing.assert_array_equal(first, again)


def test_ids_of_a_module_have_no_gradient():
    embedding = Embedding(5, 3, padding_idx=0, rng=rng, dtype=np.float64)
    gradient_check("Embedding", as_op(embedding), np.array([[1, 4, 1]]), embedding.weight.data)


class DroppedNorm(Module):
    def __init__(self, forgets_dropout=False):
        self.norm = LayerNorm(5, dtype=np.float64)
        self.forgets_dropout = forgets_dropout

    def forward(self, x, rng=None):
        dropped, backward_dropout = ops.dropout(x, 0.5, rng)
        y, backward_norm = self.norm(dropped)

        def backward(dy):
            dx = backward_norm(dy)
            return dx if self.forgets_dropout else backward_dropout(dx)

        return y, backward


def test_a_module_drops_the_same_entries_in_every_call():
    parameters = [weight, bias]
    op = as_op(DroppedNorm(), rng=np.random.default_rng(1))
    gradient_check("DroppedNorm", op, x, *parameters)
    forgetful = as_op(DroppedNorm(forgets_dropout=True), rng=np.random.default_rng(1))
    wrong("DroppedNorm", forgetful, x, *parameters, names=["input 0"])


def test_state_kept_on_a_module_is_found():
    """A cache on self belongs to the last forward, not to the one that backward is asked about."""

    class Square(Module):
        def forward(self, x):
            self.x = x
            return x * x, lambda dy: 2 * self.x * dy

    # Moved by h to either side, x is off by h = 6e-6 at most: only rounding is smaller than that.
    wrong("Square", Square(), x, names=["input 0"])
