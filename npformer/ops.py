"""Every operation of the Transformer as a pure function, each with its chain rule right below it.

One convention.  Whatever runs forward returns its value and its own chain rule:

    y, backward = op(x, w)          # y = op(x, w)
    dx, dw = backward(dy)           # dL/dy  ->  dL/dx, dL/dw

`backward` is a closure: it remembers exactly the arrays its body mentions, so there is no cache to
keep in step; it belongs to one call, so an op may run twice before anyone goes backward; it may be
called any number of times; and when it is dropped, so are its arrays.

What every op promises
    One gradient for each floating-point array it was given, in order, bare if there is only one.
    Ids and masks are not floating point: they have no gradient.
    Nothing that was passed in is written to, and nothing that was handed out is written to again.
    float32 in, float32 out; float64 in, float64 out; a mixture is refused, as PyTorch refuses it.

Names   dx is dL/dx and has the shape of x.  backward_f is the backward of f.
Shapes  B batch, T query positions, S key positions, C model width, H heads, D = C / H,
        F feed-forward width, V vocabulary, N rows (all leading axes as one); `...` any leading
        axes.  A trailing comment gives the shape of the line's result.

This file is the twin of torch.nn.functional.  Read on in module.py.
"""

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from npformer.options import integer, not_negative, probability, real

Array = np.ndarray
Mask = Array | None  # boolean; True means "may attend"
Backward = Callable[..., Any]  # one gradient per array input, in order; bare if only one
Forward = tuple[Array, Backward]  # what every op and every module returns
if TYPE_CHECKING:
    Rng = np.random.Generator
else:
    Rng = Any  # the same, without loading numpy.random: a fourth of the time of `import numpy`


# --- Products ---------------------------------------------------------------------------------


def matmul(a: Array, b: Array) -> Forward:
    """y = a b, by the rules of torch.matmul: the last two axes multiply, all others broadcast.

    a (..., N, K)   b (..., K, M)   ->   y (..., N, M)

    A 1-D a is a row (1, K), a 1-D b a column (K, 1), and y loses the axis that this added: the
    product of two 1-D arrays is 0-D.  A 0-D operand is refused.  Integers go forward, and have
    no gradient.
    """
    _check_matmul(a, b)
    y = np.asarray(a @ b)  # the product of two 1-D arrays would be a scalar, not an array

    def backward(dy):
        # da = dy bᵀ, db = aᵀ dy; what broadcasting copied is summed back.
        _check_differentiable("matmul", a)
        a_rows = a[np.newaxis, :] if a.ndim == 1 else a  # (..., N, K)
        b_cols = b[:, np.newaxis] if b.ndim == 1 else b  # (..., K, M)
        lost_axes = tuple(axis for axis, x in ((-2, a), (-1, b)) if x.ndim == 1)
        dy = np.expand_dims(dy, lost_axes)  # (..., N, M)
        da = unbroadcast(dy @ b_cols.mT, a_rows.shape)
        db = unbroadcast(a_rows.mT @ dy, b_cols.shape)
        return da.reshape(a.shape), db.reshape(b.shape)

    return y, backward


def unbroadcast(dy: Array, shape: tuple[int, ...]) -> Array:
    """The backward of broadcasting `shape` to dy.shape: what was copied forward is summed back."""
    if dy.shape == shape:
        return dy
    n_added = dy.ndim - len(shape)  # axes that broadcasting put in front
    stretched = [n_added + i for i, n in enumerate(shape) if n == 1]
    return dy.sum(axis=(*range(n_added), *stretched)).reshape(shape)


def dot(a: Array, b: Array) -> Forward:
    """y = Σ aᵢ bᵢ: the matmul of two vectors and of nothing else.   a, b (K,)   ->   y ()"""
    _check_ranks("dot", a, 1, b, 1)
    return matmul(a, b)


def mv(a: Array, b: Array) -> Forward:
    """Matrix times vector and nothing else.   a (N, K)   b (K,)   ->   y (N,)"""
    _check_ranks("mv", a, 2, b, 1)
    return matmul(a, b)


