"""Dropout that can be seen and repeated: record the masks of one run, replay them in another.

    with recorded_masks() as masks:
        logits, backward = model(src, tgt, rng=rng)
    twin.train()(src, tgt, rng=Replay(masks))       # torchformer: the same entries dropped

Two implementations never draw the same random numbers, so without this neither their values nor
their gradients can be compared while dropout is on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from npformer import ops


class Drawn(NamedTuple):
    """One call of dropout_mask: what was asked for, and the answer."""

    shape: tuple[int, ...]
    p: float
    keep: np.ndarray  # boolean, True where an entry stays


@contextmanager
def recorded_masks() -> Iterator[list[Drawn]]:
    """A list that fills with every dropout mask that npformer draws inside, in order."""
    drawn: list[Drawn] = []
    original = ops.dropout_mask

    def record(shape, p, rng):
        keep = original(shape, p, rng)
        drawn.append(Drawn(tuple(shape), p, keep))
        return keep

    ops.dropout_mask = record
    try:
        yield drawn
    finally:
        ops.dropout_mask = original


class Replay:
    """An `rng` for torchformer that hands out recorded masks, in the order they were drawn in."""

    def __init__(self, drawn: Sequence[Drawn]):
        self.rest = list(drawn)

    def dropout_mask(self, shape: Sequence[int], p: float) -> np.ndarray:
        """Raises AssertionError where the two runs do not ask for the same masks."""
        assert self.rest, f"a mask {tuple(shape)}, p={p} is asked for, but no more were drawn"
        drawn = self.rest.pop(0)
        assert (tuple(shape), p) == drawn[:2], (
            f"a mask {tuple(shape)}, p={p} is asked for, but the next one is {drawn.shape}, "
            f"p={drawn.p}"
        )
        return drawn.keep
