"""Every op against its contract, a difference quotient and torch; then what is special to each."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, target
from hypothesis import strategies as st

from npformer import compare, ops
from npformer.testing import gradient_check
from npformer.testing.op_cases import (
    OP_CASES,
    Example,
    OpCase,
    in_float64,
    random_example,
    torch_value_and_gradients,
)
from npformer.testing.strategies import INTEGERS, arrays, masks, random_like, seeds, sizes

each_op = pytest.mark.parametrize("case", OP_CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def as_tuple(gradients):
    return gradients if isinstance(gradients, tuple) else (gradients,)


# --- What every op promises -------------------------------------------------------------------


@each_op
@each_dtype
@given(data=st.data())
def test_contract(case: OpCase, dtype, data):
    """One gradient an array, in order; dtypes and shapes kept; nothing ever written to.

    All inputs are read-only, and so is here whatever was handed out: a write to any of it raises.
    """
    example = data.draw(case.examples(dtype))
    y, backward = case.op(*example.arrays, **example.options)
    assert y.dtype == dtype
    dy = random_like(y.shape, dtype, data.draw(seeds))
    lock(y)

    # An op is pure: a second forward, on other numbers, may precede the first backward.
    case.op(*(x / 2 for x in example.arrays), **example.options)
    gradients = as_tuple(backward(dy))
    assert [(dx.shape, dx.dtype) for dx in gradients] == [(x.shape, dtype) for x in example.arrays]
    lock(*gradients)
    for again in (backward(dy), case.op(*example.arrays, **example.options)[1](dy)):
        for dx, dx_again in zip(gradients, as_tuple(again), strict=True):
            np.testing.assert_array_equal(dx, dx_again)


def lock(*arrays):
    for x in arrays:
        if isinstance(x, np.ndarray):  # a 0-D result may be a scalar, which nobody can write to
            x.flags.writeable = False


@each_op
@given(data=st.data())
def test_gradient_is_the_derivative(case: OpCase, data):
    example = random_example(data.draw(case.examples(np.float64)), data.draw(seeds))
    options = {**example.options}
    if "padding_idx" in options:  # the one gradient that is not the derivative, by decree
        options["padding_idx"] = None
    gradient_check(case.name, lambda *arrays: case.op(*arrays, **options), *example.arrays)


@each_op
@each_dtype
@given(data=st.data())
def test_agrees_with_torch(case: OpCase, dtype, data):
    example = data.draw(case.examples(dtype))
    y, backward = case.op(*example.arrays, **example.options)
    dy = random_like(y.shape, dtype, data.draw(seeds))
    gradients = as_tuple(backward(dy))
    expected_y, expected_gradients = torch_value_and_gradients(case, example, dy)
    bounds = case.bounds(in_float64(example), dy.astype(np.float64), dtype)

    compare.assert_close(case.name, y, expected_y, bounds.value)
    used = fraction(y, expected_y, bounds.value)
    for i, (dx, e, b) in enumerate(
        zip(gradients, expected_gradients, bounds.gradients, strict=True)
    ):
        compare.assert_close(f"{case.name}: gradient {i}", dx, e, b)
        used = max(used, fraction(dx, e, b))
    target(used)  # Hypothesis climbs towards the inputs that use most of the bound


def fraction(actual, expected, bound) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.abs(actual - expected) / np.asarray(bound)).max(initial=0))


# --- Products ---------------------------------------------------------------------------------


def normal(*shape, dtype=np.float64, seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize(
    ("a", "b", "y"),
    [
        ((3,), (3,), ()),
        ((3,), (3, 2), (2,)),
        ((4, 3), (3,), (4,)),
        ((4, 3), (3, 2), (4, 2)),
        ((3,), (5, 3, 2), (5, 2)),
        ((5, 4, 3), (3,), (5, 4)),
        ((5, 4, 3), (3, 2), (5, 4, 2)),
        ((5, 1, 4, 2), (3, 2, 1), (5, 3, 4, 1)),
    ],
)
def test_matmul_shapes(a, b, y):
    value, backward = ops.matmul(normal(*a), normal(*b, seed=1))
    assert value.shape == y
    assert [dx.shape for dx in backward(normal(*y))] == [a, b]


def test_matmul_of_integers_has_no_gradient():
    a = np.arange(6).reshape(2, 3)
    y, backward = ops.matmul(a, a.T)
    np.testing.assert_array_equal(y, [[5, 14], [14, 50]])
    with pytest.raises(TypeError, match=r"matmul: int64 has no gradient; convert .* float"):
        backward(y)


def test_embedding_reads_the_padding_row_but_gives_it_no_gradient():
    weight = normal(5, 3)
    y, backward = ops.embedding(np.array([[4, 1], [1, 1]]), weight, padding_idx=4)
    np.testing.assert_array_equal(y[0, 0], weight[4])
    dy = normal(2, 2, 3, seed=1)
    dweight = backward(dy)
    assert not dweight[[0, 2, 3, 4]].any()
    np.testing.assert_allclose(dweight[1], dy[0, 1] + dy[1, 0] + dy[1, 1])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_embedding_takes_ids_of_any_integer_dtype(dtype):
    ids, weight, dy = np.array([2, 0, 2]), normal(3, 2), normal(3, 2, seed=1)
    expected = ops.embedding(ids, weight)[1](dy)
    np.testing.assert_array_equal(ops.embedding(ids.astype(dtype), weight)[1](dy), expected)


def test_ops_take_empty_batches():
    """No rows is no mistake: an empty batch comes out empty, and its weights get gradients 0."""
    x, w, b = np.empty((0, 3)), normal(2, 3), normal(3)
    assert not ops.linear(x, w)[1](np.empty((0, 2)))[1].any()
    assert not ops.layer_norm(x, b, b)[1](x)[1].any()
    assert not ops.embedding(np.empty((0,), int), w)[1](x).any()
    assert ops.softmax(x)[1](x).shape == ops.log_softmax(x)[1](x).shape == (0, 3)
    y, backward = ops.attention(np.empty((0, 3)), normal(5, 3), normal(5, 4))
    assert y.shape == (0, 4)
    assert not any(dx.any() for dx in backward(y))


# --- Softmax and attention --------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("size", [1, 59, 61, 1e4])  # 60 is where softmax changes its method
def test_softmax_of_large_logits_and_dead_rows(dtype, size):
    x = (normal(4, 5) * size).astype(dtype)
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 1]]) == 1
    y, backward = ops.softmax(x, mask)
    dx = backward(normal(4, 5, dtype=dtype, seed=1))
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()
    assert not y[~mask].any()
    assert not dx[~mask].any()
    sums = y.astype(np.float64).sum(axis=-1)
    compare.assert_close("row sums", sums, mask.any(axis=-1), 5 * compare.eps(dtype))
    assert y[2, 1] == 1


def test_softmax_with_minus_infinity_as_a_mask():
    x = np.where(np.eye(3) == 1, -np.inf, normal(3, 3))
    np.testing.assert_array_equal(ops.softmax(x)[0] == 0, np.eye(3) == 1)
    assert not ops.softmax(np.full((2, 3), -np.inf))[0].any()


@pytest.mark.parametrize("value", [-np.inf, np.float64(-1e9), np.float32(7), 0])
@each_dtype
def test_masked_fill_keeps_the_dtype(dtype, value):
    x, mask = normal(2, 3, dtype=dtype), np.eye(2, 3) == 1
    y, backward = ops.masked_fill(x, mask, value)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, np.where(mask, dtype(value), x))
    np.testing.assert_array_equal(backward(x), np.where(mask, 0, x))


@each_dtype
@given(data=st.data())
def test_attention_agrees_with_the_kernel_of_torch(dtype, data):
    """scaled_dot_product_attention: a formula that nobody here wrote down."""
    B, H, T, S, D, E = data.draw(sizes("BHTSDE", 6))
    q, k, v = (
        data.draw(arrays((B, H, *last), dtype, top=100)) for last in ((T, D), (S, D), (S, E))
    )
    mask = data.draw(masks((B, H), T, S))
    dy = random_like((B, H, T, E), dtype, data.draw(seeds))

    def kernel(torch, q, k, v, mask, p, seed):
        mask = None if mask is None else torch.from_numpy(mask.copy())
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    options = {"mask": mask, "p": 0.0, "seed": 0}
    example = Example((q, k, v), options)
    case = next(case for case in OP_CASES if case.name == "attention")
    y, backward = ops.attention(q, k, v, mask)
    expected_y, expected = torch_value_and_gradients(replace(case, torch=kernel), example, dy)
    bounds = case.bounds(in_float64(example), dy.astype(np.float64), dtype)
    compare.assert_close("y", y, expected_y, bounds.value)
    for name, dx, e, b in zip(
        ("dq", "dk", "dv"), backward(dy), expected, bounds.gradients, strict=True
    ):
        compare.assert_close(name, dx, e, b)


def test_attention_without_keys_for_a_query_is_zero():
    q, k, v, mask = normal(3, 4), normal(5, 4, seed=1), normal(5, 2, seed=2), np.ones((3, 5), bool)
    mask[1] = False
    y, backward = ops.attention(q, k, v, mask)
    dq, _, _ = backward(normal(3, 2))
    assert not y[1].any()
    assert not dq[1].any()
    assert y[[0, 2]].all()


def test_attention_drops_the_same_weights_forward_and_backward():
    q, k, v = normal(3, 4), normal(5, 4, seed=1), np.eye(5)
    dropped, backward = ops.attention(q, k, v, None, 0.5, np.random.default_rng(0))  # v = 1
    dv = backward(np.eye(3, 5))[2]
    np.testing.assert_allclose(dv[:, :3], dropped.T)
    assert (dropped == 0).any()


# --- Dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation(p):
    """The mean of n entries that are 0 or 1 / (1 - p) has the deviation √(p / (1 - p) / n)."""
    n = 10**5
    y, _ = ops.dropout(np.ones(n), p, np.random.default_rng(0))
    assert abs(y.mean() - 1) < 5 * (p / (1 - p) / n) ** 0.5
    assert set(np.unique(y)) == {0, 1 / (1 - p)}


@pytest.mark.parametrize("p", [0, 1 / 3, 0.5, 1 - 2**-16, 1])
def test_dropout_mask_frequency(p):
    n = 10**5 + 3  # not a multiple of the 4 entries that one draw gives
    keep = ops.dropout_mask((n,), p, np.random.default_rng(0))
    assert keep.dtype == bool
    assert abs(keep.mean() - (1 - p)) <= 5 * (p * (1 - p) / n) ** 0.5 + 2**-17
    assert ops.dropout_mask((2, 3, 5), 0.5, np.random.default_rng(0)).shape == (2, 3, 5)


def test_dropout_draws_each_entry_by_itself():
    """Neighbours come out of the same 64 bits: they must be no more alike than strangers."""
    n, p = 10**5, 0.3
    keep = ops.dropout_mask((n,), p, np.random.default_rng(0))
    for lag in range(1, 9):
        both = (keep[lag:] & keep[:-lag]).mean()
        assert abs(both - (1 - p) ** 2) < 5 * (0.25 / n) ** 0.5


def test_dropout_drops_the_same_entries_forward_and_backward():
    x = np.ones((4, 5), np.float32)
    y, backward = ops.dropout(x, 0.5, np.random.default_rng(0))
    np.testing.assert_array_equal(backward(x), y)
    np.testing.assert_array_equal(backward(x), y)


@pytest.mark.parametrize(("p", "rng"), [(0, np.random.default_rng(0)), (0.5, None)])
def test_dropout_is_nothing_without_p_or_rng(p, rng):
    x = normal(2, 3)
    y, backward = ops.dropout(x, p, rng)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(backward(x), x)


def test_dropout_of_everything_is_zero():
    y, backward = ops.dropout(normal(2, 3), 1, np.random.default_rng(0))
    assert not y.any()
    assert not backward(normal(2, 3)).any()


# --- The loss ---------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_of_micro_batches_adds_up(dtype, label_smoothing):
    logits, pad = normal(6, 4, 7, dtype=dtype), 0
    targets = np.random.default_rng(1).integers(0, 7, (6, 4))
    targets[1] = pad  # a micro-batch may have no target at all
    n = (targets != pad).sum()  # an np.int64, as it comes: it must not promote float32
    whole, backward = ops.cross_entropy(logits, targets, pad, label_smoothing)
    loss, dlogits = 0.0, np.zeros_like(logits)
    for part in (slice(0, 1), slice(1, 2), slice(2, 6)):
        part_loss, backward_part = ops.cross_entropy(
            logits[part], targets[part], pad, label_smoothing, n_targets=n
        )
        assert part_loss.dtype == dtype
        dlogits[part] = backward_part(1.0)
        assert backward_part(1.0).dtype == dtype
        loss += part_loss
    assert not dlogits[1].any()
    compare.assert_close("loss", loss, whole, 24 * compare.eps(dtype) * whole)
    compare.assert_close("dlogits", dlogits, backward(1.0), 4 * compare.eps(dtype) * 1 / n)


def test_cross_entropy_without_any_target():
    """NaN and a gradient of 0, as in torch, and a warning."""
    with pytest.warns(UserWarning, match="every target is ignored"):
        loss, backward = ops.cross_entropy(normal(3, 4), np.full(3, 2), ignore_index=2)
    assert np.isnan(loss)
    np.testing.assert_array_equal(backward(1.0), np.zeros((3, 4)))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_cross_entropy_ignores_all_of_an_ignored_row(bad):
    """Whatever is written there: -inf at the pad class is how one forbids a model to say "pad"."""
    logits, targets = normal(3, 4), np.array([1, 0, 2])
    expected, backward = ops.cross_entropy(logits, targets, ignore_index=0)
    expected_gradient = backward(1.0)
    logits[1, 0] = bad
    loss, backward = ops.cross_entropy(logits, targets, ignore_index=0)
    assert loss == expected
    np.testing.assert_array_equal(backward(1.0), expected_gradient)


def test_an_ignored_target_need_not_be_a_class():
    """-100 is torch's own default."""
    logits, targets = normal(3, 4), np.array([1, -100, 2])
    loss, backward = ops.cross_entropy(logits, targets, ignore_index=-100)
    expected, backward_kept = ops.cross_entropy(logits[[0, 2]], targets[[0, 2]])
    assert loss == expected  # the same two rows, row by row
    np.testing.assert_array_equal(backward(1.0)[[0, 2]], backward_kept(1.0))
    with pytest.raises(ValueError, match="id -100 is not in the vocabulary"):
        ops.cross_entropy(logits, targets)