def mm(a: Array, b: Array) -> Forward:
    """Matrix times matrix and nothing else.   a (N, K)   b (K, M)   ->   y (N, M)"""
    _check_ranks("mm", a, 2, b, 2)
    return matmul(a, b)


def bmm(a: Array, b: Array) -> Forward:
    """B matrices times B matrices, no broadcast.   a (B, N, K)   b (B, K, M)   ->   y (B, N, M)"""
    _check_ranks("bmm", a, 3, b, 3)
    if len(a) != len(b):
        raise ValueError(
            f"bmm: a has {len(a)} matrices, b has {len(b)}; bmm does not broadcast, matmul does"
        )
    return matmul(a, b)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Forward:
    """y = x Wᵀ + b, with W stored (out, in) as PyTorch stores it.

    x (..., I)   weight (O, I)   bias (O,) or None   ->   y (..., O)
    """
    _check_linear(x, weight, bias)
    n_out, n_in = weight.shape
    x_shape = x.shape
    n_rows = math.prod(x_shape[:-1])  # all leading axes are batch, so one 2-D product does it all
    x_rows = x.reshape(n_rows, n_in)  # (N, I)
    y = x_rows @ weight.T  # (N, O)
    if bias is not None:
        y += bias

    def backward(dy):
        # dx = dy W, dW = dyᵀ x, db = Σ dy over the rows.
        dy_rows = dy.reshape(n_rows, n_out)  # (N, O)
        dx = (dy_rows @ weight).reshape(x_shape)
        dweight = dy_rows.T @ x_rows  # (O, I): the product itself sums over the rows
        return (dx, dweight) if bias is None else (dx, dweight, sum_rows(dy_rows))

    return y.reshape(*x_shape[:-1], n_out), backward


def sum_rows(x: Array) -> Array:
    """Σ over the rows of a matrix, by a product with ones: 2-3 times the speed of x.sum(axis=0)."""
    return np.ones(len(x), x.dtype) @ x  # (N, C) -> (C,)


def sum_last(x: Array) -> Array:
    """Σ over the last axis, which stays with length 1; the same trick, 5 times as fast as sum."""
    n = x.shape[-1]
    return (x.reshape(-1, n) @ np.ones(n, x.dtype)).reshape(*x.shape[:-1], 1)


def embedding(ids: Array, weight: Array, padding_idx: int | None = None) -> Forward:
    """y = weight[ids]: the product of one-hot rows with a table, without the multiplications.

    ids (...) of any integer type   weight (V, C)   ->   y (..., C)

    The row `padding_idx` is read like any other but gets no gradient.  Ids outside [0, V) are
    refused: -1 would otherwise silently read the last row.
    """
    _check_embedding(ids, weight, padding_idx)
    y = weight.take(ids, axis=0)  # (..., C)
    shape = weight.shape

    def backward(dy):
        # dweight[v] = Σ of the rows of dy where the id is v: a token used twice collects both.
        # Sort the rows by id, then add up each run of equal ids.  (np.add.at does it 2-6x slower.)
        flat_ids = ids.reshape(-1)  # (N,)
        order = np.argsort(flat_ids, kind="stable")
        sorted_ids = flat_ids[order]
        starts = np.flatnonzero(np.append(True, sorted_ids[1:] != sorted_ids[:-1]))
        dy_rows = dy.reshape(len(order), shape[1])  # (N, C)
        dweight = np.zeros(shape, dy.dtype)  # (V, C)
        if ids.size:
            dweight[sorted_ids[starts]] = np.add.reduceat(dy_rows[order], starts, axis=0)
        if padding_idx is not None:
            dweight[padding_idx] = 0
        return dweight

    return y, backward


# --- Softmax and attention --------------------------------------------------------------------


