"""Masks in words: who may attend to whom, who not, and why.

print(explain_mask(ids=np.array([[3, 4, 0]]), pad_id=0, causal=True))
print(explain_mask(mask))       # of any library: boolean, 0/1 or additive
"""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from npformer import storage
from npformer.checkpoint import blame
from npformer.masks import causal_mask, padding_mask, window_mask
from npformer.ops import Array
from npformer.options import flag, integer

VERY_NEGATIVE = -100.0  # what is added to a score to hide it; a learned bias is nearer to 0
MARKS = {"given": "g", "window": "w", "causal": "c", "padding": "p"}
MEANINGS = {
    "padding": "the key is a pad",
    "causal": "the key comes after the query",
    "window": "the key is too far back",
    "given": "the mask that was given says so",
}
MOST_SAMPLES, MOST_TOKENS = 4, 40  # that are shown
MOST_PAIRS = 1 << 24  # of a query and a key, of all samples and heads: 4096 x 4096
LARGEST_FILE = 128 << 20  # bytes: so many in float64


class Reading(NamedTuple):
    """A mask as booleans, True = may attend, and what it was taken for."""

    allowed: Array
    looks: str


def read_mask(mask: Any) -> Reading:
    """What somebody's mask means, or what it may mean where its values do not say.

    mask   NumPy or torch; boolean of either polarity, 0/1, or additive (0 and very negative)

    Raises TypeError for numbers that are none of these.
    """
    x = mask.detach().cpu() if hasattr(mask, "detach") else mask
    x = np.asarray(x.float() if str(getattr(x, "dtype", "")) == "torch.bfloat16" else x)
    if x.dtype.kind not in "biuf" or not x.size or not 1 <= x.ndim <= 4:
        raise TypeError(
            "a mask is an array of booleans or numbers with one to four axes, "
            f"got {x.dtype} {x.shape}"
        )
    if x.dtype == bool:
        return _of_two_values(x, "boolean")
    if np.isin(x, (0, 1)).all():
        return _of_zeros_and_ones(x)
    if ((x == 0) | (x <= VERY_NEGATIVE)).all():
        return Reading(x == 0, _of_an_additive(x))
    raise TypeError(
        "the mask is neither boolean, nor 0 and 1, nor 0 and very negative numbers: its values "
        f"go from {x.min():g} to {x.max():g}"
    )


def _of_two_values(x: Array, kind: str) -> Reading:
    """Which polarity?  Declared where the opposite makes no sense; else both are said."""
    may, may_not = "True = may attend", "True = may NOT attend, as in nn.MultiheadAttention"
    opposite = "the other way round no query would see itself, and some would see nothing"
    if _is_forced(x):
        return Reading(x, f"{kind}, {may}: {opposite}")
    if _is_forced(~x):
        return Reading(~x, f"{kind}, {may_not}: {opposite}")
    # Which one is shown: where fewer queries see nothing, and then where each sees itself
    rank = [(_n_empty(allowed), not _all_see_themselves(allowed)) for allowed in (x, ~x)]
    inverted = rank[1] < rank[0]
    return Reading(
        ~x if inverted else x,
        f"{kind}, of which polarity its values do not say\n"
        f"  if {may}, as here and in F.scaled_dot_product_attention: {_pairs(x)}\n"
        f"  if {may_not}: {_pairs(~x)}\n"
        f"  the tables below take it for the {'second' if inverted else 'first'}",
    )


def _is_forced(allowed: Array) -> bool:
    """Every query sees itself and not only what comes later; the opposite leaves some with nothing.

    So the causal mask without its diagonal is not taken for the opposite of its mirror image.
    """
    sees_later_alone = np.triu(allowed, 1).any() and not np.tril(allowed, -1).any()
    sees_itself = _all_see_themselves(allowed) and not allowed.all()
    return sees_itself and not sees_later_alone and _n_empty(~allowed) > 0