def test_cross_entropy_of_certainty():
    logits, targets = np.array([[1e4, 0.0, -1e4]], np.float32), np.array([0])
    assert ops.cross_entropy(logits, targets)[0] == 0
    assert ops.cross_entropy(logits, targets + 2)[0] == 2e4


# --- erf --------------------------------------------------------------------------------------


@each_dtype
def test_erf_is_within_the_ulps_that_it_claims(dtype):
    """math.erf is right to within 1 in the last place of float64."""
    x = np.concatenate([np.linspace(-7, 7, 100_001), np.geomspace(1e-30, 7, 50_001)]).astype(dtype)
    expected = np.array([math.erf(value) for value in x.astype(np.float64)])
    ulp = np.spacing(np.abs(expected).astype(dtype))
    compare.assert_close("erf", ops.erf(x), expected, 3 * ulp.astype(np.float64))


def test_erf_at_the_ends():
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e300])
    np.testing.assert_array_equal(ops.erf(x), [0, 0, 1, -1, np.nan, 1])
    assert np.signbit(ops.erf(x)[1])


# --- What is refused --------------------------------------------------------------------------

q, k, v = normal(2, 3, 5, 4), normal(2, 3, 6, 4), normal(2, 3, 6, 7)  # B 2, H 3, T 5, S 6, D 4
x, ids, logits = normal(2, 3), np.array([1, 0]), normal(2, 3)
f4 = np.float32
REFUSED = {
    # Each message names the op, the argument, what came, and what to do about it.
    "a list": (lambda: ops.relu([1.0]), TypeError, "relu: x must be a NumPy array, got list"),
    "half": (lambda: ops.relu(x.astype("f2")), TypeError, "x must be float32 or float64.*float16"),
    "integers": (lambda: ops.gelu(ids), TypeError, "gelu: x must be float32 or float64, got int"),
    "gelu_tanh of integers": (lambda: ops.gelu_tanh(ids), TypeError, "gelu_tanh: x must be float"),
    "softmax of integers": (lambda: ops.softmax(ids), TypeError, "softmax: x must be float"),
    "log_softmax of integers": (lambda: ops.log_softmax(ids), TypeError, "x must be float"),
    "matmul, mixed dtypes": (
        lambda: ops.matmul(x, x.T.astype(f4)),
        TypeError,
        r"matmul: mixed dtypes \(a is float64, b is float32\); convert one with \.astype",
    ),
    "linear, mixed dtypes": (
        lambda: ops.linear(x, x.astype(f4)),
        TypeError,
        r"linear: mixed dtypes \(x is float64, weight is float32\)",
    ),
    "layer_norm, mixed dtypes": (
        lambda: ops.layer_norm(x, x[0].astype(f4), x[0]),
        TypeError,
        "layer_norm: mixed dtypes .*weight is float32",
    ),
    "attention, mixed dtypes": (
        lambda: ops.attention(q, k, v.astype(f4)),
        TypeError,
        r"attention: mixed dtypes \(k is float64, v is float32\)",
    ),
    "attention, mixed dtypes of q and k": (
        lambda: ops.attention_weights(q.astype(f4), k),
        TypeError,
        "q is float32, k is float64",
    ),
    "matmul 0-D": (
        lambda: ops.matmul(np.array(2.0), x),
        ValueError,
        r"at least 1-D, got shapes \(\) and \(2, 3\); multiply by a scalar with \*",
    ),
    "matmul inner": (
        lambda: ops.matmul(x, x),
        ValueError,
        r"last axis of a \(3\) must equal the second to last axis of b \(2\)",
    ),
    "matmul inner 1-D": (
        lambda: ops.matmul(x, x[:, 0]),
        ValueError,
        r"last axis of a \(3\) must equal the only axis of b \(2\)",
    ),
    "matmul batch": (
        lambda: ops.matmul(normal(2, 4, 3), normal(5, 3, 4)),
        ValueError,
        r"leading axes \(2,\) and \(5,\) do not broadcast",
    ),
    "dot of a list": (lambda: ops.dot([1.0], x[0]), TypeError, "dot: a must be a NumPy array"),
    "dot with a list": (lambda: ops.dot(x[0], [1.0]), TypeError, "dot: b must be a NumPy array"),
    "dot 2-D": (lambda: ops.dot(x, x), ValueError, "dot: a must be 1-D and b 1-D.*matmul takes"),
    "mv 1-D": (lambda: ops.mv(x[0], x[0]), ValueError, "mv: a must be 2-D and b 1-D.*matmul"),
    "mm 3-D": (lambda: ops.mm(q[0], x), ValueError, "mm: a must be 2-D and b 2-D.*matmul takes"),
    "bmm 2-D": (lambda: ops.bmm(x, x), ValueError, "bmm: a must be 3-D and b 3-D.*matmul takes"),
    "bmm batch": (
        lambda: ops.bmm(normal(1, 2, 3), normal(4, 3, 2)),
        ValueError,
        "a has 1 matrices, b has 4; bmm does not broadcast, matmul does",
    ),
    "linear weight": (
        lambda: ops.linear(x, x[0]),
        ValueError,
        r"linear: weight must be \(O, I\), got shape \(3,\)",
    ),
    "linear transposed": (
        lambda: ops.linear(x, normal(3, 5)),
        ValueError,
        r"x must be \(\.\.\., I\) with I = 5, got shape \(2, 3\); weight is stored \(O, I\)",
    ),
    "linear bias": (
        lambda: ops.linear(x, x, x[0]),
        ValueError,
        r"bias must be \(O,\) = \(2,\), got shape \(3,\)",
    ),
    "float ids": (
        lambda: ops.embedding(ids * 1.0, x),
        TypeError,
        "embedding: ids must be an integer array, got float64",
    ),
    "a list of ids": (lambda: ops.embedding([1], x), TypeError, "integer array, got list"),
    "negative id": (
        lambda: ops.embedding(ids - 1, x),
        ValueError,
        r"id -1 is not in the vocabulary of 2 \(ids 0\.\.1\)",
    ),
    "id too large": (lambda: ops.embedding(ids + 1, x), ValueError, "id 2 is not in the vocabul"),
    "embedding weight": (
        lambda: ops.embedding(ids, x[0]),
        ValueError,
        r"weight must be \(V, C\), got shape \(3,\)",
    ),
    "integer weight": (lambda: ops.embedding(ids, ids), TypeError, "weight must be float32 or"),
    "padding_idx": (
        lambda: ops.embedding(ids, x, 2),
        ValueError,
        r"padding_idx must be in 0\.\.1, a row of weight, got 2",
    ),
    "softmax 0-D": (
        lambda: ops.softmax(np.array(1.0)),
        ValueError,
        r"softmax: x must be \(\.\.\., S\) with S at least 1, got shape \(\)",
    ),
    "softmax of nothing": (lambda: ops.softmax(x[:, :0]), ValueError, r"got shape \(2, 0\)"),
    "log_softmax of nothing": (lambda: ops.log_softmax(x[:, :0]), ValueError, "S at least 1"),
    "layer_norm of nothing": (
        lambda: ops.layer_norm(x[:, :0], x[0, :0], x[0, :0]),
        ValueError,
        "C at least 1",
    ),
    "layer_norm weight": (
        lambda: ops.layer_norm(x, x[:, 0], x[0]),
        ValueError,
        r"x must be \(\.\.\., C\), weight and bias \(C,\), got shapes \(2, 3\), \(2,\) and \(3,\)",
    ),
    "tril of floats": (
        lambda: ops.softmax(x, np.tril(np.ones((2, 3)))),
        TypeError,
        "True = may attend; got float64, 0s and 1s: pass mask == 1 if 1 means 'may attend'",
    ),
    "tril of ints": (
        lambda: ops.attention(q, k, v, np.tril(np.ones((5, 6), int))),
        TypeError,
        "attention: mask must be boolean, True = may attend; got int64, 0s and 1s: pass mask == 1",
    ),
    "additive mask": (
        lambda: ops.attention(q, k, v, np.where(np.eye(5, 6), -np.inf, 0.0)),
        TypeError,
        "an additive mask .*: pass mask == 0",
    ),
    "additive mask, finite": (
        lambda: ops.softmax(x, np.where(np.eye(2, 3), -1e9, 0.0)),
        TypeError,
        "an additive mask .*: pass mask == 0",
    ),
    "a mask of anything": (lambda: ops.softmax(x, x), TypeError, "neither 0/1 nor 0/-inf"),
    "a mask of lists": (
        lambda: ops.softmax(x, [[True] * 3]),
        TypeError,
        "mask must be a boolean NumPy array, got list",
    ),
    "mask (B, S)": (
        lambda: ops.attention(q, k, v, np.ones((2, 6), bool)),
        ValueError,
        r"\(2, 6\) does not broadcast to \(B, H, T, S\) = \(2, 3, 5, 6\); a padding mask is "
        r"\(B, 1, 1, S\), a causal one \(T, S\)",
    ),
    "mask that would enlarge the scores": (
        lambda: ops.softmax(x, np.ones((4, 2, 3), bool)),
        ValueError,
        r"softmax: mask of shape \(4, 2, 3\) does not broadcast to \(\.\.\., T, S\) = \(2, 3\)",
    ),
    "masked_fill of floats": (
        lambda: ops.masked_fill(x, x * 0, 0.0),
        TypeError,
        "masked_fill: mask must be boolean, True = may be overwritten",
    ),
    "masked_fill shape": (
        lambda: ops.masked_fill(x, np.ones((4, 3), bool), 0.0),
        ValueError,
        r"mask of shape \(4, 3\) does not broadcast with x of shape \(2, 3\)",
    ),
    "no keys": (
        lambda: ops.attention(q, k[:, :, :0], v[:, :, :0]),
        ValueError,
        r"there are no keys to attend to \(S = 0\), k has shape \(2, 3, 0, 4\)",
    ),
    "no width": (
        lambda: ops.attention_weights(q[..., :0], k[..., :0]),
        ValueError,
        r"nothing to compare \(D = 0\)",
    ),
    "attention of vectors": (
        lambda: ops.attention_weights(q[0, 0, 0], k[0, 0]),
        ValueError,
        r"q must be \(\.\.\., T, D\) and k \(\.\.\., S, D\)",
    ),
    "attention, other D": (
        lambda: ops.attention(q, v, v),
        ValueError,
        r"same leading axes and D, got shapes \(2, 3, 5, 4\) and \(2, 3, 6, 7\)",
    ),
    "attention, other S": (
        lambda: ops.attention(q, k, v[:, :, 1:]),
        ValueError,
        r"k must be \(\.\.\., S, D\) and v \(\.\.\., S, E\), one value for every key",
    ),
    "p": (lambda: ops.dropout(x, 1.5, None), ValueError, "dropout: p is a probability, got 1.5"),
    "p NaN": (lambda: ops.dropout(x, np.nan, None), ValueError, "p is a probability, got nan"),
    "float targets": (
        lambda: ops.cross_entropy(logits, ids * 1.0),
        TypeError,
        "targets must be an integer array",
    ),
    "targets shape": (
        lambda: ops.cross_entropy(logits, ids[:, np.newaxis]),
        ValueError,
        r"logits must be \(\.\.\., V\) and targets \(\.\.\.\), got shapes \(2, 3\) and \(2, 1\)",
    ),
    "target out of range": (
        lambda: ops.cross_entropy(logits, ids + 2),
        ValueError,
        r"cross_entropy: id 3 is not in the vocabulary of 3",
    ),
    "target -100": (
        lambda: ops.cross_entropy(logits, ids - 100),
        ValueError,
        "cross_entropy: id -99 is not in the vocabulary",
    ),
    "label_smoothing": (
        lambda: ops.cross_entropy(logits, ids, label_smoothing=1.1),
        ValueError,
        r"label_smoothing is a probability, got 1.1",
    ),
    "n_targets": (
        lambda: ops.cross_entropy(logits, ids, n_targets=0),
        ValueError,
        "n_targets must be at least 1, got 0",
    ),
    "no classes": (lambda: ops.cross_entropy(logits[:, :0], ids), ValueError, "V at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