def softmax(x: Array, mask: Mask = None) -> Forward:
    """y = exp(x) / Σ exp(x) over the last axis, counting only the entries where `mask` is True.

    x (..., S)   mask broadcastable to x, by NumPy's rules   ->   y (..., S)

    Masked entries are exactly 0.  A row with nothing left to attend to is all 0, and so is its
    gradient, never the uniform row that a -1e9 fill gives.  A mask hides no NaN, as in torch's
    kernels, where -inf is added to what is masked: one NaN in x, masked or not, makes its row NaN.
    """
    _check_floats("softmax", x=x)
    _check_last_axis("softmax", "x", x, "S")
    check_mask("softmax", mask, x.shape)
    e = _exp_up_to_scale(x, mask)
    total = sum_last(e)  # (..., 1)
    # A masked row has e = 0 throughout: 0 / 1 instead of 0 / 0.  The memory of e becomes that of y
    y = np.divide(e, total + (total == 0), out=e)

    def backward(dy):
        # dx = y (dy - Σ dy y), from dy_i/dx_j = y_i (δ_ij - y_j).
        # Where y is 0 so is the gradient: no second masking.
        dx = _times(dy - sum_last(dy * y), y)
        return dx

    return y, backward


def _times(x: Array, factor: Array | float) -> Array:
    """x * factor, written into x: what a line has just made needs no second array."""
    return np.multiply(x, factor, out=x)


def _exp_up_to_scale(x: Array, mask: Mask) -> Array:
    """e = c exp(x), 0 where masked; c is any factor of a row: softmax divides it out again."""
    if x.min(initial=0) > -60 and x.max(initial=0) < 60:
        # The usual case: e^±60 and its sums are far inside float32, so no row needs its maximum
        # subtracted.  One check of the whole array is 8 times cheaper than a maximum per row.
        e = np.exp(x)
        if mask is not None:
            e *= mask
        return e
    # -inf where masked; NaN - inf is NaN, so a NaN there stays
    scores = x if mask is None else x - np.where(mask, x.dtype.type(0), np.inf)
    top = scores.max(axis=-1, keepdims=True)
    e = np.exp(scores - np.maximum(top, np.finfo(x.dtype).min))  # finite, even where all masked
    return e


def log_softmax(x: Array) -> Forward:
    """y = x - log Σ exp(x) over the last axis.   x (..., S)   ->   y (..., S)"""
    _check_floats("log_softmax", x=x)
    _check_last_axis("log_softmax", "x", x, "S")
    shifted = x - x.max(axis=-1, keepdims=True)  # so that no exp overflows
    y = shifted - np.log(sum_last(np.exp(shifted)))

    def backward(dy):
        # dx = dy - p Σ dy with p = exp(y), from dy_i/dx_j = δ_ij - p_j.
        dx = dy - np.exp(y) * sum_last(dy)
        return dx

    return y, backward


def masked_fill(x: Array, mask: Array, value: float) -> Forward:
    """y = value where mask is True, x elsewhere: torch's masked_fill, with torch's meaning of True.

    x (...)   mask broadcastable with x   ->   y (...)

    Beware of the two meanings: here True is *overwritten*, in an attention mask True is *kept*.
    Hence `masked_fill(scores, ~mask, -np.inf)`.
    """
    _check_masked_fill(x, mask)
    y = np.where(mask, real("masked_fill: value", value), x)
    shape = x.shape

    def backward(dy):
        # dx = dy where the mask is False, and 0 where x was overwritten, by NaN as well.
        dx = unbroadcast(np.where(mask, 0.0, dy), shape)
        return dx

    return y, backward


def attention_weights(q: Array, k: Array, mask: Mask = None) -> Forward:
    """weights = softmax(q kᵀ / √D): how much each query attends to each key   [eq. 1 in part].

    q (..., T, D)   k (..., S, D)   mask -> (..., T, S)   ->   weights (..., T, S)

    Row t holds one number per key, and they sum to 1.  K is transposed because a score is a dot
    product of two rows.  A sum of D products of unit variance has variance D; 1/√D undoes that.
    """
    _check_attention(q, k, mask)
    scale = q.shape[-1] ** -0.5  # a Python float: np.sqrt would turn float32 into float64
    scores = _times(q @ k.mT, scale)  # (..., T, S)
    weights, backward_softmax = softmax(scores, mask)  # (..., T, S)

    def backward(dweights):
        # From scores = q kᵀ / √D:   dq = dscores k / √D,   dk = dscoresᵀ q / √D.
        dscores = backward_softmax(dweights)  # (..., T, S)
        dq = _times(dscores @ k, scale)  # (..., T, D)
        dk = _times(dscores.mT @ q, scale)  # (..., S, D)
        return dq, dk

    return weights, backward


