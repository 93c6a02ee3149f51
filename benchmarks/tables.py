"""Draw the tables of result files again: python -m benchmarks.tables benchmarks/results/*.json"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import BenchmarkError, Result

BENCHMARKS = "training", "ops", "startup", "memory"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.tables", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    for path in parser.parse_args(argv).files:
        try:
            print(draw(path), end="\n\n")
        except BenchmarkError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")


def draw(path: Path) -> str:
    result = Result.load(path)
    if result.benchmark not in BENCHMARKS:
        raise BenchmarkError(f"{path}: there is no table for the benchmark {result.benchmark!r}")
    about = result.environment
    kept = "keeps" if about["keeps_freed_memory"] else "returns"
    heading = (
        f"{result.benchmark}, {result.created}: {about['cpu']}, numpy {about['numpy']} "
        f"({', '.join(about['blas'])}), torch {about.get('torch', 'not installed')}, "
        f"malloc {kept} freed memory"
    )
    module = importlib.import_module(f"benchmarks.{result.benchmark}")
    return f"{heading}\n\n{module.draw(result.runs)}"


if __name__ == "__main__":
    main()
