"""A training step of growing width: where PyTorch, and where a GPU, begins to pay."""

import argparse
from collections.abc import Sequence

from benchmarks import harness
from benchmarks.configs import Size
from benchmarks.contenders import NPFORMER, TORCH
from benchmarks.harness import Run
from benchmarks.training import has_cuda, measure_step

DESCRIPTION = """\
Time a training step (3+3 layers, batch 32, length 32, vocabulary 1000, dropout 0.1) at widths from
32 to 512 by npformer and by torch.nn.Transformer on the CPU and, where there is one, on a GPU.

  python -m benchmarks.sweep --quick
"""
WIDTHS = (32, 64, 128, 256, 512)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.Parser("sweep", DESCRIPTION, rounds=5, quick_rounds=3)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: also a GPU")
    parser.set_defaults(clip=True)
    parser.main(argv, measure_all, draw)


def measure_all(options: argparse.Namespace) -> list[Run]:
    devices = ["cpu", "cuda"] if has_cuda(options.device) else ["cpu"]
    backends = [b for b in ("npformer", "torch") if b != "torch" or harness.is_installed("torch")]
    widths = WIDTHS[:3] if options.quick else WIDTHS
    sizes = [Size(f"width {C}", C, 3, max(2, C // 32), 4 * C, 1000, 32, 32) for C in widths]
    return [measure_step(size, 0.1, backends, devices, options) for size in sizes]


def draw(runs: list[Run]) -> str:
    """One row for each width."""
    names = [m.name for m in runs[0].measurements]
    rows = []
    for run in runs:
        cells = [harness.milliseconds(run[name]) for name in names]
        of = f"{run.ratio(NPFORMER, TORCH):.2f}" if TORCH in run else ""
        rows.append([str(run.about["config"]["d_model"]), *cells, of])
    threads = runs[0].measurements[0].threads
    header = ["d_model", *(f"{name}, ms" for name in names), "npformer / torch"]
    return f"a step, dropout 0.1, threads {threads}\n\n{harness.table(header, rows)}"


if __name__ == "__main__":
    main()