def attention(
    q: Array, k: Array, v: Array, mask: Mask = None, p: float = 0.0, rng: Rng | None = None
) -> Forward:
    """y = softmax(q kᵀ / √D) v: scaled dot-product attention   [Vaswani et al. 2017, eq. 1].

    q (..., T, D)   k (..., S, D)   v (..., S, E)   mask -> (..., T, S)   ->   y (..., T, E)

    Not in eq. 1: the mask (§ 3.2.3), and dropout of the weights, which torch has as well.

    A mask broadcasts by NumPy's rules, from the right, whatever the leading axes mean: with q
    (B, H, T, D), one of (B, T, S) is taken for (H, T, S) where B == H.  The modules refuse it.

    A masked key has weight 0, but 0 · NaN is NaN: a NaN in its key or value reaches every query.
    """
    _check_values(k, v)
    weights, backward_weights = attention_weights(q, k, mask)  # (..., T, S)
    dropped, backward_dropout = dropout(weights, p, rng)  # (..., T, S)
    y = dropped @ v  # (..., T, E)

    def backward(dy):
        # From y = weights v:   dv = weightsᵀ dy,   dweights = dy vᵀ.
        dv = dropped.mT @ dy  # (..., S, E), from the weights *after* dropout: these multiplied v
        dweights = backward_dropout(dy @ v.mT)  # (..., T, S)
        dq, dk = backward_weights(dweights)
        return dq, dk, dv

    return y, backward


# --- Normalisation, activations, dropout ------------------------------------------------------


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Forward:
    """y = weight * xhat + bias, xhat = (x - mean) / √(var + eps)   [Ba et al. 2016, eq. 4].

    x (..., C)   weight, bias (C,)   ->   y (..., C)

    As in PyTorch: statistics over the last axis, biased variance, eps inside the root.
    """
    _check_layer_norm(x, weight, bias)
    eps = not_negative("layer_norm: eps", eps)
    shape, C = x.shape, x.shape[-1]
    x_rows = x.reshape(-1, C)  # (N, C)
    mean = sum_last(x_rows) / C  # (N, 1)
    centred = x_rows - mean  # (N, C).  Centre first: mean(x²) - mean(x)² cancels in float32
    variance = np.vecdot(centred, centred)[:, np.newaxis] / C  # (N, 1)
    rstd = (variance + eps) ** -0.5
    xhat = np.multiply(centred, rstd, out=centred)  # (N, C), in the memory of `centred`
    y = xhat * weight
    y += bias

    def backward(dy):
        # With dxhat = dy * weight, x reaches xhat by three paths: directly, through the mean and
        # through the variance.   dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))
        # Over the rows, dweight = Σ dy * xhat and dbias = Σ dy.
        dy_rows = dy.reshape(-1, C)  # (N, C)
        dy_xhat = dy_rows * xhat
        mean_dxhat = dy_rows @ (weight / C)  # (N,): the mean of dxhat, by a matrix-vector product
        mean_dxhat_xhat = dy_xhat @ (weight / C)  # (N,)
        dx = dy_rows * weight  # (N, C)
        dx -= xhat * mean_dxhat_xhat[:, np.newaxis]
        dx -= mean_dxhat[:, np.newaxis]
        dx *= rstd
        return dx.reshape(shape), sum_rows(dy_xhat), sum_rows(dy_rows)

    return y.reshape(shape), backward


def relu(x: Array) -> Forward:
    """y = max(x, 0); the gradient at 0 is 0, at NaN dy, as in torch.   x (...)   ->   y (...)

    Where x < 0 a dy of NaN or infinity gives NaN: it is multiplied by 0.  (torch puts 0 there.)
    """
    _check_floats("relu", x=x)
    zeros = np.zeros(x.shape[-1:], x.dtype)  # a row of them: a scalar costs 2.5 times as much
    y = np.maximum(x, zeros)

    def backward(dy):
        # dx = dy where x > 0, else 0; where x is NaN, so is y, and dy goes on as in torch.
        # A product is ten times as fast as indexing with the condition.
        dx = dy * (y != 0)
        return dx

    return y, backward


