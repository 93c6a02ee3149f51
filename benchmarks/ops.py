"""Every op forward and backward, NumPy against torch, at the shapes of a training step."""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness
from benchmarks.configs import Size
from benchmarks.harness import BenchmarkError, Contender, Run, measure, numpy_threads, torch_threads
from npformer import ops

DESCRIPTION = """\
Time each op of npformer and its twin in torch: forward alone, and forward with backward.  Both get
the same arrays, and their values and gradients are compared before anything is timed.

  python -m benchmarks.ops --quick
  python -m benchmarks.ops --config M --ops softmax,layer_norm
"""
FORWARD, BOTH = ("npformer forward", "torch forward"), ("npformer", "torch")
NAMES = (
    *("matmul", "bmm", "linear", "embedding", "softmax", "log_softmax", "masked_fill"),
    *("attention_weights", "attention", "layer_norm", "relu", "gelu", "gelu_tanh", "dropout"),
    "cross_entropy",
)
TOLERANCE = 1e-4  # float32: of the largest entry


class Case(NamedTuple):
    """One op at one shape.  The functions take `inputs`, the float arrays, and nothing else."""

    name: str
    ours: Callable[..., ops.Forward]
    theirs: Callable[..., Any]  # torch tensors in and out
    inputs: tuple[np.ndarray, ...]
    is_random: bool = False  # dropout: each draws its own mask, so values cannot be compared


