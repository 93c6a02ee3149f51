"""The encoder: one layer, then the stack   [Vaswani et al. 2017, § 3.1, figure 1 left].

post-norm   x ← norm(x + sublayer(x))       the residual stream itself is normalised
pre-norm    x ← x + sublayer(norm(x))       the residual stream is never touched, only added to
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from npformer.options import flag, not_negative, probability
from torchformer.attention import MultiHeadAttention
from torchformer.cache import LayerCache, around
from torchformer.feedforward import FeedForward
from torchformer.ops import Mask, dropout


class EncoderLayer(nn.Module):
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
    ):
        super().__init__()
        self.norm_first = flag("norm_first", norm_first)
        self.dropout = probability("sublayer_dropout", sublayer_dropout)
        eps = not_negative("eps", eps)
        self.self_attn = MultiHeadAttention(d_model, n_heads, attention_dropout)
        self.feed_forward = FeedForward(d_model, d_ff, activation, activation_dropout)
        self.norm1 = nn.LayerNorm(d_model, eps)
        self.norm2 = nn.LayerNorm(d_model, eps)

    def forward(self, x: Tensor, mask: Mask = None, rng=None) -> Tensor:
        return (self.pre_norm if self.norm_first else self.post_norm)(x, mask, rng)

    def post_norm(self, x: Tensor, mask: Mask, rng) -> Tensor:
        """h = norm1(x + self_attn(x)),   y = norm2(h + feed_forward(h))   [§ 5.4]."""
        a = self.self_attn(x, x, x, mask, rng)  # (B, S, C)
        kept_a = dropout(a, self.dropout, self.training, rng)
        h = self.norm1(x + kept_a)

        f = self.feed_forward(h, rng)  # (B, S, C)
        kept_f = dropout(f, self.dropout, self.training, rng)
        return self.norm2(h + kept_f)

    def pre_norm(self, x: Tensor, mask: Mask, rng) -> Tensor:
        """h = x + self_attn(norm1(x)),   y = h + feed_forward(norm2(h))."""
        n1 = self.norm1(x)
        a = self.self_attn(n1, n1, n1, mask, rng)  # (B, S, C)
        kept_a = dropout(a, self.dropout, self.training, rng)
        h = x + kept_a

        n2 = self.norm2(h)
        f = self.feed_forward(n2, rng)  # (B, S, C)
        kept_f = dropout(f, self.dropout, self.training, rng)
        return h + kept_f

    def step(self, x: Tensor, cache: LayerCache, mask: Mask = None) -> tuple[Tensor, LayerCache]:
        """The T positions that come after those in the cache, without dropout.

        x (B, T, C)   mask -> (B, H, T, S + T)   ->   y (B, T, C), and the cache of all S + T
        """

        def look_back(x):
            nonlocal cache
            cache = cache.append(*self.self_attn.keys_values(x))
            return self.self_attn.ask(x, cache.own, mask)

        h = around(look_back, x, self.norm1, self.norm_first)
        y = around(self.feed_forward.infer, h, self.norm2, self.norm_first)
        return y, cache


class Encoder(nn.Module):
    """A stack of EncoderLayers and, where there is one, a final LayerNorm.

    x (B, S, C)   mask -> (B, H, S, S)   ->   y (B, S, C)
    """

    def __init__(self, layers: Iterable[EncoderLayer], norm: nn.LayerNorm | None = None):
        super().__init__()
        self.layers: Any = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, x: Tensor, mask: Mask = None, rng=None) -> Tensor:
        """x ← layer(x) for each layer;   y = norm(x), or x where there is no final norm."""
        for layer in self.layers:
            x = layer(x, mask, rng)
        return self.norm(x) if self.norm else x

    def step(
        self, x: Tensor, caches: list[LayerCache], mask: Mask = None
    ) -> tuple[Tensor, list[LayerCache]]:
        """The T positions that come after those in the caches, one of which each layer has."""
        after = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.step(x, cache, mask)
            after.append(cache)
        return (self.norm(x) if self.norm else x), after
