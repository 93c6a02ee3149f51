"""Multi-head attention   [Vaswani et al. 2017, § 3.2.2].

Shapes  B batch, T query positions, S key positions, C model width, H heads, D = C / H.
"""

from torch import Tensor, nn

from npformer.options import integer, probability
from torchformer import ops
from torchformer.cache import KeyValues
from torchformer.masks import CAUSAL
from torchformer.ops import Mask


def split_heads(x: Tensor, d_head: int) -> Tensor:  # (B, T, C) -> (B, H, T, D)
    """xh[b, h, t] = x[b, t, h D : (h + 1) D]: each head gets its slice of C."""
    return x.unflatten(-1, (-1, d_head)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:  # (B, H, T, D) -> (B, T, C)
    """x[b, t] = concat(xh[b, 0, t], ..., xh[b, H - 1, t])."""
    return x.transpose(1, 2).flatten(-2)


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each on its own slice of C, then a mixture of what they found.

    query (B, T, C)   key, value (B, S, C)   mask -> (B, H, T, S)   ->   y (B, T, C)

    A mask is boolean, True = may attend, and its axes are never guessed: it has two, which are
    always (T, S), or four, (B or 1, H or 1, T or 1, S).  A pad mask is (B, 1, 1, S): as (B, S) it
    is refused, except where B == T, when nobody can tell the two apart.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0):
        super().__init__()
        d_model, n_heads = integer("d_model", d_model, 1), integer("n_heads", n_heads, 1)
        dropout = probability("dropout", dropout)
        if d_model % n_heads:
            raise ValueError(f"d_model={d_model} is not a multiple of n_heads={n_heads}")
        self.d_head, self.dropout = d_model // n_heads, dropout
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask = None, rng=None
    ) -> Tensor:
        """y = concat(head_1, ..., head_H) W_Oᵀ + b_O,   head_h = attention(q_h, k_h, v_h).

        With q = query W_Qᵀ + b_Q, and k, v in the same way, cut into H slices q_h, k_h, v_h.
        """
        _check_rank(query=query, key=key, value=value)
        B, T, C = query.shape
        shape = (B, C // self.d_head, T, key.shape[1])  # (B, H, T, S)
        check_heads_mask("MultiHeadAttention", mask, shape)
        q = self.q_proj(query)  # (B, T, C)
        k = self.k_proj(key)  # (B, S, C)
        v = self.v_proj(value)  # (B, S, C)
        qh, kh, vh = (split_heads(a, self.d_head) for a in (q, k, v))  # (B, H, T or S, D)
        p = self.dropout if self.training else 0.0
        yh = ops.attention(qh, kh, vh, mask, p, rng)  # (B, H, T, D)
        return self.out_proj(merge_heads(yh))  # (B, T, C)

    # Inference with a cache (see cache.py): the same products, in two halves.

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What x offers to whoever asks.   x (B, S, C)   ->   keys, values (B, H, S, D)"""
        k, v = self.k_proj(x), self.v_proj(x)
        return split_heads(k, self.d_head), split_heads(v, self.d_head)

    def ask(self, query: Tensor, offered: KeyValues, mask: Mask = None) -> Tensor:
        """query (B, T, C)   offered (B, H, S, D)   mask -> (B, H, T, S)   ->   y (B, T, C)"""
        B, T, C = query.shape
        shape = (B, C // self.d_head, T, offered.length)  # (B, H, T, S)
        check_heads_mask("MultiHeadAttention", mask, shape)
        q = self.q_proj(query)
        yh = ops.attention(split_heads(q, self.d_head), offered.keys, offered.values, mask)
        return self.out_proj(merge_heads(yh))


def check_heads_mask(
    module: str, mask: Mask, scores: tuple[int, int, int, int], name: str = "mask"
) -> None:
    """A module's mask is (T, S) or (B or 1, H or 1, T or 1, S).   scores (B, H, T, S)

    Any other might broadcast by coincidence, as (B, S, S) does where B == H.
    """
    B, H, T, S = scores
    if mask is None or (mask is CAUSAL and T == S):
        return
    if mask is CAUSAL:  # of a step it would hide the positions before it
        raise ValueError(
            f"{module}: {name} is CAUSAL, for as many keys as queries, got {T} and {S}"
        )
    ops.check_boolean(module, mask, name)
    fits = mask.shape == (T, S)
    if mask.ndim == 4:
        b, h, t, s = mask.shape
        # Not `b in (1, B)`: compiled for any size, that would be False
        fits = (b == 1 or b == B) and (h == 1 or h == H) and (t == 1 or t == T) and s == S
    if not fits:
        wrong = f"does not broadcast to (B, H, T, S) = {scores}"
        if mask.ndim == 3:
            wrong = "has 3 axes: is the first one B or H?"
        raise ValueError(
            f"{module}: {name} of shape {tuple(mask.shape)} {wrong}; a padding mask is "
            f"(B, 1, 1, S), {name}[:, None, None, :], a causal one (T, S), one per sample "
            f"(B, 1, T, S), {name}[:, None]"
        )


def _check_rank(**inputs: Tensor) -> None:
    for name, x in inputs.items():
        if x.ndim != 3:
            raise ValueError(
                f"MultiHeadAttention: {name} must be (B, T or S, C), got shape {tuple(x.shape)}; "
                "a batch of one sequence is x[None]"
            )
