"""Who may attend to whom: boolean tensors, True = may attend, that broadcast to (B, H, T, S).

The twin of npformer/masks.py.  PyTorch's attention kernels mean the same by True;
`torch.nn.MultiheadAttention` means the opposite.
"""

from typing import Any

import torch
from torch import Tensor

from npformer.options import integer

CAUSAL: Any = "causal"  # causal_mask(T), which a kernel knows without reading it; and nothing else
FULL: Any = "full"  # of sources without a pad: everybody may attend to everything


def padding_mask(ids: Tensor, pad_id: int | None) -> Tensor:
    """mask[b, 0, 0, s] = (ids[b, s] != pad_id): True at real tokens.

    ids (B, S)   ->   (B, 1, 1, S)          pad_id None: nothing is a pad
    """
    if ids.ndim != 2:
        raise ValueError(f"padding_mask: ids must be (B, S), got shape {tuple(ids.shape)}")
    if type(pad_id) is not int:  # said quickly: each step of a decoder asks
        if pad_id is None:
            return torch.full_like(ids[:, None, None, :], True, dtype=torch.bool)
        pad_id = integer("padding_mask: pad_id", pad_id)
    return (ids != pad_id)[:, None, None, :]


def causal_mask(T: int, S: int | None = None, offset: int = 0, device=None) -> Tensor:
    """True where the key is not after the query: key position <= query position + offset. (T, S)"""
    if not type(T) is type(offset) is int:  # said quickly: each step of a decoder asks
        T, offset = integer("causal_mask: T", T), integer("causal_mask: offset", offset)
    S = offset + T if S is None else integer("causal_mask: S", S)
    query = torch.arange(T, device=device)[:, None] + offset
    key = torch.arange(S, device=device)
    return key <= query


def window_mask(T: int, S: int, width: int, offset: int = 0, device=None) -> Tensor:
    """True for the keys at most `width` - 1 positions before the query, and all later.   (T, S)"""
    T, S = integer("window_mask: T", T, 0), integer("window_mask: S", S, 0)
    width = integer("window_mask: width", width, 1)
    offset = integer("window_mask: offset", offset)
    query = torch.arange(T, device=device)[:, None] + offset
    key = torch.arange(S, device=device)
    return key > query - width
