"""How near each piece of a step comes to what the machine can do: arithmetic against memory."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness
from benchmarks.configs import Size
from benchmarks.harness import Contender, Run, measure, numpy_threads, pinned
from npformer import ops

DESCRIPTION = """\
Three ceilings are measured: the rate of large square products, that of copying arrays which no
cache holds, from memory, and that of copying an activation of the step, which a cache may hold.
Then npformer's ops, forward, at the shapes of a step.  An op's intensity is its floating-point
operations per byte that it must at least read and write; the roof over it is the lower of the
arithmetic ceiling and intensity times a copying rate.  An op above the roof of the memory has read
its arrays from the cache.

  python -m benchmarks.roofline --config M
"""
SQUARE, COPY, COPY_CACHED = "square products", "copy", "copy of an activation"
CEILINGS = (SQUARE, COPY, COPY_CACHED)


class Piece(NamedTuple):
    """One op at one shape, and what it costs at least."""

    name: str
    call: Callable[[], Any]
    flops: int
    n_bytes: int


def pieces(size: Size) -> Iterator[Piece]:
    """The ops of a step.  Elementwise ones count each +, *, exp or comparison as one operation."""
    N, C, F, V = size.batch * size.length, size.d_model, size.d_ff, size.vocab_size
    B, H, T, D = size.batch, size.n_heads, size.length, size.d_model // size.n_heads
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    for name, n_in, n_out in (("projection", C, C), ("feed-forward", C, F), ("head", C, V)):
        x, w, b = draw(N, n_in), draw(n_out, n_in), draw(n_out)
        n_numbers = N * n_in + n_out * n_in + N * n_out
        yield Piece(
            name, lambda x=x, w=w, b=b: ops.linear(x, w, b), 2 * N * n_in * n_out, n_numbers * 4
        )
    q, k, scores = draw(B, H, T, D), draw(B, H, T, D), draw(B, H, T, T)
    n_numbers = 2 * q.size + scores.size
    yield Piece("scores", lambda: ops.matmul(q, k.mT), 2 * scores.size * D, n_numbers * 4)
    yield Piece("softmax", lambda: ops.softmax(scores), 3 * scores.size, 2 * scores.size * 4)
    x, w, b, h = draw(N, C), draw(C), draw(C), draw(N, F)
    yield Piece("LayerNorm", lambda: ops.layer_norm(x, w, b), 7 * x.size, 2 * x.size * 4)
    yield Piece("ReLU", lambda: ops.relu(h), h.size, 2 * h.size * 4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.Parser("roofline", DESCRIPTION, rounds=7, quick_rounds=3)
    add = parser.add_argument
    add("--config", type=harness.sizes, default=None, help="of S, M, B (default all; quick: M)")
    parser.main(argv, measure_all, draw)


def measure_all(options: argparse.Namespace) -> list[Run]:
    sizes = options.config or harness.sizes("M" if options.quick else "S,M,B")
    return [measure_pieces(size, options) for size in sizes]


def measure_pieces(size: Size, options: argparse.Namespace) -> Run:
    a, copied = np.ones((1024, 1024), np.float32), np.ones(1 << 25, np.float32)  # 128 MiB
    activation = np.ones((size.batch * size.length, size.d_ff), np.float32)
    out, into, into_cache = np.empty_like(a), np.empty_like(copied), np.empty_like(activation)
    ceilings = [
        Piece(SQUARE, lambda: np.matmul(a, a, out=out), 2 * 1024**3, 3 * a.nbytes),
        Piece(COPY, lambda: np.copyto(into, copied), 0, 2 * copied.nbytes),
        Piece(COPY_CACHED, lambda: np.copyto(into_cache, activation), 0, 2 * activation.nbytes),
    ]
    found = [*ceilings, *pieces(size)]
    about = {
        "kind": "roofline",
        "config": asdict(size),
        "flops": {piece.name: piece.flops for piece in found},
        "bytes": {piece.name: piece.n_bytes for piece in found},
    }
    contenders = [Contender(piece.name, piece.call, numpy_threads) for piece in found]
    with pinned(options.threads):
        return measure(
            contenders, rounds=options.rounds, slot=0.05, about=about, label=f"roofline {size.name}"
        )


def points(run: Run) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """GFLOP/s of square products, GB/s of copying, and (intensity, GFLOP/s) of each piece."""
    flops, n_bytes = run.about["flops"], run.about["bytes"]
    rates = {m.name: flops[m.name] / m.median / 1e9 for m in run.measurements}
    found = {n: (flops[n] / n_bytes[n], r) for n, r in rates.items() if n not in CEILINGS}
    return rates[SQUARE], moved(run, COPY), found


def moved(run: Run, name: str) -> float:
    """GB/s that it reads and writes, at least; NaN where it was not measured, as in old results."""
    if name not in run.about["bytes"]:
        return math.nan
    return run.about["bytes"][name] / run[name].median / 1e9


def draw(runs: list[Run]) -> str:
    """One table for each size."""
    tables = []
    for run in runs:
        top, copying, found = points(run)
        slopes = {"memory": copying, "cache": moved(run, COPY_CACHED)}
        slopes = {place: slope for place, slope in slopes.items() if not math.isnan(slope)}
        rows = []
        for name, (intensity, rate) in found.items():
            row = [name, f"{intensity:.3g}", f"{rate:.3g}", f"{moved(run, name):.3g}"]
            for slope in slopes.values():
                roof = min(top, intensity * slope)
                row += [f"{roof:.3g}", f"{100 * rate / roof:.0f} %"]
            rows.append(row)
        header = ["forward", "FLOP/byte", "GFLOP/s", "GB/s"]
        header += [text for place in slopes for text in (f"roof: {place}", "of it")]
        copies = " and ".join(f"{slope:.1f} GB/s from {place}" for place, slope in slopes.items())
        title = (
            f"{run.about['config']['name']}: square products {top:.0f} GFLOP/s, copying {copies}, "
            f"threads {run.measurements[0].threads}"
        )
        tables.append(f"{title}\n\n{harness.table(header, rows)}")
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
