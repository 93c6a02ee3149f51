"""Who may attend to whom: boolean tensors, True = may attend, that broadcast to (B, H, T, S).

The twin of npformer/masks.py.  PyTorch's attention kernels mean the same by True;
`torch.nn.MultiheadAttention` means the opposite.
"""

from typing import Any

import torch
from torch import Tensor

CAUSAL: Any = "causal"  # causal_mask(T), which a kernel knows without reading it; and nothing else
FULL: Any = "full"  # of sources without a pad: everybody may attend to everything


def padding_mask(ids: Tensor, pad_id: int) -> Tensor:
    """mask[b, 0, 0, s] = (ids[b, s] != pad_id): True at real tokens.

    ids (B, S)   ->   (B, 1, 1, S)
    """
    if ids.ndim != 2:
        raise ValueError(f"padding_mask: ids must be (B, S), got shape {tuple(ids.shape)}")
    return (ids != pad_id)[:, None, None, :]


def causal_mask(T: int, S: int | None = None, offset: int = 0, device=None) -> Tensor:
    """True where the key is not after the query: key position <= query position + offset. (T, S)"""
    S = offset + T if S is None else S
    query = torch.arange(T, device=device)[:, None] + offset
    key = torch.arange(S, device=device)
    return key <= query


def window_mask(T: int, S: int, width: int, offset: int = 0, device=None) -> Tensor:
    """True for the keys at most `width` - 1 positions before the query, and all later.   (T, S)"""
    if width < 1:
        raise ValueError(f"window_mask: width must be at least 1, got {width}")
    query = torch.arange(T, device=device)[:, None] + offset
    key = torch.arange(S, device=device)
    return key > query - width
