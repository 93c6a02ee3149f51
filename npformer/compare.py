"""Are two arrays the same up to rounding, and if not, how do they differ?

Three questions, in this order:

    how far may they be apart?   sum_of_products_bound, softmax_bound, layer_norm_bound, peer_bound
    are they that close?         report, assert_close; compare_tensors and table for a whole model
    if not, what went wrong?     the hints at the end of a report

A bound is derived, never typed in.  eps is the distance from 1 to the next number, so that one
operation errs by at most eps / 2; when both sides of a comparison made n of them, the bound is
n * eps * magnitude, where the magnitude is what the numbers would have been without cancellation.

NumPy only; nothing else of ours is imported, and the arrays may come from anywhere.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Bound = Any  # absolute errors: a float, or an array that broadcasts to the compared one


# --- Bounds -----------------------------------------------------------------------------------


def eps(dtype: Any) -> float:
    """The distance from 1 to the next number: 1.2e-7 for float32, 2.2e-16 for float64.

    Also for "bfloat16", which NumPy does not have: 7.8e-3.
    """
    return 2.0**-7 if str(dtype) == "bfloat16" else float(np.finfo(dtype).eps)


def tiny(dtype: Any) -> float:
    """The smallest normal number: below it rounding is absolute, and some kernels flush to 0."""
    return float(np.finfo(dtype).tiny)


def sum_of_products_bound(n: Bound, magnitude: Bound, dtype: Any) -> Bound:
    """n eps magnitude, for a sum of n products whose absolute values add up to `magnitude`.

    Each side errs by n eps / 2, in whatever order it adds   [Higham 2002, § 3.1].
    """
    return n * (eps(dtype) * magnitude + tiny(dtype))


def softmax_bound(x: Array, y: Array, dtype: Any, mask: Array | None = None) -> Array:
    """(S + max - min + 5) eps y.   x, y (..., S)   mask broadcastable to x   ->   (..., S)

    On each side x - max is rounded, which exp turns into (max - min) eps / 2 of relative error in
    the numerator and less than eps / 4 in the total, where distant terms count for little; then
    S / 2 eps for the sum, 1 for each of two exps, 1/2 for the division.
    """
    attended = np.broadcast_to(True if mask is None else mask, x.shape)
    top = np.max(x, axis=-1, keepdims=True, initial=-np.inf, where=attended)
    bottom = np.min(x, axis=-1, keepdims=True, initial=np.inf, where=attended)
    spread = np.maximum(top - bottom, 0.0)  # -inf where nothing is attended to
    return sum_of_products_bound(x.shape[-1] + spread + 5, np.abs(y), dtype)


def layer_norm_bound(
    x: Array, weight: Array, bias: Array, dtype: Any, variance_eps: float = 1e-5
) -> Array:
    """C eps (|w| (max |x| rstd + |xhat|) + |b|).   x (..., C)   weight, bias (C,)   ->   (..., C)

    The mean errs by C eps / 2 of max |x|, and rstd magnifies that: a constant row is all error.
    """
    centred = x - x.mean(axis=-1, keepdims=True)
    rstd = (np.square(centred).mean(axis=-1, keepdims=True) + variance_eps) ** -0.5
    top = np.abs(x).max(axis=-1, keepdims=True)
    magnitude = np.abs(weight) * (top * rstd + np.abs(centred * rstd)) + np.abs(bias)
    return sum_of_products_bound(x.shape[-1], magnitude, dtype)


def peer_bound(
    peer: Array, oracle64: Array, nudged64: Array, n: float, floor: float = 0.0, dtype: Any = None
) -> float:
    """2 (max|peer - oracle| + max|nudged - oracle|) + n eps max|oracle|.

    No bound in closed form is tight for a whole model.  So a float32 result is judged by an equal
    that did the same: it may err, against the float64 oracle, twice as much as a `peer` does that
    is known to be good.  `nudged` (K, ...) is the oracle K times again, from inputs and weights
    that are off by one float32 rounding each.  Where the function itself magnifies that (LayerNorm
    over two features that are almost equal: up to 1/sqrt(eps)), the error of the peer is large or
    small by luck.
    `floor` is the largest gradient of the model: a tensor whose gradient is 0 in theory (the bias
    of k_proj) holds nothing but noise, and is measured on that scale.
    `dtype` is what the peer was computed in, where its array cannot say: "bfloat16".
    """
    error = _largest(peer.astype(np.float64) - oracle64) + _largest(nudged64 - oracle64)
    unit = eps(peer.dtype if dtype is None else dtype)
    return 2 * error + n * unit * max(_largest(oracle64), floor)


def peer_bounds(
    peers: Mapping[str, Array],
    oracles: Mapping[str, Array],
    nudged: Mapping[str, Array],
    n: float,
    outputs: Sequence[str] = (),
    dtype: Any = None,
) -> dict[str, float]:
    """`peer_bound` for the outputs of a model and for every gradient, all the other names.

    An output is measured on its own scale, a gradient at least on that of the largest of them all.
    """
    floor = max((_largest(x) for k, x in oracles.items() if k not in outputs), default=0.0)
    return {
        k: peer_bound(peers[k], x, nudged[k], n, 0.0 if k in outputs else floor, dtype)
        for k, x in oracles.items()
    }


def roundings_of_a_step(config: Any, length: int, dtype: Any) -> float:
    """n of `peer_bound` for a model's logits, loss and gradients, in any precision.

    config   a TransformerConfig      length   the positions of its longest sequence

    float32, float64: each term of a sum is rounded as it is added, so n is the longest sum.
    Half precisions add up in float32 (torch: allow_..._reduced_precision_reduction = False) and
    round what they store.  On its way through a layer a value is stored by each attention as q or
    k, score, weight, mean, projection, sum with the residual and norm, by a feed-forward network
    as two products, activation, sum and norm; besides there are the embedding, its sum with the
    position, the last norm and the logits; and backward goes the same way.  Roundings that have
    nothing to do with each other go up and down: r of them add up to √r, not r  [Higham & Mary
    2019, § 3].
    """
    if eps(dtype) <= eps(np.float32):
        return config.d_model + config.d_ff + length
    n_encoder, n_decoder = config.n_encoder_layers, config.n_decoder_layers
    attentions = n_encoder + n_decoder * (2 if n_encoder else 1)
    forward = 7 * attentions + 5 * (n_encoder + n_decoder) + 4
    return (2 * forward) ** 0.5


def nudge(x: Array, rng: np.random.Generator) -> Array:
    """x, each entry up or down by half an ulp of float32: as if it had been rounded."""
    return x * (1 + eps(np.float32) / 2 * rng.choice([-1, 1], x.shape))


def max_norm_error(actual: Array, expected: Array, scale: float) -> float:
    """max |actual - expected| / scale."""
    return _largest(np.subtract(actual, expected, dtype=np.float64)) / scale


def _largest(x: Array) -> float:
    return float(np.abs(x).max(initial=0))


# --- One tensor -------------------------------------------------------------------------------


def assert_close(
    name: str, actual: Any, expected: Any, bound: Bound, mask: Array | None = None
) -> None:
    """Raise AssertionError with the report, if there is one."""
    __tracebackhide__ = True  # pytest then shows the line that called, not this one
    failure = report(name, actual, expected, bound, mask)
    if failure is not None:
        raise AssertionError(failure)


def report(
    name: str, actual: Any, expected: Any, bound: Bound, mask: Array | None = None
) -> str | None:
    """None if |actual - expected| <= bound everywhere, else what differs, where, and likely why.

    bound   absolute errors, a number or an array that broadcasts to `actual`
    mask    True = attended, broadcastable to `actual`: to recognise an error at masked entries only

    NaN agrees with NaN, inf with inf; dtypes may differ.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    head = f"{name} {actual.shape} {actual.dtype}"
    if actual.shape != expected.shape:
        lines = [f"{head}: expected the shape {expected.shape}"]
        if _same(_transposed(actual), expected, 1e-3 * _largest(expected)):
            lines.append("  hint: transposed: actual.mT agrees with expected")
        return "\n".join(lines)

    error, tolerances = _errors(actual, expected, bound)
    out = ~(tolerances <= 1)  # NaN is out
    if not out.any():
        return None
    worst = np.unravel_index(np.argmax(tolerances), out.shape)
    a, e = actual[worst], expected[worst]
    lines = [
        f"{head}: {out.sum()} of {out.size} entries are out of bound",
        f"  worst at {tuple(map(int, worst))}: actual {a!s}, expected {e!s}",
        f"  error {error[worst]:.3g} = {tolerances[worst]:.3g} tolerances"
        f" = {_ulps(actual, expected)[worst]:.3g} ulps",
    ]
    lines += [f"  hint: {hint}" for hint in _hints(actual, expected, bound, out, mask)]
    return "\n".join(lines)


