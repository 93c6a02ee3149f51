"""Every op as data: its twin in torch, the inputs to draw, and how far the two may be apart.

A bound is the sum, along the computation, of what each rounding may change.  Both sides round, each
by at most eps / 2 an operation, so that n operations on both sides are apart by n eps magnitude.
First order throughout: eps² is left out, except where layer_norm may divide by almost nothing.

Shapes  as in ops.py; E is the width of a value, eps the machine epsilon of the compared dtype.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from npformer import compare, ops
from npformer.testing.strategies import (
    arrays,
    leading_axes,
    masks,
    matmul_shapes,
    random_like,
    seeds,
    sizes,
    token_batches,
)

Array = np.ndarray


class Example(NamedTuple):
    """What an op is called with."""

    arrays: tuple[Array, ...]  # those that have a gradient, all of one dtype
    options: dict[str, Any]  # ids, masks, p ...: no gradient


class Bounds(NamedTuple):
    """How far two computations may be apart: numbers, or arrays like what they bound."""

    value: Any
    gradients: tuple[Any, ...]


@dataclass(frozen=True)
class OpCase:
    """One op."""

    name: str
    op: Callable  # (*arrays, **options) -> y, backward
    torch: Callable  # (torch, *tensors, **options) -> tensor; arrays among the options stay NumPy
    examples: Callable[[Any], st.SearchStrategy[Example]]  # of a dtype
    bounds: Callable[[Example, Array, Any], Bounds]  # of an example in float64, dy and the dtype


# --- Examples ---------------------------------------------------------------------------------


@st.composite
def _matmul_examples(draw, dtype, shapes=None):
    a, b = draw(matmul_shapes()) if shapes is None else draw(shapes)
    return Example((draw(arrays(a, dtype)), draw(arrays(b, dtype))), {})


def _products_of(a: str, b: str):
    """Examples of two arrays whose shapes are spelled in letters: equal letters, equal sizes."""
    letters = "".join(sorted(set(a + b)))

    def shapes(n: list[int]):
        size = dict(zip(letters, n, strict=True))
        return tuple(size[x] for x in a), tuple(size[x] for x in b)

    return lambda dtype: _matmul_examples(dtype, sizes(letters).map(shapes))


@st.composite
def _linear_examples(draw, dtype, has_bias):
    leading, (n_in, n_out) = draw(leading_axes()), draw(sizes("IO"))
    shapes = [(*leading, n_in), (n_out, n_in), (n_out,)][: 3 if has_bias else 2]
    return Example(tuple(draw(arrays(shape, dtype)) for shape in shapes), {})


@st.composite
def _embedding_examples(draw, dtype):
    shape, (V, C) = draw(leading_axes()), draw(sizes("VC"))
    padding_idx = draw(st.none() | st.integers(0, V - 1))
    ids = draw(token_batches(shape, V, padding_idx))
    return Example((draw(arrays((V, C), dtype)),), {"ids": ids, "padding_idx": padding_idx})


@st.composite
def _elementwise_examples(draw, dtype):
    return Example((draw(arrays((*draw(leading_axes()), *draw(sizes("C"))), dtype)),), {})


@st.composite
def _masked_row_examples(draw, dtype):
    leading, (T, S) = draw(leading_axes()), draw(sizes("TS"))
    mask = draw(masks(leading, T, S))
    return Example((draw(arrays((*leading, T, S), dtype)),), {"mask": mask})


@st.composite
def _masked_fill_examples(draw, dtype):
    leading, (T, S) = draw(leading_axes()), draw(sizes("TS"))
    mask = draw(masks(leading, T, S).filter(lambda mask: mask is not None))
    # Either may be the one that is stretched.
    shape = draw(st.sampled_from([(*leading, T, S), (T, S), (S,), (T, 1)]))
    return Example((draw(arrays(shape, dtype)),), {"mask": mask, "value": draw(st.floats(-4, 4))})


@st.composite
def _attention_examples(draw, dtype, has_values=True):
    leading, (T, S, D, E) = draw(leading_axes()), draw(sizes("TSDE"))
    q = draw(arrays((*leading, T, D), dtype, top=100))  # scores up to 10⁴
    k = draw(arrays((*leading, S, D), dtype, top=100))
    options = {"mask": draw(masks(leading, T, S))}
    if not has_values:
        return Example((q, k), options)
    v = draw(arrays((*leading, S, E), dtype))
    p = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return Example((q, k, v), {**options, "p": p, "seed": draw(seeds)})


@st.composite
def _layer_norm_examples(draw, dtype):
    shape = (*draw(leading_axes()), *draw(sizes("C")))
    weight, bias = (draw(arrays(shape[-1:], dtype, top=4)) for _ in range(2))
    return Example((draw(arrays(shape, dtype)), weight, bias), {})


@st.composite
def _dropout_examples(draw, dtype):
    (x,), _ = draw(_elementwise_examples(dtype))
    return Example((x,), {"p": draw(st.floats(0, 1)), "seed": draw(seeds)})


two_thirds = st.sampled_from([True, True, False])


@st.composite
def _cross_entropy_examples(draw, dtype):
    shape, (V,) = draw(leading_axes()), draw(sizes("V"))
    may_ignore, is_counted = draw(two_thirds), draw(two_thirds)
    ignore_index = draw(st.integers(0, V - 1)) if may_ignore else None
    targets = draw(token_batches(shape, V, ignore_index))
    if ignore_index is not None and (targets == ignore_index).all():
        ignore_index = None  # no target at all: NaN, and a test of its own
    options = {
        "targets": targets,
        "ignore_index": ignore_index,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "n_targets": None if is_counted else draw(st.integers(1, 20)),
    }
    return Example((draw(arrays((*shape, V), dtype)),), options)


# --- Bounds -----------------------------------------------------------------------------------


def _linear_in_each(op: Callable, lengths: Callable):
    """For an op that is linear in each array: it is a sum of products, and so are its gradients.

    The magnitude is then the op itself on absolute values, and `lengths(arrays, y)` says how many
    products are in a sum: for y, and for each of the gradients.  0 means exact.
    """

    def bounds(example, dy, dtype):
        y, backward = op(*map(np.abs, example.arrays), **example.options)
        magnitudes = _as_tuple(backward(np.abs(dy)))
        n, *ns = lengths(example.arrays, y)
        return Bounds(
            compare.sum_of_products_bound(n, y, dtype) if n else 0.0,
            tuple(map(compare.sum_of_products_bound, ns, magnitudes, [dtype] * len(ns))),
        )

    return bounds


def _matmul_lengths(arrays, y):
    a, b = arrays
    K = a.shape[-1]  # y.size K products in all, shared out among the entries of what they add up to
    return K, y.size * K // a.size, y.size * K // b.size


def _linear_lengths(arrays, y):
    x, weight, *bias = arrays
    n_rows = x.size // x.shape[-1]
    return weight.shape[1] + len(bias), weight.shape[0], n_rows, *(n_rows for _ in bias)


def _softmax_bounds(example, dy, dtype, mask=None):
    """dx = y (dy - Σ y dy): y is off by its own bound, twice, and Σ adds S products."""
    (x,) = example.arrays
    mask = example.options["mask"]
    y, _ = ops.softmax(x, mask)
    dy_y = compare.softmax_bound(x, y, dtype, mask)  # how far y may be off
    return Bounds(dy_y, (_softmax_gradient_bound(y, dy_y, np.abs(dy), 0.0, dtype),))


def _softmax_gradient_bound(y, off_y, dy, off_dy, dtype):
    """For y (dy - Σ y dy), where y may be off by off_y and dy, of magnitude `dy`, by off_dy.

    The product rule, plus S + 2 roundings of the sum, the difference and the product.
    """
    total = _sum_last(y * dy)
    off_total = _sum_last(off_y * dy + y * off_dy) + (y.shape[-1] + 2) * compare.eps(dtype) * total
    off_difference = off_dy + off_total + 2 * compare.eps(dtype) * dy
    return off_y * (dy + total) + y * off_difference + compare.tiny(dtype)


def _log_softmax_bounds(example, dy, dtype):
    """The relative error of Σ exp is an absolute one of its log: S + 4; the rest rounds y."""
    (x,) = example.arrays
    y, _ = ops.log_softmax(x)
    S, total = x.shape[-1], _sum_last(np.abs(dy))
    n = _log_softmax_roundings(y)
    # dx = dy - exp(y) Σ dy: exp turns the error of y into a relative one, Σ adds S terms.
    gradient = compare.eps(dtype) * (np.abs(dy) + (n + S + 4) * np.exp(y) * total)
    return Bounds(compare.eps(dtype) * n, (gradient + compare.tiny(dtype),))


def _log_softmax_roundings(y):
    """n, with y = x - max - log Σ off by n eps: |x - max| and |log Σ| are at most |y| + log S."""
    S = y.shape[-1]
    return S + 4 + 2 * math.log(S) + 2 * np.abs(y)


def _attention_weights_bounds(example, dy, dtype):
    q, k = example.arrays
    weights, off_weights = _weights(q, k, example.options["mask"], dtype)
    off_dscores = _softmax_gradient_bound(weights, off_weights, np.abs(dy), 0.0, dtype)
    dscores = _softmax_gradient_magnitude(weights, np.abs(dy))
    return Bounds(off_weights, _scores_gradient_bounds(q, k, dscores, off_dscores, dtype))


def _weights(q, k, mask, dtype):
    """softmax(q kᵀ / √D), and how far it may be off.

    A score is off by D + 2 roundings.  Weights are ratios of exps, each off by as much relatively,
    so a weight changes by up to twice the worst of its row; and softmax rounds as well.
    """
    scale, D = q.shape[-1] ** -0.5, q.shape[-1]
    scores = q @ k.mT * scale
    off_scores = scale * compare.sum_of_products_bound(D + 2, np.abs(q) @ np.abs(k).mT, dtype)
    weights, _ = ops.softmax(scores, mask)
    worst = off_scores.max(axis=-1, keepdims=True)
    return weights, compare.softmax_bound(scores, weights, dtype, mask) + weights * np.expm1(
        2 * worst
    )


def _softmax_gradient_magnitude(y, dy):
    return y * (dy + _sum_last(y * dy))


def _scores_gradient_bounds(q, k, dscores, off_dscores, dtype):
    """dq = dscores k / √D is off where dscores is, and by S + 2 roundings; dk by T + 2."""
    scale, (T, S) = q.shape[-1] ** -0.5, dscores.shape[-2:]
    eps, q, k = compare.eps(dtype), np.abs(q), np.abs(k)
    off_dq = (off_dscores + (S + 2) * eps * dscores) @ k
    off_dk = (off_dscores + (T + 2) * eps * dscores).mT @ q
    return off_dq * scale, off_dk * scale


def _attention_bounds(example, dy, dtype):
    """The chain of its parts; a product is off where either factor is, and by its length."""
    q, k, v = example.arrays
    eps, dy, v = compare.eps(dtype), np.abs(dy), np.abs(v)
    p, seed = example.options["p"], example.options["seed"]
    weights, off_weights = _weights(q, k, example.options["mask"], dtype)
    keep, _ = _seeded_dropout(np.ones_like(weights), p, seed)  # 0 or 1 / (1 - p)
    (T, S), E = weights.shape[-2:], v.shape[-1]

    dropped, off_dropped = weights * keep, (off_weights + 2 * eps * weights) * keep
    off_y = (off_dropped + S * eps * dropped) @ v
    off_dv = (off_dropped + T * eps * dropped).mT @ dy
    dweights = dy @ v.mT * keep
    off_dweights = (E + 2) * eps * dweights
    off_dscores = _softmax_gradient_bound(weights, off_weights, dweights, off_dweights, dtype)
    dscores = _softmax_gradient_magnitude(weights, dweights)
    off_dq, off_dk = _scores_gradient_bounds(q, k, dscores, off_dscores, dtype)
    return Bounds(
        off_y + compare.tiny(dtype),
        (off_dq + compare.tiny(dtype), off_dk + compare.tiny(dtype), off_dv + compare.tiny(dtype)),
    )


def _layer_norm_bounds(example, dy, dtype):
    """A row's centred values, its rstd and so its xhat are off by C roundings of max |x| rstd.

    dx is made of three such factors.  Where a row is nearly constant they are off by much, so that
    the products of errors count: (1 + r)³ - 1 <= 3 r (1 + r)².
    """
    x, weight, bias = example.arrays
    C, n_rows = x.shape[-1], x.size // x.shape[-1]
    x_rows, dy = x.reshape(-1, C), np.abs(dy).reshape(-1, C)
    centred = x_rows - x_rows.mean(axis=-1, keepdims=True)
    rstd = (np.square(centred).mean(axis=-1, keepdims=True) + 1e-5) ** -0.5
    top = np.abs(x_rows).max(axis=-1, keepdims=True)
    xhat = np.abs(centred * rstd)
    dxhat = dy * np.abs(weight)

    r = (C + 2) * compare.eps(dtype) * (top * rstd + 1)
    at_most = 1 + xhat  # |xhat|, plus the 1 that its error is relative to
    dx = rstd * (dxhat + _mean_last(dxhat) + at_most * _mean_last(dxhat * at_most))
    off_xhat = r * at_most + n_rows * compare.eps(dtype) * xhat
    return Bounds(
        compare.layer_norm_bound(x, weight, bias, dtype),
        (
            (3 * r * (1 + r) ** 2 * dx).reshape(x.shape),
            (dy * off_xhat).sum(axis=0),
            compare.sum_of_products_bound(n_rows, dy.sum(axis=0), dtype),
        ),
    )


def _exact(example, dy, dtype):
    return Bounds(0.0, (0.0,))


def _gelu_bounds(example, dy, dtype):
    """Φ is off by 4 eps: half of what erf is, 3 on either side, and 1 for 1 + erf; x Φ by 1 more.

    The density exp(-x²/2) is off by x² + 4 of itself; it is multiplied by x.
    """
    (x,) = example.arrays
    eps = compare.eps(dtype)
    density = np.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    slope = 4 + np.abs(x) * density * (x * x + 4)
    return Bounds(5 * eps * np.abs(x) + compare.tiny(dtype), (eps * slope * np.abs(dy),))


def _gelu_tanh_bounds(example, dy, dtype):
    """u is off by 5 eps of itself, which tanh damps to 5 eps |u| (1 - tanh²) < 3 eps; tanh adds 2.

    1 - tanh² is off by twice as much as tanh, until tanh is 1 to the last digit; times x du/dx.
    """
    (x,) = example.arrays
    eps, c = compare.eps(dtype), math.sqrt(2 / math.pi)
    u, du = c * (x + 0.044715 * x**3), c * (1 + 3 * 0.044715 * x * x)
    saturated = np.abs(u) > 20
    slope = 5 + np.where(saturated, 0.0, np.abs(x) * du * 5)
    return Bounds(5 * eps * np.abs(x) + compare.tiny(dtype), (eps * slope * np.abs(dy),))


def _cross_entropy_bounds(example, dy, dtype):
    """-log p of a target is off as log_softmax is, a mean over V or N adds its length.

    dlogits = (p - t) / n: p is the exp of a log_softmax, off by as much relatively.
    """
    (logits,) = example.arrays
    targets, ignore_index = example.options["targets"], example.options["ignore_index"]
    smoothing = example.options["label_smoothing"]
    V, eps = logits.shape[-1], compare.eps(dtype)
    log_p, _ = ops.log_softmax(logits.reshape(-1, V))
    t = (1 - smoothing) * np.eye(V)[targets.reshape(-1)] + smoothing / V
    counted = (targets != ignore_index).reshape(-1, 1)  # all of them if ignore_index is None
    n = example.options["n_targets"] or counted.sum()
    roundings = _log_softmax_roundings(log_p) + V + counted.sum() + 4
    off_loss = eps * (counted * t * (roundings + np.abs(log_p) * V)).sum() / n
    off_dlogits = eps * counted * (roundings * np.exp(log_p) + 4 * t) * abs(float(dy)) / n
    return Bounds(off_loss, (off_dlogits.reshape(logits.shape) + compare.tiny(dtype),))


def _sum_last(x: Array) -> Array:
    return x.sum(axis=-1, keepdims=True)


def _mean_last(x: Array) -> Array:
    return x.mean(axis=-1, keepdims=True)


def _as_tuple(gradients: Any) -> tuple:
    return gradients if isinstance(gradients, tuple) else (gradients,)


# --- Ours and torch's, where they are not called alike -----------------------------------------


def _embedding(weight, ids, padding_idx):
    return ops.embedding(ids, weight, padding_idx)


def _torch_embedding(torch, weight, ids, padding_idx):
    ids = torch.from_numpy(ids.astype(np.int64))
    return torch.nn.functional.embedding(ids, weight, padding_idx)


def _torch_softmax(torch, x, mask):
    """Zero where a row has no key: torch's softmax gives NaN there, and so does its gradient."""
    if mask is None:
        return x.softmax(dim=-1)
    mask = torch.from_numpy(mask.copy())
    has_key = mask.any(dim=-1, keepdim=True)
    return x.masked_fill(~(mask | ~has_key), -torch.inf).softmax(dim=-1) * has_key


