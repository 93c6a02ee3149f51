"""Draw results again: as tables, into the README, and as plots."""

import argparse
import importlib
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.contenders import FLOOR, MASKED, NPFORMER, THREADED, TORCH, TWIN
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import results as gpu_results
from benchmarks.harness import ROOT, BenchmarkError, Result, Run
from npformer import storage, streams

DESCRIPTION = """\
Draw the tables of result files:

  python -m benchmarks.tables benchmarks/results/*.json

or, from the newest whole (not --quick) result of each benchmark in benchmarks/results, the tables
of the README, between its <!-- benchmarks:NAME --> marks, and the plots (needs matplotlib):

  python -m benchmarks.tables --readme
"""
BENCHMARKS = "training", "decoding", "ops", "startup", "memory", "sweep", "roofline", "g2p"
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
FUSED, COMPILED, JAX = f"{TORCH}, fused Adam", f"{TORCH}, compiled", "JAX, jit"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tables",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    parser.add_argument("--readme", action="store_true", help="tables of the README, and plots")
    if code := streams.program(parser, argv, partial(_run, parser)):
        parser.exit(code)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    try:
        if options.readme:
            newest = newest_of(p for p in RESULTS.glob("*.json") if not p.stem.endswith("-gpu"))
            text = fill(README.read_text(encoding="utf-8"), newest, newest_gpu(RESULTS))
            storage.write(README, text.encode())
            from benchmarks import plots

            for path in plots.draw_all(newest, RESULTS):
                print(f"drew {path.relative_to(ROOT)}")
        elif not options.files:
            parser.error("name result files, or --readme")
        for path in options.files:
            print(draw(path), end="\n\n")
    except BenchmarkError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def draw(path: Path) -> str:
    result = Result.load(path)
    if result.benchmark not in BENCHMARKS:
        raise BenchmarkError(f"{path}: there is no table for the benchmark {result.benchmark!r}")
    module = importlib.import_module(f"benchmarks.{result.benchmark}")
    return f"{result.benchmark}, {heading(result)}\n\n{module.draw(result.runs)}"


def heading(result: Result) -> str:
    about = result.environment
    kept = "keeps" if about["keeps_freed_memory"] else "returns"
    return (
        f"{result.created}: {about['cpu']}, numpy {about['numpy']} ({', '.join(about['blas'])}), "
        f"torch {about.get('torch', 'not installed')}, malloc {kept} freed memory"
    )


# --- The README -------------------------------------------------------------------------------


def newest_of(paths: Iterable[Path]) -> dict[str, Result]:
    """The newest whole result of each kind."""
    newest: dict[str, Result] = {}
    for path in paths:
        result = Result.load(path)
        kind = kind_of(result)
        if result.options.get("quick"):
            continue
        if kind not in newest or result.created > newest[kind].created:
            newest[kind] = result
    return newest


def kind_of(result: Result) -> str:
    """The benchmark, or what its options make of it: "threads", "twins", "breakdown", ..."""
    options = result.options
    if result.benchmark != "training":
        return result.benchmark
    if options["profile"]:
        return "breakdown"
    if options.get("twins"):
        return "twins"
    if options["threads"] > 1:
        return "threads"
    return "training" if options["keep_freed_memory"] else "allocator"


def newest_gpu(folder: Path) -> dict[str, Any] | None:
    """The newest bench.json of benchmarks.gpu, which is committed as DATE-gpu.json."""
    found = sorted(folder.glob("*-gpu.json"))
    return gpu_results.load(found[-1]) if found else None


def fill(text: str, newest: dict[str, Result], gpu: dict[str, Any] | None = None) -> str:
    """The text with each <!-- benchmarks:NAME --> ... <!-- /benchmarks --> drawn anew."""

    def table_of(match: re.Match[str]) -> str:
        name = match[1]
        if name == "gpu":
            body = gpu_report.summary(gpu)
        elif name not in SUMMARIES:
            raise BenchmarkError(f"README: there is no table {name!r}")
        else:
            body = SUMMARIES[name](newest[name]) if name in newest else "Not measured."
        return f"<!-- benchmarks:{name} -->\n{body}\n<!-- /benchmarks -->"

    return re.sub(r"<!-- benchmarks:(\w+) -->\n.*?<!-- /benchmarks -->", table_of, text, flags=re.S)