def _errors(actual: Array, expected: Array, bound: Bound) -> tuple[Array, Array]:
    """|actual - expected|, and the same in units of the bound: inf where only one is finite."""
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(a - e)
        error = np.where((a == e) | (np.isnan(a) & np.isnan(e)), 0.0, error)
        error = np.where(np.isnan(error), np.inf, error)
        tolerances = np.where(error == 0, 0.0, error / np.asarray(bound, np.float64))
    return error, np.where(
        np.isnan(tolerances), np.inf, tolerances
    )  # a bound of NaN allows nothing


def _same(actual: Array, expected: Array, bound: Bound) -> bool:
    if actual.shape != expected.shape:
        return False
    return bool((_errors(actual, expected, bound)[1] <= 1).all())


def _ulps(actual: Array, expected: Array) -> Array:
    """The error in units of the last place of the larger value, in the coarser of the dtypes."""
    dtypes = [x.dtype for x in (actual, expected) if np.issubdtype(x.dtype, np.floating)]
    coarse = max(dtypes, key=eps, default=np.dtype(np.float64))
    error = _errors(actual, expected, 1.0)[0]
    with np.errstate(invalid="ignore", over="ignore"):
        larger = np.maximum(np.abs(actual), np.abs(expected)).astype(coarse)
        ulp = np.spacing(np.where(np.isfinite(larger), larger, 1)).astype(np.float64)
    return error / ulp


