"""Where a token stands: added to its embedding, because attention itself cannot tell   [§ 3.5]."""

import math

import torch
from torch import Tensor, nn

from npformer.options import integer


def sinusoidal_table(n: int, d_model: int) -> Tensor:
    """PE[t, 2i] = sin(t / 10000^(2i/C)),  PE[t, 2i+1] = cos(t / 10000^(2i/C)).   (n, C), float64"""
    n, d_model = integer("n", n, 1), integer("d_model", d_model, 1)
    t = torch.arange(n, dtype=torch.float64)[:, None]  # (n, 1)
    even = torch.arange(0, d_model, 2, dtype=torch.float64)
    frequency = torch.exp(-math.log(10000) / d_model * even)  # 1 / 10000^(2i/C)
    angle = t * frequency  # (n, ceil(C/2)), in radians
    table = torch.empty(n, d_model, dtype=torch.float64)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle.cos()[:, : d_model // 2]
    return table


class SinusoidalPositions(nn.Module):
    """y = x + PE[offset : offset + T], a fixed table.   x (B, T, C)   ->   y (B, T, C)"""

    table: Tensor

    def __init__(self, max_len: int, d_model: int):
        super().__init__()
        table = sinusoidal_table(integer("max_len", max_len, 1), d_model)
        self.register_buffer("table", table, persistent=False)

    def _apply(self, fn, recurse=True):
        """`.to(device)` is to move the table, `.to(dtype)` not to round it: it is cast at use."""
        super()._apply(fn, recurse)
        n, d_model = self.table.shape
        self.table = sinusoidal_table(n, d_model).to(self.table.device)
        return self

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        _check_length(x, offset, len(self.table))
        rows = self.table[offset : offset + x.shape[1]]  # (T, C), the same for every sample
        return x + rows.to(x.dtype)


class LearnedPositions(nn.Module):
    """y = x + weight[offset : offset + T], learned.   x (B, T, C)   ->   y (B, T, C)"""

    def __init__(self, max_len: int, d_model: int):
        super().__init__()
        max_len, d_model = integer("max_len", max_len, 1), integer("d_model", d_model, 1)
        self.weight = nn.Parameter(torch.empty(max_len, d_model).normal_(0, d_model**-0.5))

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        _check_length(x, offset, len(self.weight))
        T = x.shape[1]
        return x + self.weight[offset : offset + T]


def _check_length(x: Tensor, offset: int, max_len: int) -> None:
    if integer("offset", offset, 0) + x.shape[1] > max_len:
        raise ValueError(
            f"the sequence has {offset + x.shape[1]} positions, the model has {max_len} (max_len)"
        )
