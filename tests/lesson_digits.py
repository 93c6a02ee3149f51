"""Change every digit of every lesson, one at a time, and see that it does not go unnoticed.

    python tests/lesson_digits.py           all of them
    python tests/lesson_digits.py 6 7       these lessons

Digits of the prose, of outputs and of quoted source are compared as they stand (test_lessons.py),
so a change of one is seen whatever it is.  What has to be tried are digits of what runs: of the
code, and of the expressions behind numbers in the prose.  Each is changed to the next one, in a
copy of the process as it is at this place, and the lesson goes on until something differs from
what is written.  It prints those for which nothing does, and says how many digits there are.
"""

import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "lessons")]

import refresh  # noqa: E402

from npformer import lessons  # noqa: E402
from npformer.lessons import Piece  # noqa: E402

PATIENCE = 300  # seconds for what follows a change
NOTICED, UNNOTICED, SLOW = 0, 1, 2


def steps(text: str) -> Iterator[Piece]:
    """The pieces of a lesson, sessions statement by statement."""
    for piece in lessons.split(text):
        if piece.kind != "session":
            yield piece
            continue
        starts = [found.start() for found in lessons.STATEMENT.finditer(piece.text)]
        for start, end in zip(starts, [*starts[1:], len(piece.text)], strict=True):
            yield piece._replace(text=piece.text[start:end])


def places(piece: Piece) -> Iterator[int]:
    """Where the digits of what runs are."""
    if piece.kind == "session":
        statement = lessons.STATEMENT.match(piece.text)
        assert statement is not None
        parts = [statement.span()]
    elif piece.kind == "prose":
        found = [
            *lessons.CHECKED.finditer(piece.text),
            *lessons.FORMULA.finditer(piece.text),
        ]
        parts = [match.span(match.lastindex or 0) for match in found]  # the expression is last
    else:
        return
    for start, end in parts:
        yield from (start + m.start() for m in re.finditer("[0-9]", piece.text[start:end]))


def changed(piece: Piece, place: int) -> Piece:
    digit = (int(piece.text[place]) + 1) % 10
    return piece._replace(text=f"{piece.text[:place]}{digit}{piece.text[place + 1 :]}")


def fate(rest: list[Piece], names: dict[str, Any]) -> int:
    """In a copy of this process: is anything not as it is written from here on?"""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.signal(signal.SIGALRM, lambda *_: os._exit(SLOW))
    signal.alarm(PATIENCE)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        for piece in rest:
            if lessons.again(piece, names, refresh.quote) != piece:
                os._exit(NOTICED)
    except BaseException:
        os._exit(NOTICED)
    os._exit(UNNOTICED)


def look(path: Path) -> tuple[int, int]:
    """The digits that were changed, and those of them for which nothing happened."""
    pieces = list(steps(path.read_text()))
    names: dict[str, Any] = {}
    tried = unnoticed = 0
    with np.printoptions():
        for i, piece in enumerate(pieces):
            for place in places(piece):
                other = changed(piece, place)
                tried += 1
                result = fate([other, *pieces[i + 1 :]], names)
                if result != NOTICED:
                    unnoticed += 1
                    line = other.text[: other.text.find("\n", place) + 1 or None].splitlines()[-1]
                    word = {UNNOTICED: "unnoticed", SLOW: "slow"}.get(result, f"died, {result}")
                    print(f"{path.name}: {word}: {line}", flush=True)
            assert lessons.again(piece, names, refresh.quote) == piece, piece
    return tried, unnoticed


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)  # threads do not survive a fork
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    all_unnoticed = 0
    for path in [lessons.find(int(n)) for n in arguments] or lessons.files():
        digits = len(re.findall("[0-9]", path.read_text()))
        tried, unnoticed = look(path)
        all_unnoticed += unnoticed
        print(f"{path.name}: {digits} digits, {tried} run, {unnoticed} unnoticed", flush=True)
    return 1 if all_unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
