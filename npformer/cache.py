"""What a decoder remembers between two tokens: the keys and values of every position so far.

A causal layer never looks ahead, so what it made of the first t positions stays what it is when
position t + 1 arrives.  Only the queries are new: a step costs what one position costs, where
starting over would cost t of them.  The memory's keys and values never change, and are made once.

    cache = model.start(src)                    # encodes src
    logits, cache = model.step(tgt, cache)      # tgt (B, T): the T tokens that come next

A cache is never written to as far as its owner can see: continue one twice, and both
continuations are right (beam search does).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npformer.ops import Array, Mask


class KeyValues:
    """The keys and values of one attention.   keys, values (B, H, S, D)

    They lie at the front of a longer `room` (2, B, H, >= S, D), so that `append` seldom copies.
    """

    def __init__(self, room: Array, length: int, taken: list[int]):
        self.room, self.length = room, length
        self.taken = taken  # [n]: the room's first n positions are someone's; shared by all owners

    @classmethod
    def of(cls, keys: Array, values: Array) -> "KeyValues":
        length = keys.shape[2]
        return cls(np.stack([keys, values]), length, [length])

    @property
    def keys(self) -> Array:
        return self.room[0, :, :, : self.length]

    @property
    def values(self) -> Array:
        return self.room[1, :, :, : self.length]

    def append(self, keys: Array, values: Array) -> "KeyValues":
        """These and then those.  keys, values (B, H, T, D)   ->   of length S + T

        Like a Python list, the room doubles when it is full: n appends copy at most 2 n positions.
        It is also left, with a copy, when another continuation of this cache took the place.
        """
        room, taken, end = self.room, self.taken, self.length + keys.shape[2]
        if end > room.shape[3] or taken[0] != self.length:
            two, B, H, _, D = room.shape
            room, taken = np.empty((two, B, H, 2 * end, D), room.dtype), [0]
            room[..., : self.length, :] = self.room[..., : self.length, :]
        room[0, :, :, self.length : end] = keys
        room[1, :, :, self.length : end] = values
        taken[0] = end
        return KeyValues(room, end, taken)

    def select(self, samples: Array) -> "KeyValues":
        """A copy of some samples, by index or by a boolean (B,)."""
        return KeyValues.of(self.keys[samples], self.values[samples])


class LayerCache(NamedTuple):
    """Of one layer: what it offers to itself, and what the memory offers."""

    own: Any  # KeyValues; None before the first step
    memory: Any  # KeyValues; None where there is no memory

    def append(self, keys: Array, values: Array) -> "LayerCache":
        own = self.own.append(keys, values) if self.own else KeyValues.of(keys, values)
        return self._replace(own=own)

    def select(self, samples: Array) -> "LayerCache":
        return LayerCache(*(kv and kv.select(samples) for kv in self))


class Cache(NamedTuple):
    """Of the whole decoder, with the padding masks of the positions it holds."""

    layers: list[LayerCache]
    tgt_mask: Mask = None  # (B, 1, 1, length); None before the first step
    memory_mask: Mask = None  # (B, 1, 1, S); None where there is no memory

    @property
    def length(self) -> int:
        """The number of target positions so far: the position of the next token."""
        return 0 if self.tgt_mask is None else self.tgt_mask.shape[-1]

    @property
    def n_samples(self) -> int | None:
        """B, or None while anything fits: before the first step of a decoder-only model."""
        mask = self.tgt_mask if self.memory_mask is None else self.memory_mask
        return None if mask is None else len(mask)

    def select(self, samples: Array) -> "Cache":
        """A copy of some samples, by index or by a boolean (B,): those that go on."""
        masks = (None if m is None else m[samples] for m in (self.tgt_mask, self.memory_mask))
        return Cache([layer.select(samples) for layer in self.layers], *masks)


def around(sublayer: Callable, x: Array, norm: Callable, norm_first: bool) -> Array:
    """A sublayer of a step and what is around it: the residual, and the norm where it belongs."""
    if norm_first:
        return x + sublayer(norm(x)[0])
    return norm(x + sublayer(x))[0]
