"""Every benchmark, one after the other, each in a process of its own."""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import ROOT, BenchmarkError, check_writable, is_installed
from npformer import streams

DESCRIPTION = """\
Run every benchmark, one after the other, each in a process of its own, and save its result: the
training step against PyTorch, JAX and its own matrix products, with one thread and with two, with
and without the allocator's setting, and op by op; decoding; the start of a process; memory; time
against size; the roofline.  About 15 minutes on 2 cores, or 2 with --quick (fewer sizes and
rounds, a rough answer).  Nothing else should be running.

  python -m benchmarks
  python -m benchmarks --quick --only training,decoding
  python -m benchmarks.tables --readme      draw the README's tables and the plots from the results
"""
WHOLE = {  # name -> module and options
    "training": "training --rounds 5",
    "threads": "training --threads 2 --config M --dropout 0.1 --rounds 7",
    "allocator": "training --no-keep-freed-memory --config S,M --dropout 0.1 --rounds 5"
    " --backends npformer,torch",
    "breakdown": "training --profile --dropout 0.1 --rounds 5",
    "decoding": "decoding --rounds 5",
    "ops": "ops --rounds 5",
    "startup": "startup",
    "memory": "memory",
    "sweep": "sweep",
    "roofline": "roofline",
}
QUICK = {
    "training": "training --quick --config S --rounds 3",
    "threads": "training --quick --threads 2 --config M --dropout 0.1 --rounds 3",
    "breakdown": "training --quick --profile --config S --dropout 0.1 --rounds 3",
    "decoding": "decoding --quick --rounds 2",
    "ops": "ops --quick --config S --rounds 3",
    "startup": "startup --quick --rounds 1",
    "memory": "memory --quick",
    "sweep": "sweep --quick",
    "roofline": "roofline --quick",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="2 minutes")
    add("--only", metavar="NAMES", help=f"of {','.join(WHOLE)}")
    out = ROOT / "benchmarks" / "results"
    add("--out", type=Path, default=out, metavar="FOLDER", help="default benchmarks/results")
    sys.exit(streams.program(parser, argv, partial(_run, parser)))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    chosen = options.only.split(",") if options.only else list(QUICK if options.quick else WHOLE)
    for name in chosen:
        if name not in WHOLE:
            parser.exit(2, f"{parser.prog}: unknown benchmark {name!r}: of {', '.join(WHOLE)}\n")
    try:
        check_writable(options.out)
    except BenchmarkError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 1 if run_all(chosen, options) else 0


def run_all(chosen: Sequence[str], options: argparse.Namespace) -> list[str]:
    """The names of those that failed; the others ran all the same."""
    start, failed = time.perf_counter(), []
    for i, name in enumerate(chosen):
        module, *arguments = command_of(name, options.quick).split()
        elapsed = time.perf_counter() - start
        print(f"[{i + 1}/{len(chosen)}, {elapsed:.0f} s] {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
        if subprocess.run([*command, "--out", str(options.out)], cwd=ROOT).returncode:
            failed.append(name)
        print(flush=True)
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(chosen) - len(failed)} of {len(chosen)} benchmarks in {minutes:.1f} minutes")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    elif not options.quick:
        print("next: python -m benchmarks.tables --readme")
    return failed


def command_of(name: str, quick: bool) -> str:
    """With what is installed: the compiled model needs a C++ compiler, JAX is optional."""
    command = QUICK.get(name, WHOLE[name] + " --quick") if quick else WHOLE[name]
    if name == "training" and not quick:
        command += " --compile" if is_installed("torch") else ""
        command += " --jax" if is_installed("jax") else ""
    return command


if __name__ == "__main__":
    main()