def _all_see_themselves(allowed: Array) -> bool:
    is_square = allowed.ndim > 1 and allowed.shape[-1] == allowed.shape[-2] > 1
    return is_square and bool(np.diagonal(allowed, axis1=-2, axis2=-1).all())


def _n_empty(allowed: Array) -> int:
    return int((~allowed.any(axis=-1)).sum())


def _pairs(allowed: Array) -> str:
    """How much a reading lets through."""
    if allowed.all():
        return "everything may be attended to"
    if not allowed.any():
        return "nothing may be attended to"
    empty = f", rows with nothing to attend to: {n}" if (n := _n_empty(allowed)) else ""
    return f"{int(allowed.sum())} of {allowed.size} may be attended to{empty}"


def _of_zeros_and_ones(x: Array) -> Reading:
    """Numbers may also be meant to be added to the scores."""
    if x.min() == x.max():
        _, looks = _of_two_values(x == 1, f"nothing but {int(x.max())} ({x.dtype})")
        added = "everything may be attended to, for what all scores have in common drops out"
        return Reading(np.ones_like(x, bool), f"{looks}\n  if it is added to the scores: {added}")
    allowed, looks = _of_two_values(x == 1, f"0s and 1s ({x.dtype})")
    if x.dtype.kind == "f":
        looks += (
            "\n  beware: F.scaled_dot_product_attention *adds* a float mask, so that this one"
            "\n    would hide nothing, and make the weights at its 1s 2.718 times as large"
        )
    return Reading(allowed, looks)


def _of_an_additive(x: Array) -> str:
    least, most = float(x.min()), float(x[x != 0].max())
    fill = f"{most:g}" if least == most else f"{least:g} to {most:g}"
    lines = [f"additive ({x.dtype}): 0 = may attend, {fill} = may not"]
    alone = "  a row of nothing else:"
    if not math.isfinite(most):
        return "\n".join(
            [*lines, f"{alone} NaN by F.softmax, 0 by F.scaled_dot_product_attention and here"]
        )
    left = "nothing, in any precision,"
    if math.exp(most) > 0:
        too_small = "half" if math.exp(most) > 2.0**-150 else "single and half"  # of float32
        left = f"exp({most:g}) = {math.exp(most):.2g}, in {too_small} precision nothing,"
    lines.append(f"  added to a score, {most:g} leaves {left}")
    lines.append("    of the weight that an open key of the same score has")
    if least < most:
        return "\n".join([*lines, f"{alone} attends as if the largest number in it were 0"])
    lines.append(f"{alone} attends as if it hid nothing: what all scores have in common drops out")
    lines += [f"    in {name} {_rounded(most, digits, top)}" for name, digits, top in _FLOATS]
    lines.append(f"{alone} attends to all alike where {most:g} is written over the scores, as by")
    lines.append("    masked_fill; of -inf F.softmax makes NaN, and here it gives 0")
    return "\n".join(lines)


# Name, binary digits after the point, and from where on a number is rounded to infinity
_FLOATS = (
    ("float32", 23, 2.0**128),
    ("bfloat16", 7, 2.0**128 * (1 - 2.0**-9)),
    ("float16", 10, 65520.0),
)


def _rounded(fill: float, digits: int, top: float) -> str:
    """What becomes of scores to which `fill` is added."""
    if -fill >= top:
        return f"{fill:g} is -inf, and such a row NaN by F.softmax"
    step = 2.0 ** (math.frexp(fill)[1] - 1 - digits)  # between a number and the next one
    return f"the scores in it are rounded to steps of {step:.2g}"