# --- Hints: each is said only where it is true ------------------------------------------------


def _hints(
    actual: Array, expected: Array, bound: Bound, out: Array, mask: Array | None
) -> Iterator[str]:
    if actual.dtype != expected.dtype:
        yield f"the dtypes differ: actual is {actual.dtype}, expected {expected.dtype}"
    for side, x, other in (("actual", actual, expected), ("expected", expected, actual)):
        bad = ~np.isfinite(x) & np.isfinite(other)
        if bad.any():
            kind = "NaN" if np.isnan(x[bad]).any() else "infinite"
            yield f"{side} is {kind} in {bad.sum()} entries where the other side is finite"

    if not actual.any():
        yield "actual is 0 everywhere"
    elif _same(actual, -expected, bound):
        yield "the sign is flipped: -actual agrees with expected"
    else:
        yield from _constant_factor(actual, expected, bound)
    if actual.ndim >= 2 and _same(_transposed(actual), expected, bound):
        yield "transposed: actual.mT agrees with expected"

    if actual.ndim >= 2:
        bad_rows = np.argwhere(out.any(axis=-1))
        n_rows = out.size // out.shape[-1]
        if len(bad_rows) < n_rows:
            shown = ", ".join(str(tuple(map(int, row))) for row in bad_rows[:4])
            more = f" and {len(bad_rows) - 4} more" if len(bad_rows) > 4 else ""
            yield f"only some rows: {len(bad_rows)} of {n_rows} are out: {shown}{more}"
    if mask is not None and not (out & np.broadcast_to(mask, out.shape)).any():
        yield "only masked entries are out: every entry where the mask is True agrees"