def cases(size: Size) -> Iterator[Case]:
    """B batch, T positions, C width, H heads, D = C / H, F feed-forward width, V, N = B T."""
    import torch
    import torch.nn.functional as F

    B, T, C, H, V = size.batch, size.length, size.d_model, size.n_heads, size.vocab_size
    N, d_ff = B * T, size.d_ff
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    ids = rng.integers(0, V, (B, T))
    ids_torch = torch.from_numpy(ids)
    causal = np.tri(T, dtype=bool)
    causal_torch = torch.from_numpy(causal)
    heads, scores, hidden = (B, H, T, C // H), (B, H, T, T), (B, T, d_ff)

    yield Case("matmul", ops.matmul, torch.matmul, (draw(N, C), draw(C, C)))
    yield Case("bmm", ops.bmm, torch.bmm, (draw(B * H, T, C // H), draw(B * H, C // H, T)))
    for n_in, n_out in ((C, C), (C, d_ff), (d_ff, C), (C, V)):
        inputs = draw(B, T, n_in), draw(n_out, n_in), draw(n_out)
        yield Case(f"linear {n_in} to {n_out}", ops.linear, F.linear, inputs)
    yield Case(
        "embedding",
        lambda weight: ops.embedding(ids, weight, 0),
        lambda weight: F.embedding(ids_torch, weight, 0),
        (draw(V, C),),
    )
    yield Case("softmax", ops.softmax, functools.partial(F.softmax, dim=-1), (draw(*scores),))
    yield Case(
        "log_softmax", ops.log_softmax, functools.partial(F.log_softmax, dim=-1), (draw(N, V),)
    )
    yield Case(
        "masked_fill",
        lambda x: ops.masked_fill(x, ~causal, -9.0),
        lambda x: x.masked_fill(~causal_torch, -9.0),
        (draw(*scores),),
    )
    yield Case(
        "attention_weights",
        lambda q, k: ops.attention_weights(q, k, causal),
        lambda q, k: (
            (q @ k.mT * (C // H) ** -0.5).masked_fill(~causal_torch, -torch.inf).softmax(-1)
        ),
        (draw(*heads), draw(*heads)),
    )
    yield Case(
        "attention",
        lambda q, k, v: ops.attention(q, k, v, causal),
        functools.partial(F.scaled_dot_product_attention, is_causal=True),
        (draw(*heads), draw(*heads), draw(*heads)),
    )
    yield Case(
        "layer_norm",
        ops.layer_norm,
        lambda x, weight, bias: F.layer_norm(x, (C,), weight, bias),
        (draw(B, T, C), draw(C), draw(C)),
    )
    yield Case("relu", ops.relu, F.relu, (draw(*hidden),))
    yield Case("gelu", ops.gelu, F.gelu, (draw(*hidden),))
    gelu_tanh = functools.partial(F.gelu, approximate="tanh")
    yield Case("gelu_tanh", ops.gelu_tanh, gelu_tanh, (draw(*hidden),))
    yield Case(
        "dropout",
        lambda x: ops.dropout(x, 0.1, rng),
        lambda x: F.dropout(x, 0.1),
        (draw(*hidden),),
        is_random=True,
    )
    targets, targets_torch = ids.reshape(-1), ids_torch.flatten()
    yield Case(
        "cross_entropy",
        lambda logits: ops.cross_entropy(logits, targets),
        lambda logits: F.cross_entropy(logits, targets_torch),
        (draw(N, V),),
    )


def measure_case(case: Case, size: Size, options: argparse.Namespace) -> Run:
    import torch

    tensors = [torch.from_numpy(x).requires_grad_() for x in case.inputs]
    shape = np.shape(case.ours(*case.inputs)[0])
    dy = np.asarray(np.random.default_rng(1).standard_normal(shape), np.float32)
    dy_torch = torch.from_numpy(dy)

    def ours() -> Any:
        y, backward = case.ours(*case.inputs)
        return y, backward(dy)

    def theirs() -> Any:
        y = case.theirs(*tensors)
        return y, torch.autograd.grad(y, tensors, dy_torch)

    if not case.is_random:
        check_same(case.name, ours(), theirs())
    contenders = [
        Contender(FORWARD[0], lambda: case.ours(*case.inputs), numpy_threads),
        Contender(FORWARD[1], lambda: case.theirs(*tensors), torch_threads),
        Contender(BOTH[0], ours, numpy_threads),
        Contender(BOTH[1], theirs, torch_threads),
    ]
    about = {"config": asdict(size), "op": case.name, "shapes": [x.shape for x in case.inputs]}
    label = f"{size.name}, {case.name}"
    return measure(contenders, rounds=options.rounds, slot=0.02, about=about, label=label)


def check_same(name: str, ours: Any, theirs: Any) -> None:
    """Refuse to time two functions that are not the same."""
    y, gradients = ours
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    for mine, other in zip((y, *gradients), (theirs[0], *theirs[1]), strict=True):
        expected = other.detach().numpy()
        if np.abs(mine - expected).max() > TOLERANCE * np.abs(expected).max():
            raise BenchmarkError(f"{name}: npformer and torch do not compute the same")


def measure_all(options: argparse.Namespace) -> list[Run]:
    harness.require("torch", "torch")
    options.config = options.config or harness.sizes("S,M" if options.quick else "S,M,B")
    with harness.pinned(options.threads):
        return [
            measure_case(case, size, options)
            for size in options.config
            for case in cases(size)
            if not options.ops or case.name.split()[0] in options.ops
        ]


def draw(runs: list[Run]) -> str:
    """One table for each size."""
    by_size: dict[str, list[list[str]]] = {}
    for run in runs:
        cells = [harness.milliseconds(run[name]) for name in (*FORWARD, *BOTH)]
        ratios = [f"{run.ratio(*pair):.2f}" for pair in (FORWARD, BOTH)]
        shapes = " ".join("x".join(map(str, shape)) for shape in run.about["shapes"])
        row = [run.about["op"], shapes, *cells[:2], ratios[0], *cells[2:], ratios[1]]
        by_size.setdefault(run.about["config"]["name"], []).append(row)
    header = ["ms", "shapes", "forward", "torch", "ratio", "with backward", "torch", "ratio"]
    threads = runs[0].measurements[0].threads
    return "\n\n".join(
        f"{name}, threads {threads}\n\n{harness.table(header, rows)}"
        for name, rows in by_size.items()
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.Parser("ops", DESCRIPTION, rounds=15, quick_rounds=5)
    add = parser.add_argument
    add("--config", type=harness.sizes, default=None, help="of S, M, B (default all; quick: S,M)")
    add("--ops", type=lambda text: harness.one_of(NAMES, "op", text), help=f"of {','.join(NAMES)}")
    parser.main(argv, measure_all, draw)


if __name__ == "__main__":
    main()
