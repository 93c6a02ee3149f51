"""The encoder: one layer, then the stack   [Vaswani et al. 2017, § 3.1, figure 1 left].

Each layer is written out twice, as post-norm (the paper) and as pre-norm (most models since), so
that the two can be compared line by line.

    post-norm   x ← norm(x + sublayer(x))       the residual stream itself is normalised
    pre-norm    x ← x + sublayer(norm(x))       the residual stream is never touched, only added to
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import DTypeLike

from npformer.attention import MultiHeadAttention
from npformer.cache import LayerCache, around
from npformer.feedforward import FeedForward
from npformer.layers import LayerNorm
from npformer.module import Module
from npformer.ops import Array, Forward, Mask, Rng, dropout
from npformer.options import flag, probability


class EncoderLayer(Module):
    """Self-attention, then a feed-forward network; a residual and a LayerNorm around each.

    x (B, S, C)   mask -> (B, H, S, S)   ->   y (B, S, C)
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        activation: str = "relu",
        norm_first: bool = False,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        sublayer_dropout: float = 0.0,
        eps: float = 1e-5,
        rng: Rng,
        dtype: DTypeLike = np.float32,
    ):
        self.norm_first = flag("norm_first", norm_first)
        self.dropout = probability("sublayer_dropout", sublayer_dropout)
        self.self_attn = MultiHeadAttention(
            d_model, n_heads, attention_dropout, rng=rng, dtype=dtype
        )
        self.feed_forward = FeedForward(
            d_model, d_ff, activation, activation_dropout, rng=rng, dtype=dtype
        )
        self.norm1 = LayerNorm(d_model, eps, dtype=dtype)
        self.norm2 = LayerNorm(d_model, eps, dtype=dtype)

    def forward(self, x: Array, mask: Mask = None, rng: Rng | None = None) -> Forward:
        return (self.pre_norm if self.norm_first else self.post_norm)(x, mask, rng)

    def post_norm(self, x: Array, mask: Mask, rng: Rng | None) -> Forward:
        """h = norm1(x + self_attn(x)),   y = norm2(h + feed_forward(h))   [§ 5.4]."""
        a, backward_attn = self.self_attn(x, x, x, mask, rng)  # (B, S, C)
        kept_a, backward_drop1 = dropout(a, self.dropout, rng)
        h, backward_norm1 = self.norm1(x + kept_a)

        f, backward_ff = self.feed_forward(h, rng)  # (B, S, C)
        kept_f, backward_drop2 = dropout(f, self.dropout, rng)
        y, backward_norm2 = self.norm2(h + kept_f)

        def backward(dy):
            # With J the Jacobian of a part:   dsum2 = J_norm2ᵀ dy,   dh = dsum2 + J_ffᵀ dsum2,
            # dsum1 = J_norm1ᵀ dh,   dx = dsum1 + J_attnᵀ dsum1.
            dsum2 = backward_norm2(dy)
            dh = dsum2 + backward_ff(backward_drop2(dsum2))

            dsum1 = backward_norm1(dh)
            dq, dk, dv = backward_attn(backward_drop1(dsum1))
            return dsum1 + dq + dk + dv  # x was the residual, the query, the key and the value

        return y, backward

    def pre_norm(self, x: Array, mask: Mask, rng: Rng | None) -> Forward:
        """h = x + self_attn(norm1(x)),   y = h + feed_forward(norm2(h))."""
        n1, backward_norm1 = self.norm1(x)
        a, backward_attn = self.self_attn(n1, n1, n1, mask, rng)  # (B, S, C)
        kept_a, backward_drop1 = dropout(a, self.dropout, rng)
        h = x + kept_a

        n2, backward_norm2 = self.norm2(h)
        f, backward_ff = self.feed_forward(n2, rng)  # (B, S, C)
        kept_f, backward_drop2 = dropout(f, self.dropout, rng)
        y = h + kept_f

        def backward(dy):
            # With J the Jacobian of a part:   dn2 = J_ffᵀ dy,   dh = dy + J_norm2ᵀ dn2,
            # dq + dk + dv = J_attnᵀ dh,   dx = dh + J_norm1ᵀ (dq + dk + dv).
            dn2 = backward_ff(backward_drop2(dy))
            dh = dy + backward_norm2(dn2)  # the residual's gradient goes around the norm

            dq, dk, dv = backward_attn(backward_drop1(dh))
            return dh + backward_norm1(dq + dk + dv)

        return y, backward

    def step(self, x: Array, cache: LayerCache, mask: Mask = None) -> tuple[Array, LayerCache]:
        """The T positions that come after those in the cache, without dropout or backward.

        x (B, T, C)   mask -> (B, H, T, S + T)   ->   y (B, T, C), and the cache of all S + T
        """

        def look_back(x):
            nonlocal cache
            cache = cache.append(*self.self_attn.keys_values(x))
            return self.self_attn.ask(x, cache.own, mask)

        def feed(x):
            return self.feed_forward(x)[0]

        h = around(look_back, x, self.norm1, self.norm_first)
        y = around(feed, h, self.norm2, self.norm_first)
        return y, cache


class Encoder(Module):
    """A stack of EncoderLayers and, where there is one, a final LayerNorm.

    x (B, S, C)   mask -> (B, H, S, S)   ->   y (B, S, C)
    """

    def __init__(self, layers: Iterable[EncoderLayer], norm: LayerNorm | None = None):
        self.layers = list(layers)
        self.norm = norm

    def forward(self, x: Array, mask: Mask = None, rng: Rng | None = None) -> Forward:
        """x ← layer(x) for each layer;   y = norm(x), or x where there is no final norm."""
        backwards = []
        for layer in self.layers:
            x, backward_layer = layer(x, mask, rng)
            backwards.append(backward_layer)
        y, backward_norm = self.norm(x) if self.norm else (x, lambda dy: dy)

        def backward(dy):
            # dx = J_normᵀ dy,   then dx ← J_layerᵀ dx, the last layer first.
            dx = backward_norm(dy)
            for backward_layer in reversed(backwards):
                dx = backward_layer(dx)
            return dx

        return y, backward

    def step(
        self, x: Array, caches: list[LayerCache], mask: Mask = None
    ) -> tuple[Array, list[LayerCache]]:
        """The T positions that come after those in the caches, one of which each layer has."""
        after = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.step(x, cache, mask)
            after.append(cache)
        return (self.norm(x)[0] if self.norm else x), after