def _torch_masked_fill(torch, x, mask, value):
    mask = torch.from_numpy(mask.copy())
    x, mask = torch.broadcast_tensors(x, mask)  # torch's own wants x to have the full shape
    return x.masked_fill(mask, value)


def _torch_attention_weights(torch, q, k, mask):
    return _torch_softmax(torch, q @ k.mT * q.shape[-1] ** -0.5, mask)


def _seeded_dropout(x, p, seed):
    return ops.dropout(x, p, np.random.default_rng(seed))


def _torch_dropout(torch, x, p, seed):
    """With the mask that ours draws: no two libraries draw the same."""
    keep = ops.dropout_mask(tuple(x.shape), p, np.random.default_rng(seed))
    return x if p == 0 else x * torch.from_numpy(keep) * (1 / (1 - p) if p < 1 else 0.0)


def _attention(q, k, v, mask, p, seed):
    return ops.attention(q, k, v, mask, p, np.random.default_rng(seed))


def _torch_attention(torch, q, k, v, mask, p, seed):
    return _torch_dropout(torch, _torch_attention_weights(torch, q, k, mask), p, seed) @ v


def _cross_entropy(logits, targets, **options):
    return ops.cross_entropy(logits, targets, **options)


def _torch_cross_entropy(torch, logits, targets, ignore_index, label_smoothing, n_targets):
    targets = torch.from_numpy(targets.astype(np.int64)).reshape(-1)
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(len(targets), logits.shape[-1]),
        targets,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        reduction="mean" if n_targets is None else "sum",
    )
    return loss if n_targets is None else loss / n_targets