def load_mask(path: str | Path) -> Array:
    """The array of a .npy file.  Raises CheckpointError for what is none, and unpickles nothing."""
    with blame(path):
        data = storage.read(path, LARGEST_FILE)
        file = io.BytesIO(data)
        try:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, by_columns, dtype = read(file)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"not a .npy file ({error or 'nested too deep'})") from None
        if dtype.kind not in "biuf":
            raise ValueError(f"an array of {dtype}, and a mask is of booleans or numbers")
        have, needed = len(data) - file.tell(), math.prod(shape) * dtype.itemsize
        if have != needed:
            raise ValueError(f"{have:,} bytes of numbers, {shape} of {dtype} are {needed:,}")
        x = np.frombuffer(data, dtype, offset=file.tell())
        return x.reshape(shape, order="F" if by_columns else "C")


def explain_mask(
    mask: Any = None,
    *,
    ids: Array | None = None,
    pad_id: int = 0,
    causal: bool = False,
    window: int | None = None,
    n_queries: int | None = None,
    offset: int = 0,
    tokens: Iterable[str] | None = None,
    query_tokens: Iterable[str] | None = None,
) -> str:
    """Who may attend to whom and why not, with the broadcasting on the way, as text.

    mask        given by somebody, see `read_mask`; broadcasts to (B, H, T, S)
    ids         (B, S): keys that are `pad_id` are pads
    causal      no key after the query, whose first stands at position `offset`
    window      at most so many keys back, the query's own included
    n_queries   T, where it is not S
    tokens      names of the S positions; query_tokens of the T ones, where they are others

    Raises ValueError where nothing is given, or shapes do not fit.
    """
    given = None if mask is None else read_mask(mask)
    tokens = None if tokens is None else [str(token) for token in tokens]
    query_tokens = None if query_tokens is None else [str(token) for token in query_tokens]
    causal = flag("causal", causal)
    n_queries = None if n_queries is None else integer("n_queries", n_queries, 1)
    S = _n_keys(ids, given, tokens)
    T = n_queries or (given.allowed.shape[-2] if given and given.allowed.ndim > 1 else 0)
    T = S if T in (0, 1) and n_queries is None else T
    for name, names, n in (("tokens", tokens, S), ("query_tokens", query_tokens, T)):
        if names is not None and len(names) != n:
            raise ValueError(f"{name} must be {n} names, one for each position, got {len(names)}")
    _check_pairs(given, ids, T, S)
    parts: dict[str, Array] = {}
    if ids is not None:
        parts["padding"] = padding_mask(np.atleast_2d(ids), pad_id)
    if causal:
        parts["causal"] = causal_mask(T, S, offset)
    if window is not None:
        parts["window"] = window_mask(T, S, window, offset)
    if given is not None:
        parts["given"] = given.allowed
    if not parts:
        raise ValueError("nothing to explain: give a mask, ids, causal=True or a window")
    try:
        shape = np.broadcast_shapes((1, 1, T, S), *(x.shape for x in parts.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {x.shape}" for name, x in parts.items())
        raise ValueError(f"the masks do not broadcast to (B, H, T, S): {shapes}") from None
    lines = [f"given: {given.looks}", *_axes(given.allowed.shape), ""] if given else []
    lines += _broadcasting(parts, shape)
    lines += _grids(parts, shape, tokens, query_tokens)
    return "\n".join(lines)


def _check_pairs(given: Reading | None, ids: Array | None, T: int, S: int) -> None:
    """Before there is anything of that size."""
    shapes = [() if given is None else given.allowed.shape]
    shapes += [] if ids is None else [(len(np.atleast_2d(ids)), 1, 1, S)]
    try:
        n_pairs = math.prod(np.broadcast_shapes((1, 1, T, S), *shapes))
    except ValueError:
        return  # said where all of them are known
    if n_pairs > MOST_PAIRS:
        raise ValueError(
            f"{n_pairs:,} pairs of {T:,} queries and {S:,} keys are too many to explain, at most "
            f"{MOST_PAIRS:,}: give a part of them"
        )


def _axes(shape: tuple[int, ...]) -> list[str]:
    """Of a mask that was given: whose its axes are, where that is not plain."""
    if len(shape) == 1:
        return [
            "  one axis is refused by the modules: give mask[None, None, None, :], (1, 1, 1, S)"
        ]
    if len(shape) == 2:
        T, S = shape
        lines = [
            f"  two axes are always (T, S), here {T} queries of {S} keys; for pads of {T} samples",
            "    give mask[:, None, None, :], which is (B, 1, 1, S)",
        ]
        same = f"    {T} samples of {T} tokens would have this shape: nobody can tell the two apart"
        return [*lines, same] if T == S else lines
    if len(shape) == 3:
        return [
            "  three axes are refused by the modules; broadcasting has them (H, T, S), as below:",
            "    give mask[:, None] for one per sample, (B, 1, T, S), mask[None] for one per head",
        ]
    return []


def _n_keys(ids: Array | None, given: Reading | None, tokens: Sequence[str] | None) -> int:
    if ids is not None:
        return np.atleast_2d(ids).shape[1]
    if given is not None:
        return given.allowed.shape[-1]
    if tokens:
        return len(tokens)
    raise ValueError("how many keys?  give ids, a mask or tokens")


def _broadcasting(parts: dict[str, Array], shape: tuple[int, ...]) -> list[str]:
    """The shapes under one another, aligned from the right."""
    rows = [(name, x.shape) for name, x in parts.items()] + [("all of them, &", shape)]
    texts = [", ".join(f"{n:>3}" for n in s) for _, s in rows]
    width = max(map(len, texts))
    lines = ["shapes, aligned from the right; an axis of 1 is stretched        (B, H, T, S)"]
    for (name, _), text in zip(rows, texts, strict=True):
        lines.append(f"  {name:<16}({text:>{width}})")
    return [*lines, ""]


def reasons_of(parts: dict[str, Array], shape: tuple[int, ...]) -> Array:
    """A mark for each pair: "." may attend, else that of the mask which forbids it, see MARKS."""
    reasons = np.full(shape, ".", dtype="<U1")
    for name, mark in MARKS.items():  # the last that forbids is named: padding before all
        if name in parts:
            reasons = np.where(np.broadcast_to(parts[name], shape), reasons, mark)
    return reasons


def _grids(
    parts: dict[str, Array],
    shape: tuple[int, ...],
    tokens: list[str] | None,
    query_tokens: list[str] | None,
) -> list[str]:
    *_, T, S = shape
    reasons = reasons_of(parts, shape)
    names = tokens or [str(s) for s in range(S)]
    # Without names of their own the queries are the last T of the keys, as with a cache
    queries = query_tokens or (names[S - T :] if T <= S else [str(t) for t in range(T)])
    width = max(map(len, [*names, *queries]))
    # In the mask that was given such a row may mean something else: see what it was taken for
    empty = "nothing to attend to: its output is 0" + (" here" if "given" in parts else "")
    same_heads = (reasons == reasons[:, :1]).all()
    lines = [".  may attend"]
    lines += [f"{mark}  may not: {MEANINGS[name]}" for name, mark in MARKS.items() if name in parts]
    for b in range(min(shape[0], MOST_SAMPLES)):
        for h in range(1 if same_heads else shape[1]):
            head = "" if same_heads else f", head {h}"
            title = f"sample {b}{head}: queries down, keys along"
            along = " ".join(f"{n:>{width}}" for n in names[:MOST_TOKENS])
            lines += ["", title, f"{'':>{width}}  {along}"]
            for t in range(min(T, MOST_TOKENS)):
                row = reasons[b, h, t, :MOST_TOKENS]
                dead = "" if "." in reasons[b, h, t] else f"   {empty}"
                cells = " ".join(f"{c:>{width}}" for c in row)
                lines.append(f"{queries[t]:>{width}}  {cells}{dead}")
    if shape[0] > MOST_SAMPLES:
        lines += ["", f"and {shape[0] - MOST_SAMPLES} more samples"]
    if max(T, S) > MOST_TOKENS:
        lines += ["", f"only the first {MOST_TOKENS} of {T} queries and {S} keys are shown"]
    return lines
