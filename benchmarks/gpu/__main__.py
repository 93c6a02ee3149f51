"""The command: python -m benchmarks.gpu --out DIR"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.gpu import report, results
from benchmarks.gpu.processes import Lost, Processes
from benchmarks.gpu.results import NO_ROOM
from benchmarks.harness import BenchmarkError
from npformer import storage, streams

DESCRIPTION = """\
Measure torchformer on one GPU, in this order, as far as the budget goes: does it run at all; the
card's ceilings; parity with the NumPy twin; training of the configurations B, C and A (beside
torch.nn.Transformer, on full batches and on ragged ones), and what their time is spent on;
decoding; the attention kernels; the ladder from NumPy float64 to a step as one CUDA graph; where
the GPU first wins; what has not been built in yet; the first row once more.

Every section is a process.  bench.json and report.md are written after each, the plots at the end;
the next call with the same --out goes on from there.  To have the results in the README, copy
bench.json to benchmarks/results/DATE-gpu.json and draw: python -m benchmarks.tables --readme.  With
--device cpu the same code runs on toy sizes, where torch.compile takes the graph and generates
nothing: to see that it works, not for its figures.  See benchmarks/gpu/README.md.

  python -m benchmarks.gpu --out gpu-results
  python -m benchmarks.gpu --out gpu-results --only "training A ragged,levers"