# --- The cases --------------------------------------------------------------------------------


def _product(name: str, op: Callable, examples: Callable) -> OpCase:
    return OpCase(
        name,
        op,
        lambda torch, a, b: getattr(torch, name)(a, b),
        examples,
        _linear_in_each(op, _matmul_lengths),
    )


OP_CASES = [
    _product("matmul", ops.matmul, _matmul_examples),
    _product("dot", ops.dot, _products_of("K", "K")),
    _product("mv", ops.mv, _products_of("NK", "K")),
    _product("mm", ops.mm, _products_of("NK", "KM")),
    _product("bmm", ops.bmm, _products_of("BNK", "BKM")),
    OpCase(
        "linear",
        ops.linear,
        lambda torch, x, weight, bias: torch.nn.functional.linear(x, weight, bias),
        lambda dtype: _linear_examples(dtype, True),
        _linear_in_each(ops.linear, _linear_lengths),
    ),
    OpCase(
        "linear without bias",
        ops.linear,
        lambda torch, x, weight: torch.nn.functional.linear(x, weight),
        lambda dtype: _linear_examples(dtype, False),
        _linear_in_each(ops.linear, _linear_lengths),
    ),
    OpCase(
        "embedding",
        _embedding,
        _torch_embedding,
        _embedding_examples,
        # Rows are copied; a row of dweight adds up at most as many as there are ids.
        _linear_in_each(_embedding, lambda arrays, y: (0, y.size // arrays[0].shape[1])),
    ),
    OpCase("softmax", ops.softmax, _torch_softmax, _masked_row_examples, _softmax_bounds),
    OpCase(
        "log_softmax",
        ops.log_softmax,
        lambda torch, x: x.log_softmax(dim=-1),
        _elementwise_examples,
        _log_softmax_bounds,
    ),
    OpCase(
        "masked_fill",
        ops.masked_fill,
        _torch_masked_fill,
        _masked_fill_examples,
        # Entries are copied; the gradient adds up the copies.
        _linear_in_each(ops.masked_fill, lambda arrays, y: (0, y.size // arrays[0].size)),
    ),
    OpCase(
        "attention_weights",
        ops.attention_weights,
        _torch_attention_weights,
        lambda dtype: _attention_examples(dtype, has_values=False),
        _attention_weights_bounds,
    ),
    OpCase("attention", _attention, _torch_attention, _attention_examples, _attention_bounds),
    OpCase(
        "layer_norm",
        ops.layer_norm,
        lambda torch, x, weight, bias: torch.nn.functional.layer_norm(
            x, weight.shape, weight, bias
        ),
        _layer_norm_examples,
        _layer_norm_bounds,
    ),
    OpCase("relu", ops.relu, lambda torch, x: x.relu(), _elementwise_examples, _exact),
    OpCase(
        "gelu",
        ops.gelu,
        lambda torch, x: torch.nn.functional.gelu(x),
        _elementwise_examples,
        _gelu_bounds,
    ),
    OpCase(
        "gelu_tanh",
        ops.gelu_tanh,
        lambda torch, x: torch.nn.functional.gelu(x, approximate="tanh"),
        _elementwise_examples,
        _gelu_tanh_bounds,
    ),
    OpCase(
        "dropout",
        _seeded_dropout,
        _torch_dropout,
        _dropout_examples,
        _linear_in_each(_seeded_dropout, lambda arrays, y: (2, 2)),  # times keep, times 1 / (1-p)
    ),
    OpCase(
        "cross_entropy",
        _cross_entropy,
        _torch_cross_entropy,
        _cross_entropy_examples,
        _cross_entropy_bounds,
    ),
]


def torch_value_and_gradients(
    case: OpCase, example: Example, dy: Array
) -> tuple[Array, tuple[Array, ...]]:
    """What torch says: the value, and autograd's gradient for each of the arrays."""
    import torch

    tensors = [torch.tensor(x.copy(), requires_grad=True) for x in example.arrays]
    y = case.torch(torch, *tensors, **example.options)
    gradients = torch.autograd.grad(y, tensors, torch.tensor(dy.copy()))
    return y.detach().numpy(), tuple(dx.numpy() for dx in gradients)


def in_float64(example: Example) -> Example:
    return Example(tuple(x.astype(np.float64) for x in example.arrays), example.options)


def random_example(example: Example, seed: int) -> Example:
    """The same shapes and options in float64, with normal numbers that stay off relu's kink."""
    normals = (random_like(x.shape, np.float64, seed + i) for i, x in enumerate(example.arrays))
    return Example(tuple(x + np.copysign(0.1, x) for x in normals), example.options)