def gelu(x: Array) -> Forward:
    """y = x Φ(x), Φ the normal distribution function   [Hendrycks and Gimpel 2016, § 2].

    x (...)   ->   y (...)          torch's gelu(approximate="none")
    """
    _check_floats("gelu", x=x)
    cdf = 0.5 * (1 + erf(x * 0.5**0.5))  # Φ(x)
    y = x * cdf

    def backward(dy):
        # dx = dy (Φ(x) + x φ(x)), φ = Φ' the normal density.
        pdf = np.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5  # φ(x)
        dx = dy * (cdf + x * pdf)
        return dx

    return y, backward


def gelu_tanh(x: Array) -> Forward:
    """y = x (1 + tanh u) / 2, u = √(2/π) (x + 0.044715 x³): GPT-2's approximation of gelu.

    x (...)   ->   y (...)          torch's gelu(approximate="tanh"); up to 5e-4 away from `gelu`
    """
    _check_floats("gelu_tanh", x=x)
    c = math.sqrt(2 / math.pi)
    x_squared = x * x  # x**3 would call pow, 40 times slower than two products
    tanh = np.tanh(c * x * (1 + 0.044715 * x_squared))
    y = 0.5 * x * (1 + tanh)

    def backward(dy):
        # dx = dy (1 + tanh u + x (1 - tanh² u) du/dx) / 2, as d tanh u / du = 1 - tanh² u.
        du = c * (1 + 3 * 0.044715 * x_squared)  # du/dx
        dx = dy * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * du)
        return dx

    return y, backward


def dropout(x: Array, p: float, rng: Rng | None) -> Forward:
    """y = x m / (1 - p), m 0 with probability p, else 1: scaled, so that E[y] = x.

    x (...)   ->   y (...)          "inverted" dropout   [Srivastava et al. 2014, § 10]

    Passing an rng *is* training mode: there is no flag to forget.
    """
    _check_floats("dropout", x=x)
    p = probability("dropout: p", p)
    if rng is None or p == 0:
        return x, lambda dy: dy
    factor = dropout_mask(x.shape, p, rng).astype(x.dtype)  # 0 or 1 ...
    factor *= 1 / (1 - p) if p < 1 else 0.0  # ... and to scale what is kept.  p = 1 keeps nothing
    y = x * factor

    def backward(dy):
        # dx = dy * factor: what was dropped learns nothing.
        dx = dy * factor
        return dx

    return y, backward