def ratios_to(run: Run, names: dict[str, str], name: str = NPFORMER) -> list[str]:
    return [f"{run.ratio(name, other):.2f}" if other in run else "–" for other in names.values()]


def summarise_training(result: Result) -> str:
    others = {"torch eager": TORCH, "fused Adam": FUSED, "torch.compile": COMPILED}
    others |= {"JAX": JAX, TWIN: TWIN, "the floor": FLOOR}
    rows = []
    for run in result.runs:
        name = f"{run.about['config']['name']}, dropout {run.about['dropout']:g}"
        rows.append([name, harness.milliseconds(run[NPFORMER]), *ratios_to(run, others)])
    header = ["one step", "npformer, ms", *(f"/ {name}" for name in others)]
    return f"{harness.table(header, rows)}\n\n{note(result)}"


def summarise_threads(result: Result) -> str:
    rows = []
    for run in result.runs:
        name = f"{run.about['config']['name']}, dropout {run.about['dropout']:g}"
        rows += [
            [f"{name}: {who}", harness.milliseconds(run[who]), *ratios_to(run, {"": TORCH}, who)]
            for who in (THREADED, NPFORMER, TWIN, TORCH)
            if who in run
        ]
    return f"{harness.table(['two threads', 'ms', '/ torch eager'], rows)}\n\n{note(result)}"


def summarise_allocator(result: Result) -> str:
    rows = [
        [
            f"{run.about['config']['name']}, dropout {run.about['dropout']:g}",
            *(harness.milliseconds(run[name]) for name in (NPFORMER, TORCH)),
            *ratios_to(run, {"": TORCH}),
        ]
        for run in result.runs
    ]
    header = ["malloc as it comes", "npformer, ms", "torch eager, ms", "npformer / torch"]
    return f"{harness.table(header, rows)}\n\n{note(result)}"


def summarise_twins(result: Result) -> str:
    rows = []
    for run in result.runs:
        name = f"{run.about['config']['name']}, dropout {run.about['dropout']:g}"
        eager = ratios_to(run, {"": TORCH, "masked": MASKED}, TWIN)
        compiled = ratios_to(run, {"": f"{MASKED}, compiled"}, f"{TWIN}, compiled")
        rows.append([name, harness.milliseconds(run[TWIN]), *eager, *compiled])
    header = ["one step", "torchformer, ms", "/ eager, no masks", "/ eager", "compiled / compiled"]
    return f"{harness.table(header, rows)}\n\n{note(result)}"


def summarise_decoding(result: Result) -> str:
    from benchmarks.decoding import BACKENDS, MARIAN
    from benchmarks.decoding import TORCH as UNCACHED

    rows = []
    for run in result.runs:
        size = run.about["config"]
        for name, _ in BACKENDS.values():
            if name in run:
                label = f"{size['name']}, batch {size['batch']}: {name}"
                ratios = ratios_to(run, {"": UNCACHED, "Marian": MARIAN}, name)
                rows.append([label, harness.milliseconds(run[name]), *ratios])
    header = ["64 tokens", "ms", "/ torch, no cache", "/ Marian"]
    return f"{harness.table(header, rows)}\n\n{note(result)}"


def summarise_others(result: Result) -> str:
    module = importlib.import_module(f"benchmarks.{result.benchmark}")
    return f"{module.draw(result.runs)}\n\n{note(result)}"


def note(result: Result) -> str:
    about, runs = result.environment, result.runs
    first = next(m for run in runs for m in run.measurements)
    threads, rounds = first.threads, len(first.samples)
    versions = [f"{p} {about[p]}" for p in ("numpy", "torch", "jax") if p in about]
    return (
        f"<sub>{result.created[:10]}, {about['cpu']}, {threads} "
        f"thread{'s' if threads > 1 else ''}, {rounds} rounds, {', '.join(versions)}, "
        f"{', '.join(about['blas'])}.</sub>"
    )


SUMMARIES = {
    "training": summarise_training,
    "threads": summarise_threads,
    "twins": summarise_twins,
    "allocator": summarise_allocator,
    "decoding": summarise_decoding,
    "startup": summarise_others,
    "memory": summarise_others,
    "g2p": summarise_others,
}


if __name__ == "__main__":
    main()
