"""One training step by each contender: the same model, weights, batch, loss, clipping and Adam.

The batches have no padding, so torch.nn.Transformer needs no padding masks and gets none: it may
take its fastest path, the causal flag of its attention kernels.  The twins make padding masks from
the ids, as they always do.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.configs import Size
from benchmarks.harness import (
    BenchmarkError,
    Contender,
    Run,
    is_installed,
    numpy_threads,
    torch_threads,
)
from npformer import Adam, Transformer, clip_grad_norm, ops
from npformer.parallel import BatchThreads

RATE = 1e-5  # so small that the hundredth step costs what the first one does
MAX_NORM = 1.0

Array = np.ndarray


class Problem:
    """What all contenders are given: ids, starting weights by npformer's names, and the recipe.

    fused   all of PyTorch's have the fused Adam, as torchformer's trainer has
    """

    def __init__(
        self,
        size: Size,
        dropout: float,
        clip: bool,
        share_weights: bool = True,
        fused: bool = False,
    ):
        self.size, self.dropout, self.clip, self.fused = size, dropout, clip, fused
        self.config = size.model_config(dropout)
        rng = np.random.default_rng(0)
        ids = rng.integers(1, size.vocab_size, (2, size.batch, size.length + 1))  # 0 is padding
        self.src, self.tgt = ids[0, :, :-1], ids[1]
        self.tgt_in, self.tgt_out = self.tgt[:, :-1], self.tgt[:, 1:]
        self.weights: dict[str, Array] = {}
        if share_weights:
            self.weights = Transformer(self.config, rng).state_dict()
        for name, w in self.weights.items():
            if "embedding" not in name:  # biases 0 and norms 1 would hide a wrong one
                w += 0.02 * rng.standard_normal(w.shape, np.float32)


def describe(kind: str, problem: Problem) -> dict[str, Any]:
    """What is kept of a problem in a result."""
    size = asdict(problem.size)
    return {"kind": kind, "config": size, "dropout": problem.dropout, "clip": problem.clip}


def title(run: Run) -> str:
    about, first = run.about, run.measurements[0]
    return (
        "{name}: d_model {d_model}, {n_layers}+{n_layers} layers, {n_heads} heads, d_ff {d_ff}, "
        "vocabulary {vocab_size}, batch {batch}, length {length}\n".format(**about["config"])
        + f"dropout {about['dropout']:g}, {'clipped' if about['clip'] else 'no clipping'}, "
        f"threads {first.threads}, rounds {len(first.samples)}"
    )


class Step:
    """A training step that can be timed, and shown to be the right one."""

    def __init__(self, problem: Problem):
        self.problem = problem

    def __call__(self) -> None:
        """zero_grad, forward, loss, backward, clip, Adam."""
        raise NotImplementedError

    def gradients(self) -> tuple[float, dict[str, Array]]:
        """The loss and every gradient without dropout, by npformer's names; no weight moves."""
        raise NotImplementedError


class NumpyStep(Step):
    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.model = Transformer(problem.config, np.random.default_rng(0))
        if problem.weights:
            self.model.load_state_dict(problem.weights)
        self.optimizer = Adam(self.model.parameters(), RATE)
        self.rng = np.random.default_rng(1)

    def forward_backward(self, rng: np.random.Generator | None) -> float:
        p = self.problem
        self.optimizer.zero_grad()
        logits, backward_model = self.model(p.src, p.tgt_in, rng=rng)
        loss, backward_loss = ops.cross_entropy(logits, p.tgt_out, ignore_index=0)
        backward_model(backward_loss(1.0))
        return float(loss)

    def update(self) -> None:
        if self.problem.clip:
            clip_grad_norm(self.optimizer.parameters, MAX_NORM)
        self.optimizer.step()

    def __call__(self) -> None:
        self.forward_backward(self.rng)
        self.update()

    def gradients(self) -> tuple[float, dict[str, Array]]:
        loss = self.forward_backward(None)
        return loss, {name: p.grad for name, p in self.model.named_parameters()}


