"""How everything here is timed.

Contenders take turns.  A round gives each of them one slot, long enough to hold several calls of a
quick one; the next round goes through them in the opposite order.  What the machine does meanwhile
then happens to all of them, and a ratio is the median over the rounds of the two times in one
round.  So a ratio exists only inside one run: `ratio` refuses measurements of different runs, and
`measure` refuses contenders that do not have the same number of threads, whether by
their own account or by the processor time that they use.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.configs import SIZES, Size

SCHEMA = "npformer-benchmark-1"
ROOT = Path(__file__).resolve().parents[1]


class BenchmarkError(Exception):
    """Something that the user can put right: one line, exit code 2."""


# --- Measuring --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    name: str
    call: Callable[[], object]  # what is timed
    threads: Callable[[], int]  # how many it computes with, asked when it is timed


@dataclass(frozen=True)
class Measurement:
    name: str
    run: str  # id of the run that it belongs to
    threads: int
    samples: list[float]  # one a round, in `unit`
    unit: str = "s"
    cores: float | None = None  # seconds of processor time for a second of the clock

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a fraction of the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.median


@dataclass
class Run:
    """Everything measured in turns with each other, and what it was."""

    about: dict[str, Any]
    measurements: list[Measurement]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __getitem__(self, name: str) -> Measurement:
        for m in self.measurements:
            if m.name == name:
                return m
        raise BenchmarkError(f"the run has no measurement of {name}")

    def __contains__(self, name: str) -> bool:
        return any(m.name == name for m in self.measurements)

    def ratio(self, name: str, reference: str) -> float:
        return ratio(self[name], self[reference])


def ratio(a: Measurement, b: Measurement) -> float:
    """The median over the rounds of a / b."""
    if a.run != b.run:
        raise BenchmarkError(
            f"{a.name} and {b.name} were measured in different runs: no ratio is formed of them"
        )
    check_equal_threads({a.name: a.threads, b.name: b.threads})
    return statistics.median(x / y for x, y in zip(a.samples, b.samples, strict=True))


def check_equal_threads(threads: dict[str, int]) -> None:
    if len(set(threads.values())) > 1:
        seen = ", ".join(f"{name} {n}" for name, n in threads.items())
        raise BenchmarkError(f"unequal threads are not compared: {seen}")


def measure(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    slot: float = 0.2,
    about: dict[str, Any] | None = None,
    label: str = "",
) -> Run:
    """Time all contenders in turns; `slot` is about how many seconds each has in a round."""
    check_equal_threads({c.name: c.threads() for c in contenders})
    calls = {}
    for c in contenders:
        progress(f"{label}: warming up {c.name}")
        c.call()  # memory, lazy initialisation, compilation
        calls[c.name] = max(1, round(slot / seconds_per_call(c.call, 2)))
    samples: dict[str, list[float]] = {c.name: [] for c in contenders}
    cores: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in range(rounds):
        for c in contenders if i % 2 == 0 else contenders[::-1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            samples[c.name].append(seconds_per_call(c.call, calls[c.name]))
            elapsed, used = time.perf_counter() - start, time.process_time() - start_cpu
            cores[c.name].append(used / elapsed)
        latest = ", ".join(f"{name} {1e3 * s[-1]:.3g} ms" for name, s in samples.items())
        progress(f"{label}: round {i + 1} of {rounds}: {latest}")
    run = Run(about or {}, [])
    for c in contenders:
        used, threads = statistics.median(cores[c.name]), c.threads()
        if used > 1.25 * threads:
            raise BenchmarkError(f"{c.name} computed with {used:.1f} cores, not with {threads}")
        m = Measurement(c.name, run.id, threads, samples[c.name], cores=round(used, 2))
        run.measurements.append(m)
    check_equal_threads({m.name: m.threads for m in run.measurements})  # it may have changed
    return run


def seconds_per_call(call: Callable[[], object], n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Hold NumPy's BLAS and, where it is loaded, torch to this many threads."""
    threadpoolctl = require("threadpoolctl", "bench")
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    with threadpoolctl.threadpool_limits(limits=threads):
        if torch:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)


def numpy_threads() -> int:
    """Threads of the BLAS that NumPy calls; NumPy itself has one."""
    threadpoolctl = require("threadpoolctl", "bench")
    return max(
        (pool["num_threads"] for pool in threadpoolctl.threadpool_info() if _is_numpys(pool)),
        default=1,
    )


