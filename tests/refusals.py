"""What is refused where, and in which words: the rows of the table of test_refusals.py."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from npformer import TransformerConfig

SMALL = TransformerConfig(11, 9, d_model=8, n_heads=2, d_ff=12, n_encoder_layers=1, max_len=16)


class Row(NamedTuple):
    """One thing that is refused: by npformer, and by its twin in the same words."""

    what: str
    npformer: Callable[[], object] | None
    torchformer: Callable[[], object] | None  # None: there is no such thing there
    message: str  # a regular expression
    error: type[Exception] = ValueError
    option: str = ""  # of whose rows it is one: they are one test


def rows(
    what: str,
    npformer: Callable[[Any], object] | None,
    torchformer: Callable[[Any], object] | None,
    message: str,
    values: list,
    error: type[Exception] = ValueError,
) -> list[Row]:
    """One row for each value, which is handed to both."""

    def given(call, value):
        return call and (lambda: call(value))

    # Without places in memory, which differ from one process of pytest-xdist to the other
    names = [f"{what} {re.sub(r' at 0x[0-9A-Fa-f]+', '', repr(value))}" for value in values]
    return [
        Row(name, given(npformer, value), given(torchformer, value), message, error, what)
        for name, value in zip(names, values, strict=True)
    ]


# Of no use for the kind of option, whatever its range
NO_NUMBERS = [None, "1", True, np.True_, [1], 1j, np.ones(2)]
NO_INTEGERS = [*NO_NUMBERS, 1.5, 5.0, np.float32(2), math.nan, torch.tensor(2.0)]
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan")]