class ThreadedStep(NumpyStep):
    """The batch cut over `threads` Python threads, each with BLAS held at one."""

    def __init__(self, problem: Problem, threads: int):
        super().__init__(problem)
        self.batch_threads = BatchThreads(self.model, threads, self.rng)

    def forward_backward(self, rng: np.random.Generator | None) -> float:
        def add_gradients(model: Transformer, src: Array, tgt: Array, own_rng: Any) -> float:
            logits, backward_model = model(src, tgt[:, :-1], rng=rng and own_rng)
            loss, backward_loss = ops.cross_entropy(
                logits, tgt[:, 1:], ignore_index=0, n_targets=self.problem.tgt_out.size
            )
            backward_model(backward_loss(1.0))
            return float(loss)

        self.optimizer.zero_grad()
        return self.batch_threads.run(add_gradients, self.problem.src, self.problem.tgt)


class TorchStep(Step):
    """`kind`: "torchformer", or torch.nn.Transformer as "reference" or, with masks, "masked"."""

    def __init__(
        self,
        problem: Problem,
        kind: str,
        device: str = "cpu",
        fused: bool = False,
        compiled: bool = False,
    ):
        import torch

        super().__init__(problem)
        self.model: Any
        torch.manual_seed(1)
        if kind != "torchformer":
            from benchmarks.torch_reference import TorchTransformer, to_reference

            self.model = TorchTransformer(problem.size, problem.dropout, kind == "masked")
            weights = to_reference(problem.weights)
        else:
            import torchformer

            self.model = torchformer.Transformer(problem.config)
            self.model.right_padded = True  # as the trainer says
            weights = problem.weights
        if weights:
            self.model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
        self.model.to(device)
        self.kind, self.device = kind, device
        self.forward: Callable[..., Any] = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), RATE, fused=fused or None)
        self.src, self.tgt_in, self.tgt_out = (
            torch.tensor(ids, device=device)
            for ids in (problem.src, problem.tgt_in, problem.tgt_out)
        )

    def forward_backward(self, forward: Callable[..., Any]) -> Any:
        from torch.nn.functional import cross_entropy

        self.optimizer.zero_grad()
        logits = forward(self.src, self.tgt_in)
        loss = cross_entropy(logits.flatten(0, 1), self.tgt_out.flatten(), ignore_index=0)
        loss.backward()
        return loss

    def __call__(self) -> None:
        import torch

        self.forward_backward(self.forward)
        if self.problem.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def gradients(self) -> tuple[float, dict[str, Array]]:
        if self.problem.dropout:
            self.model.eval()  # no dropout; autograd records all the same
            loss = self.forward_backward(self.model).item()
            self.model.train()
        else:
            loss = self.forward_backward(self.forward).item()
        grads = {n: p.grad.cpu().numpy() for n, p in self.model.named_parameters()}
        if self.kind != "torchformer":
            from benchmarks.torch_reference import from_reference

            grads = from_reference(grads)
        return loss, grads


class Floor:
    """The matrix products of the step and nothing else: NumPy cannot be faster than these.

    Operands lie ready and contiguous, results go into arrays that exist: faster than any real step
    could have them.  Attention's are batched over B and H.  `products` has them by the op that
    makes them.
    """

    def __init__(self, size: Size):
        N, C, F, V = size.batch * size.length, size.d_model, size.d_ff, size.vocab_size
        feed_forward = [(C, F), (F, C)]
        encoder = 4 * [(C, C)] + feed_forward
        decoder = 8 * [(C, C)] + feed_forward
        self.arrays: dict[tuple[str, tuple[int, ...]], Array] = {}
        self.products: dict[str, list[tuple[Array, Array, Array]]] = {}
        for n_in, n_out in size.n_layers * (encoder + decoder) + [(C, V)]:
            x, y = self.array("x", N, n_in), self.array("y", N, n_out)
            weight = self.array("weight", n_out, n_in)
            self.add("linear", (x, weight.T), (y, weight), (y.T, x))  # y, dx, dweight
        B, H, T, D = size.batch, size.n_heads, size.length, size.d_model // size.n_heads
        q = self.array("q", B, H, T, D)  # and k, v, y
        scores = self.array("scores", B, H, T, T)  # and weights
        for _ in range(3 * size.n_layers):  # self-attention twice, cross-attention once
            self.add("attention_weights", (q, q.mT), (scores, q), (scores.mT, q))  # scores, dq, dk
            self.add("attention", (scores, q), (q, q.mT), (scores.mT, q))  # y, dweights, dv

    def array(self, name: str, *shape: int) -> Array:
        if (name, shape) not in self.arrays:
            rng = np.random.default_rng(0)
            self.arrays[name, shape] = rng.standard_normal(shape, np.float32)
        return self.arrays[name, shape]

    def add(self, op: str, *pairs: tuple[Array, Array]) -> None:
        for a, b in pairs:
            out = self.array("out", *a.shape[:-1], b.shape[-1])
            self.products.setdefault(op, []).append((a, b, out))

    @property
    def flops(self) -> int:
        every = (p for products in self.products.values() for p in products)
        return sum(2 * a.size * b.shape[-1] for a, b, _ in every)

    def run(self, op: str) -> None:
        for a, b, out in self.products[op]:
            np.matmul(a, b, out=out)

    def __call__(self) -> None:
        for op in self.products:
            self.run(op)


