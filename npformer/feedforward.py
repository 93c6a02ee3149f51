"""The position-wise feed-forward network   [Vaswani et al. 2017, § 3.3]."""

import numpy as np
from numpy.typing import DTypeLike

from npformer import ops
from npformer.layers import Linear
from npformer.module import Module
from npformer.ops import Array, Forward, Rng
from npformer.options import choice, integer, probability

ACTIVATIONS = {"relu": ops.relu, "gelu": ops.gelu, "gelu_tanh": ops.gelu_tanh}


class FeedForward(Module):
    """y = W₂ activation(W₁ x + b₁) + b₂   [eq. 2]: each position by itself, wider on the way.

    x (..., C)   ->   y (..., C)
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str = "relu",
        dropout: float = 0.0,
        *,
        rng: Rng,
        dtype: DTypeLike = np.float32,
    ):
        d_model, d_ff = integer("d_model", d_model, 1), integer("d_ff", d_ff, 1)
        self.activation = ACTIVATIONS[choice("activation", activation, [*ACTIVATIONS])]
        self.dropout = probability("dropout", dropout)
        self.linear1 = Linear(d_model, d_ff, rng=rng, dtype=dtype)
        self.linear2 = Linear(d_ff, d_model, rng=rng, dtype=dtype)

    def forward(self, x: Array, rng: Rng | None = None) -> Forward:
        h, backward_linear1 = self.linear1(x)  # (..., F)
        a, backward_activation = self.activation(h)
        kept, backward_dropout = ops.dropout(a, self.dropout, rng)
        y, backward_linear2 = self.linear2(kept)  # (..., C)

        def backward(dy):
            # da = dy W₂,   dx = (da activation'(h)) W₁ with h = W₁ x + b₁.
            da = backward_dropout(backward_linear2(dy))  # (..., F)
            return backward_linear1(backward_activation(da))

        return y, backward
