"""The decoder: one layer, then the stack   [Vaswani et al. 2017, § 3.1, figure 1 right].

An encoder layer with one sublayer more, in the middle: cross-attention, where the decoder asks and
`memory`, the encoder's output, answers.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from npformer.options import flag, not_negative, probability
from torchformer.attention import MultiHeadAttention
from torchformer.cache import KeyValues, LayerCache, around
from torchformer.feedforward import FeedForward
from torchformer.ops import Mask, dropout


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; a residual and a LayerNorm around each.

    x (B, T, C)   memory (B, S, C)   ->   y (B, T, C)
    mask -> (B, H, T, T) is the self-attention's, memory_mask -> (B, H, T, S) the cross-attention's.
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
        self.cross_attn = MultiHeadAttention(d_model, n_heads, attention_dropout)
        self.feed_forward = FeedForward(d_model, d_ff, activation, activation_dropout)
        self.norm1 = nn.LayerNorm(d_model, eps)
        self.norm2 = nn.LayerNorm(d_model, eps)
        self.norm3 = nn.LayerNorm(d_model, eps)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Mask = None,
        memory_mask: Mask = None,
        rng=None,
    ) -> Tensor:
        forward = self.pre_norm if self.norm_first else self.post_norm
        return forward(x, memory, mask, memory_mask, rng)

    def post_norm(self, x: Tensor, memory: Tensor, mask: Mask, memory_mask: Mask, rng) -> Tensor:
        """g = norm1(x + self_attn(x)),   h = norm2(g + cross_attn(g, memory)),
        y = norm3(h + feed_forward(h))   [§ 5.4].
        """
        a = self.self_attn(x, x, x, mask, rng)  # (B, T, C)
        kept_a = dropout(a, self.dropout, self.training, rng)
        g = self.norm1(x + kept_a)

        c = self.cross_attn(g, memory, memory, memory_mask, rng)  # (B, T, C)
        kept_c = dropout(c, self.dropout, self.training, rng)
        h = self.norm2(g + kept_c)

        f = self.feed_forward(h, rng)  # (B, T, C)
        kept_f = dropout(f, self.dropout, self.training, rng)
        return self.norm3(h + kept_f)

    def pre_norm(self, x: Tensor, memory: Tensor, mask: Mask, memory_mask: Mask, rng) -> Tensor:
        """g = x + self_attn(norm1(x)),   h = g + cross_attn(norm2(g), memory),
        y = h + feed_forward(norm3(h)).
        """
        n1 = self.norm1(x)
        a = self.self_attn(n1, n1, n1, mask, rng)  # (B, T, C)
        kept_a = dropout(a, self.dropout, self.training, rng)
        g = x + kept_a

        n2 = self.norm2(g)
        c = self.cross_attn(n2, memory, memory, memory_mask, rng)  # (B, T, C)
        kept_c = dropout(c, self.dropout, self.training, rng)
        h = g + kept_c

        n3 = self.norm3(h)
        f = self.feed_forward(n3, rng)  # (B, T, C)
        kept_f = dropout(f, self.dropout, self.training, rng)
        return h + kept_f

    def start(self, memory: Tensor) -> LayerCache:
        """No position yet, but the memory's keys and values, once and for all."""
        return LayerCache(None, KeyValues.of(*self.cross_attn.keys_values(memory)))

    def step(
        self, x: Tensor, cache: LayerCache, mask: Mask = None, memory_mask: Mask = None
    ) -> tuple[Tensor, LayerCache]:
        """The T positions that come after those in the cache, without dropout.

        x (B, T, C)   mask -> (B, H, T, S + T)   ->   y (B, T, C), and the cache of all S + T
        """

        def look_back(x):
            nonlocal cache
            cache = cache.append(*self.self_attn.keys_values(x))
            return self.self_attn.ask(x, cache.own, mask)

        def ask_memory(x):
            return self.cross_attn.ask(x, cache.memory, memory_mask)

        g = around(look_back, x, self.norm1, self.norm_first)
        h = around(ask_memory, g, self.norm2, self.norm_first)
        y = around(self.feed_forward.infer, h, self.norm3, self.norm_first)
        return y, cache


class Decoder(nn.Module):
    """A stack of DecoderLayers, all asking the same memory, and maybe a final LayerNorm.

    x (B, T, C)   memory (B, S, C)   ->   y (B, T, C)
    mask -> (B, H, T, T) is the self-attention's, memory_mask -> (B, H, T, S) the cross-attention's.
    """

    def __init__(self, layers: Iterable[DecoderLayer], norm: nn.LayerNorm | None = None):
        super().__init__()
        self.layers: Any = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Mask = None,
        memory_mask: Mask = None,
        rng=None,
    ) -> Tensor:
        """x ← layer(x, memory) for each layer;   y = norm(x), or x where there is no final norm."""
        for layer in self.layers:
            x = layer(x, memory, mask, memory_mask, rng)
        return self.norm(x) if self.norm else x

    def start(self, memory: Tensor) -> list[LayerCache]:
        return [layer.start(memory) for layer in self.layers]

    def step(
        self,
        x: Tensor,
        caches: list[LayerCache],
        mask: Mask = None,
        memory_mask: Mask = None,
    ) -> tuple[Tensor, list[LayerCache]]:
        """The T positions that come after those in the caches, one of which each layer has."""
        after = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.step(x, cache, mask, memory_mask)
            after.append(cache)
        return (self.norm(x) if self.norm else x), after
