"""One training step of the same model, against PyTorch and against its own matrix products."""

import argparse
from collections.abc import Sequence

import numpy as np

from benchmarks import breakdown, harness
from benchmarks.configs import Size
from benchmarks.contenders import (
    BACKENDS,
    FLOOR,
    SQUARE,
    TORCH,
    Floor,
    Problem,
    SquareProducts,
    Step,
    describe,
    make,
    title,
)
from benchmarks.harness import BenchmarkError, Contender, Run, measure, numpy_threads, pinned

DESCRIPTION = """\
Time one training step (zero_grad, forward, loss, backward, clip, Adam) of the same model, weights
and batch by npformer, torchformer and torch.nn.Transformer, in turns, with equal threads.

Before anything is timed, all of them must agree on the loss and on every gradient.  The floor is
the matrix products of the step alone, in NumPy; its rate is printed beside that of large square
products of the same work, so that nobody wins by a slow floor.

  python -m benchmarks.training --quick
  python -m benchmarks.training --config M --profile
"""
TOLERANCE = 2e-3  # of the largest gradient: float32, where a ReLU near 0 may fall either way


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.Parser("training", DESCRIPTION, rounds=15, quick_rounds=5)
    add = parser.add_argument
    add("--config", type=harness.sizes, default=None, help="of S, M, B (default all; quick: S,M)")
    add("--dropout", type=probabilities, default=[0.0, 0.1], help="default 0,0.1")
    add("--clip", action=argparse.BooleanOptionalAction, default=True, help="gradients, to norm 1")
    add(
        "--backends",
        type=lambda text: harness.one_of(BACKENDS, "backend", text),
        help=f"of {','.join(BACKENDS)} (default: what is installed, without compile and jax)",
    )
    add("--compile", action="store_true", help="also torch.compile (a minute for each model)")
    add("--jax", action="store_true", help="also JAX")
    add(
        "--twins",
        action="store_true",
        help="torchformer against torch.nn.Transformer with the same masks, eager and compiled; "
        "all with the fused Adam, as torchformer's trainer has it",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: also a GPU")
    add("--profile", action="store_true", help="only show where npformer's step goes, op by op")
    parser.main(argv, measure_all, draw)


def probabilities(text: str) -> list[float]:
    try:
        chosen = [float(p) for p in text.split(",")]
    except ValueError:
        chosen = [-1.0]
    if not all(0 <= p < 1 for p in chosen):
        raise argparse.ArgumentTypeError(f"expected probabilities below 1, got {text!r}")
    return chosen


def measure_all(options: argparse.Namespace) -> list[Run]:
    backends = TWINS if options.twins else options.backends or default_backends(options.threads)
    backends += [b for b in ("compile", "jax") if getattr(options, b) and b not in backends]
    devices = ["cpu", "cuda"] if has_cuda(options.device) else ["cpu"]
    options.config = options.config or harness.sizes("S,M" if options.quick else "S,M,B")
    cases = [(size, p) for size in options.config for p in options.dropout]
    if options.profile:
        return [breakdown.measure_ops(size, p, options) for size, p in cases]
    return [measure_step(size, p, backends, devices, options) for size, p in cases]


TWINS = ["torchformer", "torch", "masked", "twin-compile", "masked-compile"]


def default_backends(threads: int) -> list[str]:
    wanted = ["npformer", "torchformer", "torch", "fused", "floor"]
    if threads > 1:
        wanted.insert(1, "threads")
    return [backend for backend in wanted if harness.is_installed(BACKENDS[backend][1])]


def has_cuda(device: str) -> bool:
    if device == "cpu" or (device == "auto" and not harness.is_installed("torch")):
        return False
    torch = harness.require("torch", "torch")
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: torch finds no CUDA device")
    return torch.cuda.is_available()


def measure_step(
    size: Size, dropout: float, backends: list[str], devices: list[str], options: argparse.Namespace
) -> Run:
    label = f"{size.name}, dropout {dropout:g}"
    problem = Problem(size, dropout, options.clip, fused=options.twins)
    with pinned(options.threads):
        made = [make(backend, problem, threads=options.threads) for backend in backends]
        if "cuda" in devices:
            made += [make(b, problem, "cuda") for b in backends if b in ("torchformer", "torch")]
        check_same({c.name: step for c, step in made if step})
        contenders = [c for c, _ in made]
        about = describe("step", problem)
        if "floor" in backends:
            floor = Floor(size)
            square = SquareProducts(floor.flops)
            contenders.append(Contender(SQUARE, square, numpy_threads))
            about |= {"floor_flops": floor.flops, "square_flops": square.flops}
        return measure(contenders, rounds=options.rounds, about=about, label=label)


def check_same(steps: dict[str, Step]) -> None:
    """Refuse to time contenders that do not compute the same loss and the same gradients."""
    reference, expected_loss, expected = "", 0.0, {}
    for name, step in steps.items():
        loss, gradients = step.gradients()
        if not expected:
            reference, expected_loss = name, loss
            expected = {key: g.copy() for key, g in gradients.items()}
            continue
        if abs(loss - expected_loss) > 1e-4 * abs(expected_loss):
            raise BenchmarkError(f"{name} has the loss {loss}, {reference} {expected_loss}")
        if gradients.keys() != expected.keys():
            raise BenchmarkError(f"{name} and {reference} have different parameters")
        largest = max(float(np.linalg.norm(g)) for g in expected.values())
        for key, gradient in gradients.items():
            if np.linalg.norm(gradient - expected[key]) > TOLERANCE * largest:
                raise BenchmarkError(f"{name} and {reference} differ in the gradient of {key}")


def draw(runs: list[Run]) -> str:
    return "\n\n".join(map(draw_run, runs))


def draw_run(run: Run) -> str:
    """One run as a table: medians, spread, and what they are of torch's and of the floor's."""
    if run.about["kind"] == "breakdown":
        return breakdown.draw(run)
    header = ["", "ms", "spread", "/ torch", "/ floor"]
    rows = []
    for m in run.measurements:
        if m.name != SQUARE:
            of = [f"{run.ratio(m.name, r):.2f}" if r in run else "" for r in (TORCH, FLOOR)]
            rows.append([m.name, harness.milliseconds(m), f"±{100 * m.spread:.0f} %", *of])
    lines = [title(run), "", harness.table(header, rows)]
    if FLOOR in run:
        about = run.about
        rate = about["floor_flops"] / run[FLOOR].median / 1e9
        square = about["square_flops"] / run[SQUARE].median / 1e9
        share = run.ratio(SQUARE, FLOOR) * about["floor_flops"] / about["square_flops"]
        lines.append(
            f"\nfloor: {about['floor_flops'] / 1e9:.3g} GFLOP at {rate:.0f} GFLOP/s, "
            f"{100 * share:.0f} % of the {square:.0f} GFLOP/s of square products of the same work"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
