"""The encoder: one layer, then the stack   [Vaswani et al. 2017, § 3.1, figure 1 left].

post-norm   x ← norm(x + sublayer(x))       the residual stream itself is normalised
pre-norm    x ← x + sublayer(norm(x))       the residual stream is never touched, only added to
"""

from torch import Tensor, nn

from torchformer.attention import MultiHeadAttention
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
        self.norm_first, self.dropout = norm_first, sublayer_dropout
        self.self_attn = MultiHeadAttention(d_model, n_heads, attention_dropout)
        self.feed_forward = FeedForward(d_model, d_ff, activation, activation_dropout)
        self.norm1 = nn.LayerNorm(d_model, eps)
        self.norm2 = nn.LayerNorm(d_model, eps)

    def forward(self, x: Tensor, mask: Mask = None, rng=None) -> Tensor:
        return (self.pre_norm if self.norm_first else self.post_norm)(x, mask, rng)

    def post_norm(self, x: Tensor, mask: Mask, rng) -> Tensor:
        a = self.self_attn(x, x, x, mask, rng)  # (B, S, C)
        kept_a = dropout(a, self.dropout, self.training, rng)
        h = self.norm1(x + kept_a)

        f = self.feed_forward(h, rng)  # (B, S, C)
        kept_f = dropout(f, self.dropout, self.training, rng)
        return self.norm2(h + kept_f)

    def pre_norm(self, x: Tensor, mask: Mask, rng) -> Tensor:
        n1 = self.norm1(x)
        a = self.self_attn(n1, n1, n1, mask, rng)  # (B, S, C)
        kept_a = dropout(a, self.dropout, self.training, rng)
        h = x + kept_a

        n2 = self.norm2(h)
        f = self.feed_forward(n2, rng)  # (B, S, C)
        kept_f = dropout(f, self.dropout, self.training, rng)
        return h + kept_f


class Encoder(nn.Module):
    """A stack of EncoderLayers and, where there is one, a final LayerNorm.

    x (B, S, C)   mask -> (B, H, S, S)   ->   y (B, S, C)
    """

    def __init__(self, layers: list[EncoderLayer], norm: nn.LayerNorm | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, x: Tensor, mask: Mask = None, rng=None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask, rng)
        return self.norm(x) if self.norm else x
