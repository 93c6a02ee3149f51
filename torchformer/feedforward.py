"""The position-wise feed-forward network   [Vaswani et al. 2017, § 3.3]."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from npformer.options import choice, integer, probability
from torchformer import ops

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class FeedForward(nn.Module):
    """y = W₂ activation(W₁ x + b₁) + b₂   [eq. 2]: each position by itself, wider on the way.

    x (..., C)   ->   y (..., C)
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu", dropout: float = 0.0):
        super().__init__()
        d_model, d_ff = integer("d_model", d_model, 1), integer("d_ff", d_ff, 1)
        self.activation = ACTIVATIONS[choice("activation", activation, [*ACTIVATIONS])]
        self.dropout = probability("dropout", dropout)
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor, rng=None) -> Tensor:
        h = self.linear1(x)  # (..., F)
        a = self.activation(h)
        kept = ops.dropout(a, self.dropout, self.training, rng)
        return self.linear2(kept)  # (..., C)

    def infer(self, x: Tensor) -> Tensor:
        """Without dropout, in training as well: for a step of a cache (see cache.py)."""
        return self.linear2(self.activation(self.linear1(x)))  # (..., C)
