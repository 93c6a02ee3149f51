"""The command lines: whatever is wrong with one is said in one line, and numbers have limits.

    parser = Parser("npformer ...")
    parser.add_argument("--steps", type=whole_number(1, 10**9))

A limit lies far beyond sense and far below harm.  Standard library only.
"""

import argparse
import math
import os
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

STEPS = 10**9
SEEDS = 2**63 - 1  # the largest that both NumPy and torch take
THREADS = 256
MINUTES = 10**7  # 19 years


class Parser(argparse.ArgumentParser):
    """argparse's, less the usage before each error: that is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse: integers from low to high, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # no number, or one of more than 4300 digits
            value = None
        if value is None or not low <= value <= high:
            expected = f"a whole number from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {expected}, got {shortened(text)}")
        return value

    return parse


def positive_number(high: float) -> Callable[[str], float]:
    """A type for argparse: numbers above 0 and up to high."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= high:
            expected = f"a number above 0 and up to {high:g}"
            raise argparse.ArgumentTypeError(f"must be {expected}, got {shortened(text)}")
        return value

    return parse


def path(text: str) -> str:
    """A type for argparse: any name, but not none, which would be the folder one is in."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, a name was expected")
    return text


def shortened(text: str) -> str:
    """Quoted, and not all of it if it is long."""
    return repr(text if len(text) <= 40 else f"{text[:36]} ...")


def typed(path: str | Path) -> str:
    """As it has to be typed in a shell: in quotes where it has spaces, and never an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def one_line(message: Any, longest: int = 500) -> str:
    """As it can be printed anywhere: no line break, no escape sequence, no novel."""
    text = " ".join(str(message).split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:longest])
    return text if len(text) < longest else f"{text[:longest]} ..."


# --- What there is room for -------------------------------------------------------------------


def check_room(what: str, needed: int) -> None:
    """Raises ValueError where so many bytes cannot be had: before they are asked for."""
    if needed > (there := memory()):
        raise ValueError(
            f"{what} needs {needed / 1e9:,.1f} GB of memory, there are {there / 1e9:.1f}"
        )


def memory() -> float:
    """Bytes that this process may have: free on the machine, and by its container and limits."""
    found = [math.inf]
    with suppress(AttributeError, ValueError, OSError):  # Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, TypeError):  # what others leave
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found.append(1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]))  # type: ignore
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no container, or one without a limit
            found.append(int(Path("/sys/fs/cgroup", file).read_text(encoding="ascii")))
    with suppress(ImportError):  # Windows
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        found.append(math.inf if limit == resource.RLIM_INFINITY else limit)
    return min(found)