def _is_numpys(pool: dict[str, Any]) -> bool:
    """torch and SciPy, which transformers and JAX load, bring a BLAS of their own."""
    return pool["user_api"] == "blas" and not re.search(r"torch|scipy\W", pool["filepath"])


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def progress(line: str) -> None:
    """For whoever waits at a terminal; nothing in a log."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def require(package: str, extra: str) -> Any:
    """The package, or a line that says how to get it."""
    if not is_installed(package):
        raise BenchmarkError(f"{package} is not installed: pip install 'npformer[{extra}]'")
    return importlib.import_module(package)


# --- Results ----------------------------------------------------------------------------------


@dataclass
class Result:
    """What one command measured, where and how: the content of one JSON file."""

    benchmark: str
    options: dict[str, Any]
    environment: dict[str, Any]
    runs: list[Run]
    created: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    def save(self, folder: Path) -> Path:
        stamp = self.created.replace("-", "").replace(":", "").rstrip("Z")
        path = folder / f"{stamp}-{self.benchmark}.json"
        from npformer import storage  # here: a start is timed from processes that import less

        storage.write(path, self.to_json().encode())
        return path

    @classmethod
    def load(cls, path: Path) -> "Result":
        """Raises BenchmarkError for a file that is not a result of this schema."""
        from npformer import storage

        try:
            content = json.loads(storage.read(path).decode("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise BenchmarkError(f"{path}: not a result file ({error})") from None
        schema = content.pop("schema", None) if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise BenchmarkError(f"{path}: the schema is {schema!r}, this program reads {SCHEMA!r}")
        try:
            for run in content["runs"]:
                run["measurements"] = [Measurement(**m) for m in run["measurements"]]
            content["runs"] = [Run(**run) for run in content["runs"]]
            return cls(**content)
        except (KeyError, TypeError) as error:
            raise BenchmarkError(f"{path}: not a whole result file ({error})") from None


def environment(keeps_freed_memory: bool) -> dict[str, Any]:
    """What a reader needs to judge the times; nothing that says whose machine it was."""
    import numpy as np

    threadpoolctl = require("threadpoolctl", "bench")
    pools = [pool for pool in threadpoolctl.threadpool_info() if _is_numpys(pool)]
    packages = [p for p in ("numpy", "torch", "jax") if is_installed(p)]
    about = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "avx512": _has_avx512(),  # a BLAS that does not know the model may not use it
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "blas": [f"{p['internal_api']} {p['version']} {p.get('architecture', '')}" for p in pools]
        or [np.show_config("dicts")["Build Dependencies"]["blas"]["name"]],  # e.g. Accelerate
        "commit": git_commit(),
        "keeps_freed_memory": keeps_freed_memory,
    }
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _has_avx512() -> bool:
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def git_commit() -> str | None:
    """The commit, with a + where files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, and aligned: for the terminal and for the README."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "| " + " | ".join((cells[0].ljust(widths[0]), *rest)) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(line, (header, rule, *rows)))


def milliseconds(m: Measurement) -> str:
    ms = 1e3 * m.median
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


# --- The command line -------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """The options that all benchmarks share."""

    def __init__(self, name: str, description: str, *, rounds: int, quick_rounds: int):
        super().__init__(
            prog=f"python -m benchmarks.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.name, self.rounds, self.quick_rounds = name, rounds, quick_rounds
        add = self.add_argument
        add("--rounds", type=positive, help=f"how often each takes its turn (default {rounds})")
        add("--quick", action="store_true", help="fewer sizes and rounds: a minute, a rough answer")
        add("--threads", type=positive, default=1, help="of each contender (default 1)")
        add(
            "--keep-freed-memory",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="let glibc keep freed memory, for all contenders (npformer/allocator.py)",
        )
        add(
            "--out",
            type=Path,
            default=ROOT / "benchmarks" / "results",
            metavar="FOLDER",
            help="where the JSON goes (default benchmarks/results)",
        )
        add("--json", action="store_true", help="print the JSON instead of the tables")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def main(
        self,
        argv: Sequence[str] | None,
        measure_all: Callable[[argparse.Namespace], list[Run]],
        draw: Callable[[list[Run]], str],
    ) -> None:
        """Parse, measure, save, print; what the user can put right is one line, exit code 2."""
        from npformer import streams  # here, as below

        def run(options: argparse.Namespace) -> int:
            self._run(options, measure_all, draw)
            return 0

        if code := streams.program(self, argv, run):
            self.exit(code)

    def _run(
        self,
        options: argparse.Namespace,
        measure_all: Callable[[argparse.Namespace], list[Run]],
        draw: Callable[[list[Run]], str],
    ) -> None:
        if options.rounds is None:
            options.rounds = self.quick_rounds if options.quick else self.rounds
        try:
            check_writable(options.out)
            require("threadpoolctl", "bench")
            kept = options.keep_freed_memory and keep_freed_memory()
            runs = measure_all(options)
            chosen = {k: v for k, v in vars(options).items() if k not in ("out", "json")}
            result = Result(self.name, chosen, environment(kept), runs)
            path = result.save(options.out)
        except BenchmarkError as error:
            self.error(str(error))
        except KeyboardInterrupt:
            self.exit(130, "interrupted: nothing was saved\n")
        if options.json:
            print(result.to_json(), end="")
        else:
            print(draw(runs), f"\nsaved {path}", sep="\n")


def keep_freed_memory() -> bool:
    from npformer import allocator  # here: a start is timed from processes that import less

    return allocator.keep_freed_memory()


def check_writable(folder: Path) -> None:
    """Before anything is measured, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BenchmarkError(f"--out {folder}: cannot write there ({error.strerror})") from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def sizes(text: str) -> list[Size]:
    """ "S,M" -> those two."""
    return [SIZES[name] for name in one_of(SIZES, "configuration", text)]


def one_of(known: Sequence[str] | dict[str, Any], what: str, text: str) -> list[str]:
    """Split a list separated by commas, each of which must be known."""
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {name!r}: choose of {', '.join(known)}"
            )
    return chosen
