"""Multi-head attention   [Vaswani et al. 2017, § 3.2.2].

Shapes  B batch, T query positions, S key positions, C model width, H heads, D = C / H.
"""

import numpy as np
from numpy.typing import DTypeLike

from npformer import ops
from npformer.cache import KeyValues
from npformer.layers import Linear
from npformer.module import Module
from npformer.ops import Array, Forward, Mask, Rng
from npformer.options import integer, probability


def split_heads(x: Array, n_heads: int) -> Array:  # (B, T, C) -> (B, H, T, D)
    """xh[b, h, t] = x[b, t, h D : (h + 1) D]: each head gets its slice of C.

    Only moves entries around, as does merge_heads: each is the other's inverse and backward.
    """
    B, T, C = x.shape
    return x.reshape(B, T, n_heads, C // n_heads).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:  # (B, H, T, D) -> (B, T, C)
    """x[b, t] = concat(xh[b, 0, t], ..., xh[b, H - 1, t])."""
    B, H, T, D = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)


class MultiHeadAttention(Module):
    """H attentions side by side, each on its own slice of C, then a mixture of what they found.

    query (B, T, C)   key, value (B, S, C)   mask -> (B, H, T, S)   ->   y (B, T, C)

    `query` asks, `key` is matched, `value` is returned.  Self-attention: all three are one x.
    Cross-attention: the decoder asks, and key and value are the encoder's output.  `backward`
    returns dquery, dkey, dvalue; whoever passed one array twice adds the two gradients.

    A mask is boolean, True = may attend, and its axes are never guessed: it has two, which are
    always (T, S), or four, (B or 1, H or 1, T or 1, S).  A pad mask is (B, 1, 1, S): as (B, S) it
    is refused, except where B == T, when nobody can tell the two apart.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout: float = 0.0,
        *,
        rng: Rng,
        dtype: DTypeLike = np.float32,
    ):
        d_model, n_heads = integer("d_model", d_model, 1), integer("n_heads", n_heads, 1)
        dropout = probability("dropout", dropout)
        if d_model % n_heads:
            raise ValueError(f"d_model={d_model} is not a multiple of n_heads={n_heads}")
        self.n_heads, self.dropout = n_heads, dropout
        self.q_proj = Linear(d_model, d_model, rng=rng, dtype=dtype)
        self.k_proj = Linear(d_model, d_model, rng=rng, dtype=dtype)
        self.v_proj = Linear(d_model, d_model, rng=rng, dtype=dtype)
        self.out_proj = Linear(d_model, d_model, rng=rng, dtype=dtype)

    def forward(
        self, query: Array, key: Array, value: Array, mask: Mask = None, rng: Rng | None = None
    ) -> Forward:
        """y = concat(head_1, ..., head_H) W_Oᵀ + b_O,   head_h = attention(q_h, k_h, v_h).

        With q = query W_Qᵀ + b_Q, and k, v in the same way, cut into H slices q_h, k_h, v_h.
        """
        _check_rank(query=query, key=key, value=value)
        shape = (len(query), self.n_heads, query.shape[1], key.shape[1])  # (B, H, T, S)
        check_heads_mask("MultiHeadAttention", mask, shape)
        q, backward_q = self.q_proj(query)  # (B, T, C)
        k, backward_k = self.k_proj(key)  # (B, S, C)
        v, backward_v = self.v_proj(value)  # (B, S, C)
        qh, kh, vh = (split_heads(a, self.n_heads) for a in (q, k, v))  # (B, H, T or S, D)
        yh, backward_attention = ops.attention(qh, kh, vh, mask, self.dropout, rng)  # (B, H, T, D)
        y, backward_out = self.out_proj(merge_heads(yh))  # (B, T, C)

        def backward(dy):
            # dyh = the slices of dy W_O;   dquery = dq W_Q,   dkey = dk W_K,   dvalue = dv W_V.
            dyh = split_heads(backward_out(dy), self.n_heads)  # (B, H, T, D)
            dq, dk, dv = (merge_heads(d) for d in backward_attention(dyh))  # (B, T or S, C)
            return backward_q(dq), backward_k(dk), backward_v(dv)

        return y, backward

    # Inference with a cache (see cache.py): the same products, in two halves and without backward.

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        """What x offers to whoever asks.   x (B, S, C)   ->   keys, values (B, H, S, D)"""
        (k, _), (v, _) = self.k_proj(x), self.v_proj(x)
        return split_heads(k, self.n_heads), split_heads(v, self.n_heads)

    def ask(self, query: Array, offered: KeyValues, mask: Mask = None) -> Array:
        """query (B, T, C)   offered (B, H, S, D)   mask -> (B, H, T, S)   ->   y (B, T, C)"""
        shape = (len(query), self.n_heads, query.shape[1], offered.length)  # (B, H, T, S)
        check_heads_mask("MultiHeadAttention", mask, shape)
        q, _ = self.q_proj(query)
        yh, _ = ops.attention(split_heads(q, self.n_heads), offered.keys, offered.values, mask)
        y, _ = self.out_proj(merge_heads(yh))
        return y


def check_heads_mask(
    module: str, mask: Mask, scores: tuple[int, int, int, int], name: str = "mask"
) -> None:
    """A module's mask is (T, S) or (B or 1, H or 1, T or 1, S).   scores (B, H, T, S)

    Any other might broadcast by coincidence, as (B, S, S) does where B == H.
    """
    if mask is None:
        return
    ops.check_boolean(module, mask, "may attend", name)
    B, H, T, S = scores
    fits = mask.shape == (T, S)
    if mask.ndim == 4:
        b, h, t, s = mask.shape
        fits = b in (1, B) and h in (1, H) and t in (1, T) and s == S
    if not fits:
        wrong = f"does not broadcast to (B, H, T, S) = {scores}"
        if mask.ndim == 3:
            wrong = "has 3 axes: is the first one B or H?"
        raise ValueError(
            f"{module}: {name} of shape {mask.shape} {wrong}; a padding mask is "
            f"(B, 1, 1, S), {name}[:, None, None, :], a causal one (T, S), one per sample "
            f"(B, 1, T, S), {name}[:, None]"
        )


def _check_rank(**inputs: Array) -> None:
    for name, x in inputs.items():
        if x.ndim != 3:
            raise ValueError(
                f"MultiHeadAttention: {name} must be (B, T or S, C), got shape {x.shape}; "
                "a batch of one sequence is x[None]"
            )
