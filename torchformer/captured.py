"""A training step as one CUDA graph for each shape of batch.

A step of a small model is a thousand kernels of a few microseconds each, and the CPU needs longer
to launch them than the GPU to run them.  A graph is recorded once and launched at once.  It reads
and writes where it did when it was recorded, so

    batches are padded to a few shapes, the buckets, each of which has its graph and its inputs
    the rate is a tensor on the device, and so is the optimizer's count of steps
    all graphs share one pool of memory, as no two run at a time; the first step of a bucket, which
    is none, takes as much again beside it, and gives it back

The data set stays with the host: it draws a batch in less time than a step takes, while the device
is busy with the one before, and copies a few kilobytes.

Padding changes no loss and no gradient: targets that are pads do not count, sources that are pads
are not attended to.  Dropout goes on as it does without a graph, replay by replay.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from npformer.tasks import PAD, Batch
from torchformer.masks import FULL


class Shape(NamedTuple):
    """What a graph is for: the columns of src and of tgt, and whether src is free of pads."""

    S: int
    T: int
    is_full: bool


class CapturedStep:
    """`step` (src, tgt, **options) -> loss, captured for each bucket that comes along.

    A bucket's first batch takes the step as it is written: what is made once (compiled kernels,
    workspaces, the optimizer's state) is made then.  Its second one is recorded, and launched.
    """

    def __init__(
        self, step: Callable[..., Tensor], batch_size: int, max_len: int, device: torch.device
    ):
        self.step, self.batch_size, self.max_len = step, batch_size, max_len
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)  # of the last step
        self.forget()

    def forget(self) -> None:
        """Give up the graphs and their memory."""
        self.inputs: dict[Shape, tuple[Tensor, Tensor]] = {}
        self.graphs: dict[Shape, Any] = {}
        self.pool: Any = None
        if self.stream:
            torch.cuda.empty_cache()

    def __call__(self, batch: Batch) -> Tensor:
        """One step; returns its loss, which the next one overwrites."""
        ids = in_bucket(batch, self.batch_size, self.max_len)
        options = options_of(ids)
        shape = Shape(ids.src.shape[1], ids.tgt.shape[1], bool(options))
        is_new = shape not in self.inputs
        if is_new:
            src, tgt = (torch.empty(x.shape, dtype=torch.int64, device=self.device) for x in ids)
            self.inputs[shape] = src, tgt
        for there, x in zip(self.inputs[shape], map(torch.from_numpy, ids), strict=True):
            there.copy_(x.pin_memory() if self.stream else x, non_blocking=True)

        def call() -> None:
            self.loss.copy_(self.step(*self.inputs[shape], **options))

        if is_new:
            with aside(self.stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable")
                call()
            return self.loss
        if shape not in self.graphs:
            self.graphs[shape], _ = record(call, self.stream, self.pool)
            self.pool = self.graphs[shape].pool()
        self.graphs[shape].replay()
        return self.loss


def in_bucket(batch: Batch, batch_size: int, max_len: int) -> Batch:
    """The batch in the shape of its bucket: pads to the right, rows that ask for nothing below.

    src (B, S)   tgt (B, T + 1)   ->   (batch_size, S or a little more), (batch_size, T + 1 or more)
    """
    src, tgt = (np.asarray(ids) for ids in batch)
    (B, S), T = src.shape, tgt.shape[1] - 1
    wide = np.full((batch_size, min(rounded_up(S), max_len)), PAD)
    wide[:B, :S] = src
    wide[B:, :S] = src[-1]  # any words: a row without a target has no part in the loss
    long = np.full((batch_size, min(rounded_up(T), max_len) + 1), PAD)
    long[:B, : T + 1] = tgt
    return Batch(wide, long)


def rounded_up(n: int) -> int:
    """To a multiple of 4, from 65 on of 8, from 129 on of 16, ...: eight sizes an octave."""
    unit = max(4, 2 ** (n - 1).bit_length() // 16)
    return -(-n // unit) * unit


def options_of(batch: Batch) -> dict[str, Any]:
    """For the model's forward: what the host knows of a batch, so that no device need be asked."""
    return {"src_mask": FULL} if (batch.src != PAD).all() else {}


@contextmanager
def aside(stream: Any) -> Iterator[None]:
    """On that stream, after what is under way and before what comes; on a CPU, None, at once."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def record(call: Callable[[], Any], stream: Any = None, pool: Any = None) -> tuple[Any, Any]:
    """A CUDA graph of `call`, and where its result will be.  Nothing is computed yet.

    `call` has been called before, on a stream that is not the default one, better the same.
    """
    torch.cuda.empty_cache()  # what those calls have used goes to the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = call()
    return graph, result
