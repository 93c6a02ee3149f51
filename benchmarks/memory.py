"""Peak memory of inference and of training, against depth, length and batch; each in a process."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.configs import SIZES, Size
from benchmarks.harness import ROOT, BenchmarkError, Measurement, Run

DESCRIPTION = """\
The largest resident memory of a process that does nothing else: inference and three training steps
at M, with the layers, the length or the batch multiplied by 1, 2 and 4, and training at B beside
torch.nn.Transformer.  "Steps" is the peak less the peak before the first step: all but Python,
the libraries, the weights and what of gradients and moments exists before it.

  python -m benchmarks.memory --quick
"""
FACTORS = 1, 2, 4
DIMENSIONS = {"depth": "n_layers", "length": "length", "batch": "batch"}
NPFORMER, TORCH = "npformer", "torch.nn.Transformer"


def peak_bytes() -> int:
    """The most resident memory that this process ever had."""
    try:  # Linux: getrusage would also count what the parent held when it started us
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(x.split()[1]) << 10 for x in status.splitlines() if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def run_case(case: dict) -> None:
    """In the fresh process: print the peak before the first step, and after the last."""
    from benchmarks.contenders import NumpyStep, Problem, TorchStep

    if case["keep_freed_memory"]:
        harness.keep_freed_memory()
    problem = Problem(Size(**case["size"]), 0.1, clip=True, share_weights=False)
    step = NumpyStep(problem) if case["backend"] == NPFORMER else TorchStep(problem, "reference")
    before = peak_bytes()
    for _ in range(3):
        if case["mode"] == "training":
            step()
        elif isinstance(step, NumpyStep):
            step.model.infer(problem.src, problem.tgt_in)
    print(json.dumps([before, peak_bytes()]))


def peaks(size: Size, mode: str, backend: str, options: argparse.Namespace) -> list[int]:
    """Before and after the steps of one case, in a fresh process."""
    harness.progress(f"{mode}, {backend}: {size}")
    case = {"size": asdict(size), "mode": mode, "backend": backend}
    case["keep_freed_memory"] = options.keep_freed_memory
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    env = os.environ | dict.fromkeys(variables, str(options.threads))
    command = [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BenchmarkError(f"{mode}, {backend}, {size.name}: {last_line}")
    return json.loads(done.stdout)


def measure_cases(
    about: dict[str, Any], cases: dict[str, tuple[Size, str]], options: argparse.Namespace
) -> Run:
    """A run of two measurements for each case, which is a size and a backend."""
    run = Run(about, [])
    for name, (size, backend) in cases.items():
        found = [peaks(size, about["mode"], backend, options) for _ in range(options.rounds)]
        for label, samples in (
            ("peak", [float(after) for _, after in found]),
            ("steps", [float(after - before) for before, after in found]),
        ):
            m = Measurement(f"{name}, {label}", run.id, options.threads, samples, "bytes")
            run.measurements.append(m)
    return run


def measure_all(options: argparse.Namespace) -> list[Run]:
    base = SIZES["S" if options.quick else "M"]
    runs = []
    for mode in ("inference", "training"):
        for dimension, field in DIMENSIONS.items():
            grown = {f: replace(base, **{field: f * getattr(base, field)}) for f in FACTORS}
            cases = {f"x{f}": (size, NPFORMER) for f, size in grown.items()}
            about = {"config": base.name, "mode": mode, "dimension": dimension}
            runs.append(measure_cases(about, cases, options))
    size = base if options.quick else SIZES["B"]
    backends = (NPFORMER, TORCH) if harness.is_installed("torch") else (NPFORMER,)
    about = {"config": size.name, "mode": "training", "dimension": None}
    return [*runs, measure_cases(about, {b: (size, b) for b in backends}, options)]


def draw(runs: list[Run]) -> str:
    """Growth in one table, npformer against torch in another."""

    def mib(run: Run, name: str) -> str:
        return f"{run[name].median / 2**20:.0f}"

    growth, versus = [], []
    for run in runs:
        title = f"{run.about['config']}, {run.about['mode']}"
        if run.about["dimension"]:
            cells = [mib(run, m.name) for m in run.measurements]
            growth.append([f"{title}, {run.about['dimension']}", *cells])
            continue
        for backend in (NPFORMER, TORCH):
            peak, steps = f"{backend}, peak", f"{backend}, steps"
            if peak in run:
                of = f"{run.ratio(peak, f'{NPFORMER}, peak'):.2f}"
                versus.append([f"{title}, {backend}", mib(run, peak), mib(run, steps), of])
    columns = (f"x{factor}{label}" for factor in FACTORS for label in ("", ", steps"))
    tables = (
        harness.table(["peak MiB", *columns], growth),
        harness.table(["peak MiB", "", "steps", "/ npformer"], versus),
    )
    return "\n\n".join(tables)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.Parser("memory", DESCRIPTION, rounds=1, quick_rounds=1)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    case = parser.parse_args(argv).case
    if case:
        run_case(case)
    else:
        parser.main(argv, measure_all, draw)


if __name__ == "__main__":
    main()