def dropout_mask(shape: tuple[int, ...], p: float, rng: Rng) -> Array:
    """keep = (u >= p) for u uniform in [0, 1): True where an entry stays.

    The only place that draws, so the only one to record or replay.
    """
    n = math.prod(shape)
    words = rng.integers(2**64, size=-(-n // 4), dtype=np.uint64)  # 4 entries from each 64 bits
    bits = words.astype("<u8", copy=False).view("<u2")[:n]  # 16 bits resolve p to 1/65536
    return bits.reshape(shape) >= round(p * 2**16)


# --- The loss ---------------------------------------------------------------------------------


def cross_entropy(
    logits: Array,
    targets: Array,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    n_targets: int | None = None,
) -> Forward:
    """loss = mean of -Σᵥ t_v log p_v, with p = softmax(logits) and t the smoothed one-hot target.

    logits (..., V)   targets (...) integers   ->   loss (), in nats per target

    t = (1 - ε) onehot + ε / V with ε = label_smoothing   [Szegedy et al. 2016, § 7], as in torch.
    The mean is over the targets that are not `ignore_index`.  `n_targets` overrides their number:
    a step split into micro-batches gives every part the count of the whole step, and the parts'
    losses and gradients then add up to the whole's.  An ignored row is ignored whatever is in it,
    NaN among it (torch's gradient there would be NaN).  No target at all: the loss is NaN, as in
    torch, the gradient 0, and a warning says so.
    """
    _check_cross_entropy(logits, targets, ignore_index, label_smoothing, n_targets)
    label_smoothing = float(label_smoothing)  # np.float64 would promote float32
    shape, V = logits.shape, logits.shape[-1]
    ids = targets.reshape(-1)  # (N,)
    counted = np.full(ids.shape, True) if ignore_index is None else ids != ignore_index  # (N,)
    labels = np.where(counted, ids, 0)  # (N,): any valid class, these rows are left out below
    rows = np.arange(len(labels))
    n = int(counted.sum() if n_targets is None else n_targets)  # and so would np.int64
    if n == 0:
        warnings.warn("cross_entropy: every target is ignored, so the loss is NaN", stacklevel=2)

    logits_rows = logits.reshape(-1, V)  # (N, V)
    shifted = logits_rows - logits_rows.max(axis=-1, keepdims=True)  # so that no exp overflows
    e = np.exp(shifted)  # (N, V)
    total = sum_last(e)  # (N, 1)
    p = np.divide(e, total, out=e)  # (N, V), in the memory of e
    log_total = np.log(total[:, 0])  # (N,): log p_v = shifted_v - log_total
    losses = (1 - label_smoothing) * (log_total - shifted[rows, labels])  # (N,)
    if label_smoothing:
        losses += label_smoothing * (log_total - sum_last(shifted)[:, 0] / V)
    loss = losses[counted].sum() / n if n else logits.dtype.type(np.nan)

    def backward(dloss=1.0):
        # dlogits = (p - t) / n, the gradient of -Σ t_v log p_v over n; 0 where not counted.
        scale = float(dloss) / max(n, 1)
        dlogits = p * scale  # (N, V)
        if label_smoothing:
            dlogits -= scale * label_smoothing / V
        dlogits[rows, labels] -= scale * (1 - label_smoothing)
        dlogits[~counted] = 0
        return dlogits.reshape(shape)

    return loss, backward


# --- The error function, which NumPy does not have --------------------------------------------


def erf(x: Array) -> Array:
    """erf(x) = 2/√π ∫₀ˣ exp(-t²) dt, by the rational forms of Cephes' ndtr.c [Moshier 1989].

    Within 3 units in the last place of the true value, in float32 and float64.  No backward: it is
    a step inside `gelu`.
    """
    a = np.minimum(np.abs(x), 6.0)  # erf(6) is 1 to the last digit; NaN stays NaN
    z = a * a
    near = a * _polynomial(z, _ERF_T) / _polynomial(z, _ERF_U)
    far = 1 - np.exp(-z) * _polynomial(a, _ERF_P) / _polynomial(a, _ERF_Q)
    return np.copysign(np.where(a < 1, near, far), x)


def _polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    """y = Σ c xⁿ with these coefficients c, highest power first, by Horner's rule."""
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y *= x
        y += c
    return y


# fmt: off
# erf(x) = x T(x²) / U(x²) for |x| < 1;   1 - erf(x) = exp(-x²) P(x) / Q(x) for 1 <= x < 8.
_ERF_T = (9.60497373987051638749e0, 9.00260197203842689217e1, 2.23200534594684319226e3,
          7.00332514112805075473e3, 5.55923013010394962768e4)
_ERF_U = (1.0, 3.35617141647503099647e1, 5.21357949780152679795e2, 4.59432382970980127987e3,
          2.26290000613890934246e4, 4.92673942608635921086e4)
_ERF_P = (2.46196981473530512524e-10, 5.64189564831068821977e-1, 7.46321056442269912687e0,
          4.86371970985681366614e1, 1.96520832956077098242e2, 5.26445194995477358631e2,
          9.34528527171957607540e2, 1.02755188689515710272e3, 5.57535335369399327526e2)
_ERF_Q = (1.0, 1.32281951154744992508e1, 8.67072140885989742329e1, 3.54937778887819891062e2,
          9.75708501743205489753e2, 1.82390916687909736289e3, 2.24633760818710981792e3,
          1.65666309194161350182e3, 5.57535340817727675546e2)
# fmt: on


# --- At the entrance: what is refused, and what was probably meant ----------------------------


_FLOATS = {np.dtype(np.float32), np.dtype(np.float64)}


def _check_arrays(op: str, **arrays: Array) -> None:
    """All are NumPy arrays of one dtype."""
    dtypes = {}
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{op}: {name} must be a NumPy array, got {type(x).__name__}")
        dtypes[name] = x.dtype
    if len(set(dtypes.values())) > 1:
        seen = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{op}: mixed dtypes ({seen}); convert one with .astype()")


def _check_floats(op: str, **arrays: Array) -> None:
    """All are NumPy arrays of one dtype, which is float32 or float64."""
    dtype = None
    for x in arrays.values():  # said quickly: a decoder's small steps ask a hundred times
        if type(x) is not np.ndarray or (dtype is not None and x.dtype is not dtype):
            break
        dtype = x.dtype
    else:
        if dtype in _FLOATS:
            return
    _check_arrays(op, **arrays)
    name, x = next(iter(arrays.items()))
    if x.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name} must be float32 or float64, got {x.dtype}")


def _check_differentiable(op: str, x: Array) -> None:
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"{op}: {x.dtype} has no gradient; convert the inputs to a float dtype")


