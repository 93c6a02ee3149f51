"""Where a token stands: added to its embedding, because attention itself cannot tell   [§ 3.5]."""

import math

import numpy as np
from numpy.typing import DTypeLike

from npformer.module import Module, Parameter
from npformer.ops import Array, Forward, Rng
from npformer.options import integer


def sinusoidal_table(n: int, d_model: int) -> Array:
    """PE[t, 2i] = sin(t / 10000^(2i/C)),  PE[t, 2i+1] = cos(t / 10000^(2i/C))   ->   (n, C)

    Sine and cosine interleaved, as in the paper.  The two of one frequency turn like a clock hand
    with t, so PE[t + k] is PE[t] rotated by a fixed angle: a linear map that depends on k alone.
    Always float64; an odd C leaves out the last cosine.
    """
    n, d_model = integer("n", n, 1), integer("d_model", d_model, 1)
    t = np.arange(n)[:, np.newaxis]  # (n, 1)
    frequency = np.exp(-math.log(10000) / d_model * np.arange(0, d_model, 2))  # 1 / 10000^(2i/C)
    angle = t * frequency  # (n, ceil(C/2)), in radians
    table = np.empty((n, d_model))
    table[:, 0::2] = np.sin(angle)
    table[:, 1::2] = np.cos(angle)[:, : d_model // 2]
    return table


class SinusoidalPositions(Module):
    """y = x + PE[offset : offset + T], a fixed table.   x (B, T, C)   ->   y (B, T, C)

    `offset` is the position of the first token: not 0 when earlier ones were handled before.
    """

    def __init__(self, max_len: int, d_model: int):
        self.table = sinusoidal_table(integer("max_len", max_len, 1), d_model)

    def forward(self, x: Array, offset: int = 0) -> Forward:
        _check_length(x, offset, len(self.table))
        rows = self.table[offset : offset + x.shape[1]]  # (T, C), the same for every sample
        return x + rows.astype(x.dtype), lambda dy: dy


class LearnedPositions(Module):
    """y = x + weight[offset : offset + T], learned.   x (B, T, C)   ->   y (B, T, C)

    The rows start N(0, 1/C), like the embeddings.
    """

    def __init__(self, max_len: int, d_model: int, *, rng: Rng, dtype: DTypeLike = np.float32):
        max_len, d_model = integer("max_len", max_len, 1), integer("d_model", d_model, 1)
        self.weight = Parameter(rng.normal(0, d_model**-0.5, (max_len, d_model)).astype(dtype))

    def forward(self, x: Array, offset: int = 0) -> Forward:
        _check_length(x, offset, len(self.weight.data))
        T = x.shape[1]
        y = x + self.weight.data[offset : offset + T]

        def backward(dy):
            # dweight[offset : offset + T] = Σ dy over the samples, which all used these rows.
            drows = dy.sum(axis=0)  # (T, C)
            self.weight.grad[offset : offset + T] += drows
            return dy

        return y, backward


def _check_length(x: Array, offset: int, max_len: int) -> None:
    if integer("offset", offset, 0) + x.shape[1] > max_len:
        raise ValueError(
            f"the sequence has {offset + x.shape[1]} positions, the model has {max_len} (max_len)"
        )
