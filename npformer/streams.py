"""Standard input, output and error, as every program here has them.

They are UTF-8 whatever the locale says, so that a word, a phone or a lesson can always be printed.
A stream that was closed from outside (`<&-`, `>&-`) is there, and fails when it is used, as in cat.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from npformer.arguments import one_line

N_LINES = 256  # at most so many come at once
LONGEST_LINE = 4096  # bytes; what follows is not even looked at
BOM = b"\xef\xbb\xbf"  # what some editors put before a text, and no part of its first word


def program(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    run: Callable[[argparse.Namespace], int],
    *refusals: type[Exception],
) -> int:
    """Parse the arguments and run; the exit code.  What can be put right is said in one line.

    refusals    the errors that are the user's business, besides files and streams that fail

    2           what was asked for cannot be done
    130, 141    interrupted; nobody reads the output any more.  As of any program, it is 128 + the
                number of the signal
    """
    use_utf8()
    name = parser.prog
    try:
        try:
            options = parser.parse_args(arguments)
            name = f"{name} {getattr(options, 'command', None) or ''}".strip()
            return run(options)
        finally:
            flush()  # here, where it can still be said that it failed
    except BrokenPipeError:
        code, line = 141, ""
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except (OSError, *refusals) as error:
        code, line = 2, said(error)
    try:
        sys.stdout.flush()
    except OSError:  # else Python would try again at the end, and complain
        forget_output()
    if line:
        with suppress(OSError):  # nobody is there to be told
            print(f"{name}: {line}", file=sys.stderr)
    return code


def said(error: BaseException) -> str:
    """An error in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return one_line(text)


def use_utf8() -> None:
    """The first thing that a program does."""
    for name, wrong_way in (("stdin", os.O_WRONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_RDWR)):
        if getattr(sys, name) is None:  # closed: print would do nothing, and say nothing
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.open(os.devnull, wrong_way), mode, encoding="utf-8"))  # noqa: SIM115
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is own and isinstance(stream, io.TextIOWrapper):  # else it is somebody's capture
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def flush() -> None:
    """Of standard output.  Raises OSError, which names it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def forget_output() -> None:
    """From here on what is printed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- Reading ----------------------------------------------------------------------------------


def arriving(stream: BinaryIO | None = None) -> Iterator[list[str]]:
    """The lines of a stream (standard input) as they come, up to N_LINES at once: none waits.

    What is not UTF-8 becomes U+FFFD, which is in no vocabulary: such a line is refused as any
    other that is no word.  So is one longer than LONGEST_LINE, of which only the beginning is kept,
    and U+FFFD after it: memory is bounded.
    """
    source: Any = stream or sys.stdin.buffer
    pending, is_first = b"", True
    while chunk := _read(source):
        *lines, pending = (pending + chunk).split(b"\n")
        pending = pending[: LONGEST_LINE + 1]
        if is_first and lines:
            lines[0], is_first = lines[0].removeprefix(BOM), False
        for i in range(0, len(lines), N_LINES):
            yield [_text(line) for line in lines[i : i + N_LINES]]
    if pending:
        yield [_text(pending.removeprefix(BOM) if is_first else pending)]


def _read(source: Any) -> bytes:
    try:
        return source.read1(1 << 16)
    except OSError as error:  # it was closed, or is a folder
        raise OSError(error.errno, error.strerror, "standard input") from None


def _text(line: bytes) -> str:
    too_long = "\ufffd" if len(line) > LONGEST_LINE else ""
    return line[:LONGEST_LINE].decode("utf-8", errors="replace").rstrip("\r") + too_long


def argument(text: str) -> str:
    """A word on the command line, read as UTF-8 as well, whatever the locale made of it."""
    return os.fsencode(text).decode("utf-8", errors="replace")