def _check_ranks(op: str, a: Array, a_ndim: int, b: Array, b_ndim: int) -> None:
    _check_arrays(op, a=a, b=b)
    if (a.ndim, b.ndim) != (a_ndim, b_ndim):
        raise ValueError(
            f"{op}: a must be {a_ndim}-D and b {b_ndim}-D, got shapes {a.shape} and {b.shape}; "
            "matmul takes every rank from 1-D up"
        )


def _check_matmul(a: Array, b: Array) -> None:
    _check_arrays("matmul", a=a, b=b)
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError(
            f"matmul: both operands must be at least 1-D, got shapes {a.shape} and {b.shape}; "
            "multiply by a scalar with *"
        )
    k_a, k_b = a.shape[-1], b.shape[-2] if b.ndim > 1 else b.shape[0]
    if k_a != k_b:
        which = "second to last" if b.ndim > 1 else "only"
        raise ValueError(
            f"matmul: the last axis of a ({k_a}) must equal the {which} axis of b ({k_b}), "
            f"got shapes {a.shape} and {b.shape}"
        )
    try:
        np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(
            f"matmul: the leading axes {a.shape[:-2]} and {b.shape[:-2]} do not broadcast: aligned "
            "from the right, each pair must be equal or contain a 1"
        ) from None


def _check_linear(x: Array, weight: Array, bias: Array | None) -> None:
    if bias is None:
        _check_floats("linear", x=x, weight=weight)
    else:
        _check_floats("linear", x=x, weight=weight, bias=bias)
    if weight.ndim != 2:
        raise ValueError(f"linear: weight must be (O, I), got shape {weight.shape}")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x must be (..., I) with I = {weight.shape[1]}, got shape {x.shape}; "
            f"weight is stored (O, I) = {weight.shape}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must be (O,) = {weight.shape[:1]}, got shape {bias.shape}")


def _check_ids(op: str, ids: Array, n_rows: int) -> None:
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
        kind = ids.dtype if isinstance(ids, np.ndarray) else type(ids).__name__
        raise TypeError(f"{op}: ids must be an integer array, got {kind}")
    if ids.size and not (ids.min() >= 0 and ids.max() < n_rows):
        bad = ids[(ids < 0) | (ids >= n_rows)].flat[0]
        raise ValueError(
            f"{op}: id {bad} is not in the vocabulary of {n_rows} (ids 0..{n_rows - 1})"
        )


def _check_embedding(ids: Array, weight: Array, padding_idx: int | None) -> None:
    _check_floats("embedding", weight=weight)
    if weight.ndim != 2:
        raise ValueError(f"embedding: weight must be (V, C), got shape {weight.shape}")
    _check_ids("embedding", ids, len(weight))
    if padding_idx is None:
        return
    if not 0 <= integer("embedding: padding_idx", padding_idx) < len(weight):
        raise ValueError(
            f"embedding: padding_idx must be in 0..{len(weight) - 1}, a row of weight, "
            f"got {padding_idx}"
        )