class SquareProducts:
    """The floor's work as square products, of 1024 or, where that is too much, of one smaller."""

    def __init__(self, flops: int):
        self.n_products = math.ceil(flops / (2 * 1024**3))
        n = round((flops / self.n_products / 2) ** (1 / 3))
        self.flops = self.n_products * 2 * n**3
        self.a = np.random.default_rng(0).standard_normal((n, n), np.float32)
        self.out = np.empty_like(self.a)

    def __call__(self) -> None:
        for _ in range(self.n_products):
            np.matmul(self.a, self.a, out=self.out)


NPFORMER, TORCH, FLOOR = "npformer", "torch.nn.Transformer", "floor"
TWIN, MASKED = "torchformer", f"{TORCH}, same masks"
THREADED = "npformer, batch over threads"
SQUARE = "square products"

# backend on the command line -> its name in the tables, the package it needs
BACKENDS = {
    "npformer": (NPFORMER, "numpy"),
    "threads": (THREADED, "numpy"),  # as many Python threads as the others have threads
    "torchformer": (TWIN, "torch"),
    "torch": (TORCH, "torch"),
    "fused": (f"{TORCH}, fused Adam", "torch"),
    "compile": (f"{TORCH}, compiled", "torch"),
    "masked": (MASKED, "torch"),  # of pads, which torchformer looks for and the others do not
    "twin-compile": (f"{TWIN}, compiled", "torch"),
    "masked-compile": (f"{MASKED}, compiled", "torch"),
    "jax": ("JAX, jit", "jax"),
    "floor": (FLOOR, "numpy"),
}


def make(
    backend: str, problem: Problem, device: str = "cpu", threads: int = 1
) -> tuple[Contender, Step | None]:
    """The contender of that name, and the step to be checked (the floor has none)."""
    name, package = BACKENDS[backend]
    if not is_installed(package):
        extra = f"'npformer[{package}]'" if package == "torch" else package
        raise BenchmarkError(f"backend {backend}: {package} is not installed: pip install {extra}")
    if device != "cpu":
        name = f"{name}, {device}"
    if backend == "floor":
        return Contender(name, Floor(problem.size), numpy_threads), None
    if backend == "npformer":
        step = NumpyStep(problem)
        return Contender(name, step, numpy_threads), step
    if backend == "threads":
        step = ThreadedStep(problem, threads)
        return Contender(name, step, lambda: threads), step
    if backend == "jax":
        from benchmarks.jax_reference import JaxStep, jax_threads

        step = JaxStep(problem)
        return Contender(name, step, jax_threads), step
    kind = "reference"
    if backend in ("torchformer", "twin-compile"):
        kind = "torchformer"
    elif backend.startswith("masked"):
        kind = "masked"
    is_fused = backend == "fused" or problem.fused
    step = TorchStep(problem, kind, device, is_fused, backend.endswith("compile"))
    return Contender(name, step, torch_threads), step