"""


@dataclass(frozen=True)
class Section:
    function: str  # (bench, seconds) -> rows
    seconds: float  # about how long it takes on a card, with compilation


def _section(name: str, seconds: float) -> Section:
    return Section(f"benchmarks.gpu.{name}", seconds)


SECTIONS = {  # most valuable first
    "smoke": _section("sections:smoke", 20),
    "ceilings": _section("sections:ceilings", 12),
    "parity": _section("parity:parity", 40),
    "training B": _section("sections:training_b", 35),
    "breakdown B": _section("sections:breakdown_b", 15),
    "decoding": _section("sections:decoding", 75),
    "training C": _section("sections:training_c", 45),
    "breakdown C": _section("sections:breakdown_c", 20),
    "training A": _section("sections:training_a", 90),
    "breakdown A": _section("sections:breakdown_a", 15),
    "attention": _section("kernels:attention", 20),
    "training A ragged": _section("sections:training_a_ragged", 100),
    "ladder": _section("ladder:ladder", 60),
    "crossover": _section("ladder:crossover", 30),
    "levers": _section("levers:levers", 90),
    "drift": _section("sections:drift", 25),
}
SLACK = 20.0  # seconds that a section may take over twice its own before it is stopped
MARGIN = 10.0  # seconds of the budget that are left to the report and the plots


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for bench.json, report.md, plots")
    add("--budget", type=float, metavar="S", help="seconds in all (540, on a CPU 100)")
    add("--only", metavar="NAMES", help=f"sections, of: {', '.join(SECTIONS)}")
    add("--again", action="store_true", help="measure also what DIR already has")
    add("--from", type=Path, action="append", default=[], dest="others", metavar="FILE",
        help="take over what another bench.json of the same card has")  # fmt: skip
    add("--report", action="store_true", help="measure nothing, draw what is there")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: toy sizes (cuda)")
    return streams.program(parser, argv, _run, BenchmarkError, ValueError)


def _run(options: argparse.Namespace) -> int:
    if options.budget is not None and not 0 <= options.budget < math.inf:
        raise BenchmarkError(f"--budget must be a number of seconds, got {options.budget}")
    chosen = choose(options.only) if options.only else list(SECTIONS)
    harness.check_writable(options.out)
    run = Run(options)
    if not options.report:
        run.measure(chosen)
    report.draw(run.content, options.out)
    print(report.report(run.content))
    lost = [n for n in chosen if str(run.content["results"].get(n, "")).startswith("failed")]
    return 1 if lost and not options.report else 0


def choose(text: str) -> list[str]:
    """The sections in a list with commas, where a name may have commas of its own or leave them."""
    known = {plain(name): name for name in SECTIONS} | {"breakdown": "breakdown B"}
    parts, chosen = text.split(","), []
    while parts:
        for n in range(len(parts), 0, -1):  # the longest beginning that is a name
            if name := known.get(plain(" ".join(parts[:n]))):
                break
        else:
            wrong = parts[0].strip()
            raise BenchmarkError(f"unknown section {wrong!r}, of: {', '.join(SECTIONS)}")
        chosen.append(name)
        del parts[:n]
    return list(dict.fromkeys(chosen))


def plain(name: str) -> str:
    return " ".join(name.replace(",", " ").split()).casefold()


class Run:
    """One call: what the folder has, and what is added to it."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.path = options, options.out / results.BENCH
        self.start, self.is_cuda = time.monotonic(), options.device == "cuda"
        usual = 540.0 if self.is_cuda else 100.0
        self.budget = usual if options.budget is None else options.budget
        self.content = results.load(self.path) if self.path.exists() else results.empty()
        for other in options.others:
            results.merge(self.path, self.content, results.load(other))
        if options.report and not self.content["results"]:
            raise BenchmarkError(f"{self.path}: there is nothing to report")
        self.save()

    @property
    def left(self) -> float:
        margin = MARGIN if self.is_cuda else 0.0
        return self.budget - margin - (time.monotonic() - self.start)

    def measure(self, chosen: Sequence[str]) -> None:
        processes, about, settings = self.device()
        if self.content["environment"]:
            results.check_same_card(self.path, self.content, about)
        self.content |= {"environment": about, "settings": settings}
        there = self.content["results"]
        if "ceilings" not in there and "ceilings" not in chosen:
            chosen = ["ceilings", *chosen]  # without them a time cannot be judged
        if self.options.again:
            for name in chosen:
                results.forget(self.content, name)
        for name in chosen:
            if results.is_whole(there.get(name)):
                print(f"{name}: is there", flush=True)
                continue
            self.section(name, processes)
            self.save()

    def device(self) -> tuple[Processes, dict[str, Any], dict[str, Any]]:
        """Raises BenchmarkError where there is none, or one that cannot do what is measured."""
        methods = ["forkserver"]
        if self.is_cuda:
            methods.append("spawn")  # slower, should an import have touched the card after all
        found: Any = None
        for method in methods:
            processes = Processes(method)
            try:
                found = processes.call(
                    "benchmarks.gpu.sections:probe", self.options.device, limit=60, give=print
                )
            except Lost as lost:
                found = str(lost)
            if isinstance(found, tuple):
                return processes, *found
        raise BenchmarkError(found)

    def section(self, name: str, processes: Processes) -> None:
        section, content = SECTIONS[name], self.content
        pace = 1 if self.is_cuda else 20  # toys are measured only to see that it works
        if self.left < section.seconds / 2 / pace:  # the half of a section tells something
            left, needed = max(self.left, 0), section.seconds
            content["results"][name] = f"skipped: {left:.0f} s were left, it takes {needed:.0f}"
            print(f"== {name}: {content['results'][name]}", flush=True)
            return
        print(f"{name} ...", flush=True)
        given: dict[str, Any] = {}
        started = time.monotonic()

        def give(name: str, rows: Any) -> None:
            given[name] = rows

        try:
            rows = processes.call(
                "benchmarks.gpu.bench:run",
                section.function,
                self.options.device,
                content["results"],
                section.seconds / pace,
                limit=min(2 * section.seconds + SLACK, max(self.left, 1)),
                give=give,
            )
        except Lost as lost:
            rows = str(lost)
            if rows.endswith(NO_ROOM):
                card = content["environment"]
                rows += f" on {card['device']} ({card.get('memory_gib', '?')} GiB)"
        results.forget(content, name)
        content["results"][name] = rows
        if isinstance(rows, str) and name in given:
            content["unfinished"][name] = given[name]
        took = time.monotonic() - started
        lost = rows if isinstance(rows, str) else None
        print(f"== {name}: {lost or 'measured'}, {took:.0f} s", flush=True)
        about = {"created": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        about |= {"seconds": round(took, 1)}
        about |= {"commit": content["environment"].get("commit")}
        content["measured"][name] = about
        for other, rows in given.items():  # a training section also finds where its time goes
            if other != name:
                content["results"][other] = rows
                content["measured"][other] = about

    def save(self) -> None:
        if self.content["environment"]:
            results.save_content(self.path, self.content)
            storage.write(self.options.out / "report.md", report.report(self.content).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the section's process, too
    sys.exit(main())