def _check_last_axis(op: str, name: str, x: Array, letter: str) -> None:
    """There is one, and it is not empty."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{op}: {name} must be (..., {letter}) with {letter} at least 1, got shape {x.shape}"
        )


def _check_attention(q: Array, k: Array, mask: Mask) -> None:
    _check_floats("attention", q=q, k=k)
    if min(q.ndim, k.ndim) < 2 or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "attention: q must be (..., T, D) and k (..., S, D) with the same leading axes and D, "
            f"got shapes {q.shape} and {k.shape}"
        )
    if k.shape[-2] == 0:
        raise ValueError(
            f"attention: there are no keys to attend to (S = 0), k has shape {k.shape}"
        )
    if k.shape[-1] == 0:
        raise ValueError(f"attention: there is nothing to compare (D = 0), q has shape {q.shape}")
    check_mask("attention", mask, (*q.shape[:-1], k.shape[-2]))


def _check_values(k: Array, v: Array) -> None:
    _check_floats("attention", k=k, v=v)
    if k.ndim < 2 or v.ndim < 2 or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            "attention: k must be (..., S, D) and v (..., S, E), one value for every key, "
            f"got shapes {k.shape} and {v.shape}"
        )


def check_boolean(op: str, mask: Array, meaning: str, name: str = "mask") -> None:
    """A mask is boolean and nothing else; say how to convert what it looks like."""
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        return
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"{op}: {name} must be a boolean NumPy array, got {type(mask).__name__}")
    if np.isin(mask, (0, 1)).all():
        looks = "0s and 1s"
        fix = f"mask == 1 if 1 means '{meaning}', mask == 0 if it means the opposite"
    elif mask.max(initial=-np.inf) <= 0:
        looks, fix = "an additive mask (0 and very negative numbers)", "mask == 0"
    else:
        looks, fix = "neither 0/1 nor 0/-inf", "a comparison that is True where you want it"
    raise TypeError(
        f"{op}: {name} must be boolean, True = {meaning}; got {mask.dtype}, {looks}: pass {fix}"
    )


def check_mask(op: str, mask: Mask, shape: tuple[int, ...], name: str = "mask") -> None:
    """A mask is boolean and broadcasts to the scores that it is for."""
    if mask is None:
        return
    check_boolean(op, mask, "may attend", name)
    aligned = zip(mask.shape[::-1], shape[::-1], strict=False)  # from the right, as broadcasting is
    if mask.ndim > len(shape) or any(m not in (1, n) for m, n in aligned):
        letters = "(B, H, T, S)" if len(shape) == 4 else "(..., T, S)"
        raise ValueError(
            f"{op}: {name} of shape {mask.shape} does not broadcast to {letters} = {shape}; "
            "a padding mask is (B, 1, 1, S), a causal one (T, S), one per sample (B, 1, T, S)"
        )


def _check_masked_fill(x: Array, mask: Array) -> None:
    _check_floats("masked_fill", x=x)
    check_boolean("masked_fill", mask, "may be overwritten")
    try:
        np.broadcast_shapes(x.shape, mask.shape)
    except ValueError:
        raise ValueError(
            f"masked_fill: mask of shape {mask.shape} does not broadcast with x of shape {x.shape}"
        ) from None


def _check_layer_norm(x: Array, weight: Array, bias: Array) -> None:
    _check_floats("layer_norm", x=x, weight=weight, bias=bias)
    _check_last_axis("layer_norm", "x", x, "C")
    if not x.shape[-1:] == weight.shape == bias.shape:
        raise ValueError(
            "layer_norm: x must be (..., C), weight and bias (C,), "
            f"got shapes {x.shape}, {weight.shape} and {bias.shape}"
        )


def _check_cross_entropy(logits, targets, ignore_index, label_smoothing, n_targets) -> None:
    _check_floats("cross_entropy", logits=logits)
    _check_last_axis("cross_entropy", "logits", logits, "V")
    if not isinstance(targets, np.ndarray) or not np.issubdtype(targets.dtype, np.integer):
        raise TypeError("cross_entropy: targets must be an integer array of class ids")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            "cross_entropy: logits must be (..., V) and targets (...), "
            f"got shapes {logits.shape} and {targets.shape}"
        )
    if ignore_index is not None:
        targets = targets[targets != integer("cross_entropy: ignore_index", ignore_index)]
    _check_ids("cross_entropy", targets, logits.shape[-1])
    probability("cross_entropy: label_smoothing", label_smoothing)
    if n_targets is not None:
        integer("cross_entropy: n_targets", n_targets, least=1)
