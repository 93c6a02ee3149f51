"""The few ops in which we differ from torch.nn.functional, or from what its kernels promise.

Everything else of npformer/ops.py has its twin in PyTorch itself.  Autograd does the backward.

Shapes  B batch, T query positions, S key positions, C model width, H heads, D = C / H.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from npformer.options import probability
from torchformer.masks import CAUSAL, causal_mask

Mask = Any  # a boolean Tensor, True means "may attend"; masks.CAUSAL; or None

# cuDNN is left out: with masks it has given wrong numbers on Hopper.
FOR_MASKS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_weights(q: Tensor, k: Tensor, mask: Mask = None) -> Tensor:
    """weights = softmax(q kᵀ / √D): how much each query attends to each key.

    q (..., T, D)   k (..., S, D)   mask -> (..., T, S)   ->   weights (..., T, S)

    A row with nothing to attend to is 0, where F.softmax would give NaN.
    """
    scale = q.shape[-1] ** -0.5
    scores = q @ k.mT * scale  # (..., T, S)
    visible = _masked(scores, mask)
    if torch.is_autocast_enabled(q.device.type):
        visible = visible.float()  # as autocast has it for F.softmax; it does not know this one
    safe_softmax = torch.ops.aten._safe_softmax  # SDPA's own: a row of -inf becomes 0
    return safe_softmax(visible, -1)


def _masked(scores: Tensor, mask: Mask) -> Tensor:
    """-inf where a key may not be attended to; NaN - inf is NaN, so a NaN there stays."""
    if mask is None:
        return scores
    if mask is CAUSAL:
        mask = causal_mask(*scores.shape[-2:], device=scores.device)
    check_mask("attention", mask, scores.shape)
    return torch.where(mask, scores, scores - torch.inf)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, p: float = 0.0, rng=None
) -> Tensor:
    """y = softmax(q kᵀ / √D) v   [Vaswani et al. 2017, eq. 1], by PyTorch's fused kernels.

    q (..., T, D)   k (..., S, D)   v (..., S, E)   mask -> (..., T, S)   ->   y (..., T, E)

    A masked key has weight 0, but 0 · NaN is NaN: a NaN in its key or value reaches every query.
    (Under CAUSAL a kernel need not read what comes after a query, nor then see a NaN there.)

    A query with nothing to attend to gets 0, as all these kernels have it since PyTorch 2.5.  `p`
    is the dropout of the weights, 0 outside training.  A replaying `rng` (see `dropout`) has to
    reach the weights, which the kernels never write down: then they are made explicitly.

    A mask broadcasts from the right, whatever the leading axes mean: with q (B, H, T, D), one of
    (B, T, S) is taken for (H, T, S) where B == H.  The modules refuse it.
    """
    p = probability("dropout: p", p)
    if rng is not None:
        weights = attention_weights(q, k, mask)  # (..., T, S)
        return dropout(weights, p, True, rng) @ v
    if mask is None or mask is CAUSAL:
        is_causal = mask is CAUSAL
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=is_causal)
    check_mask("attention", mask, (*q.shape[:-1], k.shape[-2]))
    with sdpa_kernel(FOR_MASKS) if mask.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)


def dropout(x: Tensor, p: float, training: bool, rng=None) -> Tensor:
    """F.dropout, or, given an `rng`, with the mask that `rng.dropout_mask(shape, p)` replays."""
    p = probability("dropout: p", p)
    if rng is None or not training or p == 0:
        return F.dropout(x, p, training)
    keep = rng.dropout_mask(tuple(x.shape), p)
    scale = 1 / (1 - p) if p < 1 else 0.0
    return x * torch.as_tensor(keep, device=x.device) * scale


def unknown_id(op: str, ids: Tensor, n_rows: int) -> ValueError:
    """The error for ids out of range, of which the kernels of the CPU say only that there are some.

    On CUDA they end the process's use of the device, and to look at the ids first would be to wait.
    """
    bad = ids[(ids < 0) | (ids >= n_rows)].flatten()[0].item()
    return ValueError(f"{op}: id {bad} is not in the vocabulary of {n_rows} (ids 0..{n_rows - 1})")


def check_boolean(op: str, mask: Tensor, name: str = "mask") -> None:
    """A mask is boolean and nothing else; say how to convert what it may be."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: {name} must be a boolean tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: {name} must be boolean, True = may attend, got {mask.dtype}: pass mask == 1 "
            "if 1 means 'may attend', mask == 0 if it means the opposite or if the mask is additive"
        )


def check_mask(op: str, mask: Tensor, shape: tuple[int, ...], name: str = "mask") -> None:
    """A mask is boolean and broadcasts to the scores that it is for."""
    check_boolean(op, mask, name)
    aligned = zip(mask.shape[::-1], shape[::-1], strict=False)  # from the right, as broadcasting is
    if mask.ndim > len(shape) or any(m != 1 and m != n for m, n in aligned):
        letters = "(B, H, T, S)" if len(shape) == 4 else "(..., T, S)"
        raise ValueError(
            f"{op}: {name} of shape {tuple(mask.shape)} does not broadcast to {letters} = {shape}; "
            "a padding mask is (B, 1, 1, S), a causal one (T, S), one per sample (B, 1, T, S)"
        )
