"""The leaf modules, which own the parameters: Linear, Embedding, LayerNorm   (twins: torch.nn's).

Each is an op and its parameters.  Only here is `parameter.grad` written to.
"""

import math

import numpy as np
from numpy.typing import DTypeLike

from npformer import ops
from npformer.module import Module, Parameter
from npformer.ops import Array, Forward, Rng
from npformer.options import integer, not_negative


class Linear(Module):
    """y = x Wᵀ + b.   x (..., I)   ->   y (..., O)

    W (O, I) starts Xavier-uniform: its variance 2 / (I + O) keeps that of activations and of
    gradients near 1 through the layer   [Glorot and Bengio 2010, eq. 16].   b (O,) starts 0.
    """

    def __init__(self, n_in: int, n_out: int, *, rng: Rng, dtype: DTypeLike = np.float32):
        n_in, n_out = integer("n_in", n_in, 1), integer("n_out", n_out, 1)
        bound = math.sqrt(6 / (n_in + n_out))
        self.weight = Parameter(rng.uniform(-bound, bound, (n_out, n_in)).astype(dtype))
        self.bias = Parameter(np.zeros(n_out, dtype))

    def forward(self, x: Array) -> Forward:
        y, backward_linear = ops.linear(x, self.weight.data, self.bias.data)

        def backward(dy):
            dx, dweight, dbias = backward_linear(dy)
            self.weight.grad += dweight  # +=, so a layer used twice collects both of its uses
            self.bias.grad += dbias
            return dx

        return y, backward


class Embedding(Module):
    """y = weight[ids]: one row for each token of the vocabulary.   ids (...)   ->   y (..., C)

    The rows start N(0, 1/C).  The row of `padding_idx` starts 0 and never gets a gradient.
    """

    def __init__(
        self, n: int, d_model: int, padding_idx: int, *, rng: Rng, dtype: DTypeLike = np.float32
    ):
        n, d_model = integer("n", n, 1), integer("d_model", d_model, 1)
        self.padding_idx = integer("padding_idx", padding_idx, 0)
        if self.padding_idx >= n:
            raise ValueError(f"padding_idx={padding_idx} is not in the vocabulary of {n}")
        self.weight = Parameter(rng.normal(0, d_model**-0.5, (n, d_model)).astype(dtype))
        self.weight.data[self.padding_idx] = 0

    def forward(self, ids: Array) -> Forward:
        y, backward_embedding = ops.embedding(ids, self.weight.data, self.padding_idx)

        def backward(dy):
            self.weight.grad += backward_embedding(dy)
            # nothing to return: ids are integers

        return y, backward

    def as_head(self, x: Array) -> Forward:
        """logits = x Wᵀ: the table read the other way, a score for each of its rows   [§ 3.4].

        x (..., C)   ->   logits (..., V)
        """
        logits, backward_linear = ops.linear(x, self.weight.data)

        def backward(dlogits):
            dx, dweight = backward_linear(dlogits)
            self.weight.grad += dweight
            self.weight.grad[self.padding_idx] = 0  # the head has a gradient for it: drop that too
            return dx

        return logits, backward


class LayerNorm(Module):
    """y = weight * (x - mean) / √(var + eps) + bias, over the last axis.   x, y (..., C)

    weight starts 1 and bias 0: at first it only normalises.
    """

    def __init__(self, d_model: int, eps: float = 1e-5, *, dtype: DTypeLike = np.float32):
        d_model = integer("d_model", d_model, 1)
        self.weight = Parameter(np.ones(d_model, dtype))
        self.bias = Parameter(np.zeros(d_model, dtype))
        self.eps = not_negative("eps", eps)

    def forward(self, x: Array) -> Forward:
        y, backward_norm = ops.layer_norm(x, self.weight.data, self.bias.data, self.eps)

        def backward(dy):
            dx, dweight, dbias = backward_norm(dy)
            self.weight.grad += dweight
            self.bias.grad += dbias
            return dx

        return y, backward