def _constant_factor(actual: Array, expected: Array, bound: Bound) -> Iterator[str]:
    """actual = c * expected, c by least squares: one number cannot explain two by accident."""
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(e).all() and np.count_nonzero(e) >= 2):
        return
    unit = e / np.abs(e).max()  # whose squares neither vanish nor overflow
    with np.errstate(over="ignore"):
        c = float(np.vdot(unit, a / np.abs(e).max()) / np.vdot(unit, unit))
    # Rounding is all that may be left over, however far c is from 1.
    if (
        c
        and np.isfinite(c)
        and _same(actual, c * e, max(1.0, abs(c)) * np.asarray(bound) + 4 * eps("f8") * abs(a))
    ):
        yield f"a constant factor: actual = {c:.6g} * expected{_name_of(c)}"


def _name_of(c: float) -> str:
    """What the factor c probably is, if it is something simple and does not say so itself."""
    if not 1e-4 < abs(c) < 1e4:  # its powers may be out of range
        return ""
    sign = "-" if c < 0 else ""
    if abs(c - round(c)) < 1e-6 * abs(c) or not 1e-5 < abs(c) < 1e5:
        return ""  # says so itself, or is none of those below
    for value, pattern in ((1 / abs(c), "1/{}"), (c**2, "√{}"), (c**-2, "1/√{}")):
        n = round(value)
        if 2 <= n <= 4096 and abs(value - n) < 1e-4 * n:
            return f" ({sign}{pattern.format(n)}?)"
    return ""


def _transposed(x: Array) -> Array:
    return x.mT if x.ndim >= 2 else x


# --- A whole model ----------------------------------------------------------------------------


class Row(NamedTuple):
    """One tensor of a comparison.  `tolerances` is its worst error over the bound there."""

    name: str
    max_error: float
    scale: float  # max |expected|
    tolerances: float
    note: str  # the report, or why there was nothing to compare; "" if all is well

    @property
    def ok(self) -> bool:
        return not self.note


def compare_tensors(
    actual: Mapping[str, Array],
    expected: Mapping[str, Array],
    bounds: Mapping[str, Bound] | Callable[[str, Array], Bound],
) -> list[Row]:
    """One row for each name, in the order of `expected`, then the names that it does not have.

    bounds   {name: bound}, or a function of (name, expected array)

    Tensors are paired by name, never by position.  Give gradients in the order in which backward
    makes them (last layer first): the first row that is out is then nearest to the mistake.
    """
    rows = []
    for name, e in expected.items():
        if name not in actual:
            rows.append(Row(name, np.nan, _largest(e), np.inf, "missing: only expected has it"))
            continue
        bound = bounds(name, e) if callable(bounds) else bounds[name]
        failure = report(name, actual[name], e, bound)
        if np.shape(actual[name]) != np.shape(e):
            rows.append(Row(name, np.nan, _largest(e), np.inf, failure or ""))
            continue
        error, tolerances = _errors(np.asarray(actual[name]), np.asarray(e), bound)
        rows.append(Row(name, _largest(error), _largest(e), _largest(tolerances), failure or ""))
    for name in actual:
        if name not in expected:
            rows.append(Row(name, np.nan, np.nan, np.inf, "unknown: only actual has it"))
    return rows


def table(rows: Iterable[Row]) -> str:
    """The rows as text, the first that is out marked, and its report below."""
    rows = list(rows)
    width = max([len("tensor"), *(len(row.name) for row in rows)])
    lines = [f"  {'tensor':<{width}}  {'max error':>9}  {'scale':>9}  {'error/bound':>11}"]
    first = next((row for row in rows if not row.ok), None)
    for row in rows:
        mark = "ok" if row.ok else "the first difference" if row is first else "differs"
        lines.append(
            f"{'>' if row is first else ' '} {row.name:<{width}}  {row.max_error:9.2e}"
            f"  {row.scale:9.2e}  {row.tolerances:11.3g}  {mark}"
        )
    if first is not None:
        lines += ["", first.note if first.name in first.note else f"{first.name}: {first.note}"]
    return "\n".join(lines)
