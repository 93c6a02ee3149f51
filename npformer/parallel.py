"""One training step on several processor cores: the batch is cut, and each thread takes a part.

BLAS can use several cores by itself, but then the threads meet again after every product, and all
that is not a product has one core.  NumPy lets go of Python's lock while it computes, so whole
forward and backward passes can run side by side, each with BLAS held at one thread.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from npformer.ops import Array, Rng
from npformer.options import integer
from npformer.transformer import Transformer

# (model, src, tgt, rng) -> loss: adds to the model's gradients; its loss is a share of the batch's
Step = Callable[[Transformer, Array, Array, Rng], float]


class BatchThreads:
    """`threads` threads, each with its own view of the model and its own random numbers.

    All read the same weights.  Each adds to gradients of its own, and those are summed in a fixed
    order: the same seed and the same number of threads give the same bits, run after run, and
    without dropout one thread gives the same gradients to rounding.

    Raises ImportError where threadpoolctl, which holds BLAS at one thread, is not installed.
    """

    def __init__(self, model: Transformer, threads: int, rng: Rng):
        threads = integer("threads", threads, 1)
        self.blas = _blas_controller()
        self.models = [model, *(model.view() for _ in range(threads - 1))]
        self.rngs: list[Any] = rng.spawn(threads)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="npformer")

    def run(self, step: Step, src: Array, tgt: Array) -> float:
        """Call `step` on every part of the batch; returns the sum of its losses.

        src (B, S)   tgt (B, T)          the sum of all gradients is added to the model's own
        """
        n_parts = min(len(self.models), len(src))
        ends = [len(src) * i // n_parts for i in range(n_parts + 1)]
        parts = [slice(*pair) for pair in pairwise(ends)]
        own, *others = (model.parameters() for model in self.models)
        pairs = (pair for view in others for pair in zip(own, view, strict=True))
        if any(getattr(part, "of", None) is not p for p, part in pairs):
            raise ValueError(
                "the model has other Parameters than when these threads were made: make them anew"
            )
        with self.blas.limit(limits=1, user_api="blas"):
            losses = self.pool.map(
                step, self.models, [src[p] for p in parts], [tgt[p] for p in parts], self.rngs
            )
            total = sum(losses)
        for view in others:
            for p, part in zip(own, view, strict=True):
                p.grad += part.grad
                part.grad[...] = 0
        return total


def _blas_controller() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        raise ImportError(
            "threads > 1 needs threadpoolctl, to hold BLAS at one thread each: "
            "pip install threadpoolctl",
            name="threadpoolctl",
        ) from None
    return ThreadpoolController()
