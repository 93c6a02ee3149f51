"""Who may attend to whom: boolean arrays, True = may attend, that broadcast to (B, H, T, S).

    padding_mask(ids, pad_id)   (B, 1, 1, S)   no query of a sample may look at the sample's pads
    causal_mask(T)              (T, T)         no query may look at what comes after it
    window_mask(T, S, width)    (T, S)         no query may look further back than `width` keys

Masks combine with `&`: a position may be attended to if every mask allows it.  Broadcasting aligns
shapes from the right and stretches axes of length 1:

    padding   (B, 1, 1, S)
    causal          (T, S)
    both      (B, 1, T, S)      and the scores are (B, H, T, S): one mask serves all heads

The modules take two axes, which are always (T, S), or four.  A padding mask without its ones, (B,
S), is refused, except where B == T: there nobody can tell the two apart.

`torch.nn.MultiheadAttention` means the opposite (True = may *not*); F.scaled_dot_product_attention
means the same as we do.
"""

import numpy as np

from npformer.options import integer

Array = np.ndarray


def padding_mask(ids: Array, pad_id: int | None) -> Array:
    """mask[b, 0, 0, s] = (ids[b, s] != pad_id): True at real tokens.

    ids (B, S)   ->   (B, 1, 1, S)          pad_id None: nothing is a pad
    """
    if ids.ndim != 2:
        raise ValueError(f"padding_mask: ids must be (B, S), got shape {ids.shape}")
    if type(pad_id) is not int:  # said quickly: each step of a decoder asks
        if pad_id is None:
            return np.full((len(ids), 1, 1, ids.shape[1]), True)
        pad_id = integer("padding_mask: pad_id", pad_id)
    return (ids != pad_id)[:, np.newaxis, np.newaxis, :]


def causal_mask(T: int, S: int | None = None, offset: int = 0) -> Array:
    """True where the key is not after the query: key position <= query position + offset. (T, S)

    A lower triangle: row t (a query) may look at the columns (keys) 0..t.  When the first
    `offset` keys were computed earlier and the T queries continue them, query 0 stands at
    position `offset`; then S = offset + T, which is also the default for S.
    """
    if not type(T) is type(offset) is int:  # said quickly: each step of a decoder asks
        T, offset = integer("causal_mask: T", T), integer("causal_mask: offset", offset)
    S = offset + T if S is None else integer("causal_mask: S", S)
    query, key = np.arange(T)[:, np.newaxis] + offset, np.arange(S)
    return key <= query


def window_mask(T: int, S: int, width: int, offset: int = 0) -> Array:
    """True for the keys at most `width` - 1 positions before the query, and all later.   (T, S)

    `causal_mask(T, S) & window_mask(T, S, width)` is sliding-window attention: the last `width`
    positions, the query's own included.
    """
    T, S = integer("window_mask: T", T, 0), integer("window_mask: S", S, 0)
    width = integer("window_mask: width", width, 1)
    offset = integer("window_mask: offset", offset)
    query, key = np.arange(T)[:, np.newaxis] + offset, np.arange(S)
    return key > query - width
