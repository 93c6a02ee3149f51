"""From the start of a process to the end of its first training step at S, and to `import`."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks import harness
from benchmarks.harness import ROOT, BenchmarkError, Measurement, Run

DESCRIPTION = """\
Time whole processes, each a fresh one, in turns: importing numpy, npformer and torch, and from the
start to the end of the first training step at S.  Both steps draw their own weights and a batch.

  python -m benchmarks.startup --quick
"""

NUMPY_STEP = """
import numpy as np
from npformer import Adam, Transformer, cross_entropy
from benchmarks.configs import SIZES

size = SIZES["S"]
rng = np.random.default_rng(0)
src, tgt = rng.integers(1, size.vocab_size, (2, size.batch, size.length))
model = Transformer(size.model_config(0.1), rng)
optimizer = Adam(model.parameters())
logits, backward_model = model(src, tgt, rng=rng)
loss, backward_loss = cross_entropy(logits, tgt)
backward_model(backward_loss(1.0))
optimizer.step()
"""

TORCH_STEP = """
import torch
from benchmarks.configs import SIZES
from benchmarks.torch_reference import TorchTransformer

size = SIZES["S"]
torch.manual_seed(0)
src, tgt = torch.randint(1, size.vocab_size, (2, size.batch, size.length))
model = TorchTransformer(size, 0.1)
optimizer = torch.optim.Adam(model.parameters())
logits = model(src, tgt)
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tgt.flatten())
loss.backward()
optimizer.step()
"""

SCRIPTS = {  # name -> what the process runs
    "python": "pass",
    "import numpy": "import numpy",
    "import npformer": "import npformer",
    "import torch": "import torch",
    "first step, npformer": NUMPY_STEP,
    "first step, torch.nn.Transformer": TORCH_STEP,
}
COMPARED = (  # a, b: a / b is printed beside a
    ("import npformer", "import numpy"),
    ("import numpy", "import torch"),
    ("first step, npformer", "first step, torch.nn.Transformer"),
)


def seconds_of(name: str, threads: int) -> float:
    """The wall time of a fresh process, from before it exists to after it ended."""
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    env = os.environ | dict.fromkeys(variables, str(threads))
    command = [sys.executable, "-c", SCRIPTS[name]]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
    seconds = time.perf_counter() - start
    if done.returncode:
        raise BenchmarkError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return seconds


def measure_all(options: argparse.Namespace) -> list[Run]:
    has_torch = harness.is_installed("torch")
    names = [name for name in SCRIPTS if has_torch or "torch" not in name]
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        seconds_of(name, options.threads)  # fills the file cache, writes the bytecode
    for i in range(options.rounds):
        for name in names if i % 2 == 0 else names[::-1]:
            samples[name].append(seconds_of(name, options.threads))
        harness.progress(f"round {i + 1} of {options.rounds}")
    run = Run({"config": "S"}, [])
    run.measurements = [Measurement(n, run.id, options.threads, s) for n, s in samples.items()]
    return [run]


def draw(runs: list[Run]) -> str:
    (run,) = runs
    rows = []
    for m in run.measurements:
        against = dict(COMPARED).get(m.name, "")
        of = f"{run.ratio(m.name, against):.2f} of {against}" if against in run else ""
        rows.append([m.name, harness.milliseconds(m), f"±{100 * m.spread:.0f} %", of])
    return harness.table(["a process", "ms", "spread", ""], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.Parser("startup", DESCRIPTION, rounds=9, quick_rounds=3)
    parser.main(argv, measure_all, draw)


if __name__ == "__main__":
    main()
