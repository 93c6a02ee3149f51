"""Hypothesis strategies whose examples find mistakes: shapes, arrays, masks, token batches.

What makes an example adversarial is what makes two different formulas differ on it:

    all sizes of an example differ     a transposed weight or a swapped T and S cannot fit by luck
    offsets, ties, constant rows       cancellation, the maximum of a row, a variance of 0
    rows with nothing to attend to     0 / 0
    repeated ids                       a gradient written instead of added
    read-only arrays, odd strides      a write to an input, a reshape that assumes contiguity

For ops, numbers are drawn; for layers and models, draw sizes, flags and a seed.
"""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from npformer.masks import causal_mask

Array = np.ndarray
Shape = tuple[int, ...]

INTEGERS = [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64]
seeds = st.integers(0, 2**32 - 1)


# --- Sizes ------------------------------------------------------------------------------------


def sizes(letters: str, largest: int = 7) -> st.SearchStrategy[list[int]]:
    """One size from 1 to `largest` for each letter, all different.

    B, T, S = draw(sizes("BTS"))
    """
    n = len(letters)
    return st.lists(st.integers(1, max(largest, n)), min_size=n, max_size=n, unique=True)


@st.composite
def leading_axes(draw, most: int = 2) -> Shape:
    """The `...` of a shape: up to `most` axes."""
    return tuple(draw(st.lists(st.integers(1, 3), max_size=most)))


@st.composite
def matmul_shapes(draw) -> tuple[Shape, Shape]:
    """Shapes of a and b that torch.matmul multiplies: 1-D, 2-D, batched, broadcast, mixed."""
    N, K, M = draw(sizes("NKM", 5))
    a_batch, b_batch = [], []
    for n in draw(leading_axes()):
        # Of each axis of the batch: do both have it, or does one repeat its only entry?
        kept = draw(st.sampled_from(["both", "a", "b"]))
        a_batch.append(1 if kept == "b" else n)
        b_batch.append(1 if kept == "a" else n)
    # Broadcasting also adds axes that one of the two does not have at all.
    a_batch = a_batch[draw(st.integers(0, len(a_batch))) :]
    if len(a_batch) == len(b_batch):
        b_batch = b_batch[draw(st.integers(0, len(b_batch))) :]
    a = (K,) if draw(st.booleans()) and not a_batch else (*a_batch, N, K)
    b = (K,) if draw(st.booleans()) and not b_batch else (*b_batch, K, M)
    return a, b


# --- Arrays -----------------------------------------------------------------------------------


@st.composite
def arrays(draw, shape: Shape, dtype: Any = np.float64, top: float = 1e4) -> Array:
    """Numbers up to `top`, read-only, in any layout; with offsets, ties and constant rows."""
    digits = draw(hnp.arrays(np.int64, shape, elements=st.integers(-(10**6), 10**6)))
    x = digits / 10**6  # decimal fractions, so that products are rounded, in float64 as well
    kind = draw(st.sampled_from(["ordinary", "large", "offset", "ties", "constant rows"]))
    if kind == "ordinary":
        x = x * min(top, 4)
    if kind == "large":
        x = x * top
    if kind == "offset":
        x = x * min(top / 2, 4) + draw(st.sampled_from([top / 2, -top / 2]))
    if kind == "ties":
        x = np.round(x * min(top, 2))
    if kind == "constant rows" and x.ndim:
        x = np.broadcast_to(x[..., :1] * top, shape)
    return draw(layouts(np.asarray(x, dtype)))


@st.composite
def layouts(draw, x: Array) -> Array:
    """The same numbers, read-only, contiguous or not."""
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "reversed"]))
    if layout == "transposed" and x.ndim >= 2:
        x = x.mT.copy().mT
    elif layout == "strided" and x.ndim:
        x = np.repeat(x, 2, axis=-1)[..., ::2]
    elif layout == "reversed" and x.ndim:
        x = x[..., ::-1].copy()[..., ::-1]
    else:
        x = x.copy()
    x.flags.writeable = False
    return x


def random_like(shape: Shape, dtype: Any, seed: int) -> Array:
    """Normal numbers, read-only: a dy.  Never ones, which hide what sums to a constant."""
    x = np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
    x.flags.writeable = False
    return x


# --- Masks: True = may attend -----------------------------------------------------------------


@st.composite
def paddings(draw, B: int, S: int) -> Array:
    """True at tokens, False at pads: on the right, on the left, in the middle, all   (B, S)"""
    lengths = draw(st.lists(st.integers(0, S), min_size=B, max_size=B))
    starts = [draw(st.integers(0, S - n)) for n in lengths]
    side = draw(st.sampled_from(["right", "left", "both", "middle"]))
    real = np.zeros((B, S), bool)
    for row, n, start in zip(real, lengths, starts, strict=True):
        first = {"right": 0, "left": S - n, "both": start, "middle": start}[side]
        row[first : first + n] = True
        if side == "middle":
            row[:] = ~row
    return real


@st.composite
def masks(draw, leading: Shape, T: int, S: int) -> Array | None:
    """A mask that broadcasts to (*leading, T, S): padding, causal, random, dead rows, or none.

    With leading (B, H) it is one that modules take: (T, S) or (B or 1, H or 1, T or 1, S).
    """
    kind = draw(st.sampled_from(["none", "padding", "causal", "both", "random", "dead rows"]))
    if kind == "none":
        return None
    B, ones = (leading[0] if leading else 1), (1,) * (len(leading) - 1)
    padding = draw(paddings(B, S)).reshape(*((B, *ones) if leading else ()), 1, S)
    causal = causal_mask(T, S, draw(st.integers(-T, S)))
    if kind == "padding":
        mask = padding
    elif kind == "causal":
        mask = causal
    elif kind == "both":
        mask = padding & causal
    else:
        kept = [n if draw(st.booleans()) else 1 for n in (*leading, T)]
        mask = draw(hnp.arrays(bool, (*kept, S)))
        if kind == "dead rows":
            mask = mask & draw(hnp.arrays(bool, (T, 1)))
    return draw(layouts(mask))


# --- Tokens -----------------------------------------------------------------------------------


@st.composite
def token_batches(draw, shape: Shape, vocab_size: int, pad_id: int | None = None) -> Array:
    """Ids of any integer type, repeated, with pads anywhere, but never all of them.   -> shape"""
    dtype = draw(st.sampled_from([t for t in INTEGERS if np.iinfo(t).max >= vocab_size]))
    alphabet = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=3))
    if pad_id is not None:
        alphabet = [pad_id, *alphabet]
    ids = draw(hnp.arrays(dtype, shape, elements=st.sampled_from(alphabet)))
    if pad_id is not None and ids.size > 1:
        somewhere = draw(st.integers(1, ids.size - 1))
        ids.flat[somewhere] = pad_id
        ids.flat[somewhere - 1] = (pad_id + draw(st.integers(1, vocab_size))) % vocab_size
    return draw(layouts(ids))
