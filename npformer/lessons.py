"""Lessons: Markdown whose code runs and whose numbers come from it (docs/lessons).

What a lesson is made of, besides prose
    ```pycon        sessions, `>>> ` and what Python says; all of a lesson share one namespace
    ```python       our source, under a comment that says: <!-- source: npformer/ops.py relu -->
                    or a bug to be found:  <!-- bug: NAME, npformer/ops.py softmax, as buggy -->
    3.14<!--= np.pi -->    a number in the prose, and the expression it is
    `(2, 3)`<!--= x.shape -->    the same for what is set as code
    `y * (1 - y)`<!--: np.allclose(J, y * (1 - y)) -->    a formula, and a condition with it inside

`refreshed` runs it all and writes down what comes out.  A lesson is right if that changes nothing,
which the tests see to; `npformer lesson N --run` shows it as it happens.
"""

import importlib
import io
import re
import shutil
import textwrap
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
FOLDERS = (HERE / "docs" / "lessons", HERE.parent / "docs" / "lessons")  # installed, in a clone
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$\n?", re.DOTALL | re.MULTILINE)
QUOTE = re.compile(r"<!-- (source|bug): (.*?) -->\s*\Z")
CHECKED = re.compile(
    r"(?:`([^`\n]+)`|([-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)(\**))<!--= (.*?) -->"
)

FORMULA = re.compile(r"`([^`\n]+)`<!--: (.*?) -->")


class LessonError(ValueError):
    """A lesson that is not there, or that cannot be run here."""


class Piece(NamedTuple):
    """A part of a lesson.   kind: prose, session, source, bug, text"""

    kind: str
    text: str  # of a fence, what is inside
    about: str = ""  # of a source or a bug, which


# --- Finding and reading ----------------------------------------------------------------------


def files() -> list[Path]:
    """The lessons, in order."""
    for folder in FOLDERS:
        if found := sorted(folder.glob("[0-9][0-9]-*.md")):
            return found
    raise LessonError("the lessons are not installed; they are docs/lessons in the repository")


def find(number: int) -> Path:
    """The file of a lesson.  Raises LessonError."""
    found = {int(path.name[:2]): path for path in files()}
    if number not in found:
        raise LessonError(f"there is no lesson {number}; they are 1 to {max(found)}")
    return found[number]


def title(text: str) -> str:
    """What stands after `# 7. `."""
    return text.split("\n", 1)[0].lstrip("# ").split(". ", 1)[1]


def split(text: str) -> Iterator[Piece]:
    """The pieces of a lesson; `joined` is the inverse."""
    start = 0
    for fence in FENCE.finditer(text):
        prose = text[start : fence.start()]
        yield Piece("prose", prose)
        language, inside = fence.groups()
        quote = QUOTE.search(prose)
        if language == "pycon":
            yield Piece("session", inside)
        elif language == "python":
            if not quote:
                line = text[: fence.start()].count("\n") + 1
                raise LessonError(f"line {line}: a python block needs a source or bug comment")
            yield Piece(quote[1], inside, quote[2])
        else:
            yield Piece("text", inside, language)
        start = fence.end()
    yield Piece("prose", text[start:])


LANGUAGE = {"session": "pycon", "source": "python", "bug": "python"}


def joined(pieces: Iterator[Piece]) -> str:
    return "".join(
        p.text if p.kind == "prose" else f"```{LANGUAGE.get(p.kind, p.about)}\n{p.text}```\n"
        for p in pieces
    )


# --- Running ----------------------------------------------------------------------------------


def refreshed(text: str, quote: Callable[[Piece], str] | None = None) -> str:
    """The lesson with its outputs, numbers and, by `quote`, its sources as they are now."""
    return joined(run(text, quote))


def run(
    text: str,
    quote: Callable[[Piece], str] | None = None,
    names: dict[str, Any] | None = None,
) -> Iterator[Piece]:
    """The pieces of a lesson one by one, each with what it gives when it is run now.

    quote   the source that belongs into a piece that quotes; by default what stands there
    names   the namespace to run in
    """
    names = {} if names is None else names
    names["__name__"] = "lesson"
    with np.printoptions():  # whatever a lesson sets ends with it
        for piece in split(text):
            if piece.kind == "prose":
                for formula in FORMULA.finditer(piece.text):
                    _check(formula, names)
                yield piece._replace(text=CHECKED.sub(lambda m: _checked(m, names), piece.text))
            elif piece.kind == "session":
                yield piece._replace(text="".join(_session(piece.text, names)))
            elif piece.kind in ("source", "bug"):
                shown = quote(piece) if quote else piece.text
                if piece.kind == "bug":
                    _plant(piece.about, shown, names)
                yield piece._replace(text=shown)
            else:
                yield piece


def _session(text: str, names: dict[str, Any]) -> Iterator[str]:
    """The session again: its statements as they are, and what they print now."""
    for statement in re.findall(r"^>>> .*\n(?:^\.\.\.(?: .*)?\n)*", text, re.MULTILINE):
        yield statement
        source = "".join(line[4:].rstrip() + "\n" for line in statement.splitlines())
        said = io.StringIO()
        with redirect_stdout(said):
            try:
                exec(compile(source, "<lesson>", "single"), names)
            except ModuleNotFoundError as error:
                raise LessonError(f"this needs {error.name}: pip install 'npformer[all]'") from None
            except Exception as error:
                print("Traceback (most recent call last):\n    ...")
                print("".join(traceback.format_exception_only(error)).splitlines()[0])
        yield "".join(line.rstrip() + "\n" for line in said.getvalue().splitlines())


def _checked(match: re.Match, names: dict[str, Any]) -> str:
    """A number as its expression gives it, with as many digits as are written there."""
    code, number, stars, expression = match.groups()
    value = eval(expression, names)
    if code is not None:
        return f"`{value}`<!--= {expression} -->"
    mantissa, _, exponent = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    comma = "," if "," in number else ""
    if exponent:
        sign, digits = f"{value:.{decimals}e}".split("e")
        shown = f"{sign}e{int(digits)}"
    elif isinstance(value, str):
        shown = value
    else:
        shown = f"{value:{comma}.{decimals}f}"
    if number.startswith("+"):
        shown = f"+{shown}"
    if number.startswith("−"):
        shown = shown.replace("-", "−", 1)
    return f"{shown}{stars}<!--= {expression} -->"


def _check(match: re.Match, names: dict[str, Any]) -> None:
    formula, condition = match.groups()
    if formula not in condition:
        raise LessonError(f"{condition} does not say {formula}")
    if not eval(condition, names):
        raise LessonError(f"{condition} is not true")


def _plant(about: str, source: str, names: dict[str, Any]) -> None:
    """Define the function with the bug, under the name that the lesson gives it."""
    _, where, alias = (part.strip() for part in about.split(","))
    file, function = where.split()
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    inside = dict(vars(module))
    exec(compile(source, f"<{about}>", "exec"), inside)
    planted: types.FunctionType = inside[function]
    names[alias.removeprefix("as ")] = planted


# --- Showing in a terminal --------------------------------------------------------------------

BOLD, CYAN, DIM, PLAIN = "\x1b[1m", "\x1b[36m", "\x1b[2m", "\x1b[0m"


def shown(pieces: Iterator[Piece], width: int | None = None, colour: bool = False) -> Iterator[str]:
    """A lesson as text for a terminal, piece by piece, `width` columns wide."""
    width = min(width or shutil.get_terminal_size().columns, 100)
    for piece in pieces:
        if piece.kind == "prose":
            yield from _shown_prose(piece.text, width, colour)
        else:
            for line in piece.text.splitlines():
                is_input = line.startswith((">>> ", "... ")) or piece.kind != "session"
                yield _coloured(_folded(line, width), CYAN if is_input else "", colour) + "\n"


def _shown_prose(text: str, width: int, colour: bool) -> Iterator[str]:
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"</?details>", "", text)
    text = re.sub(r"<summary>(.*?)</summary>", r"**\1**", text)
    text = re.sub(r"!\[(.*?)\]\(.*?\)", r"[picture: \1]", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\((.*?)\)", r"\1 (\2)", text)
    for paragraph in re.split(r"(\n\s*\n)", text):
        if not paragraph.strip():
            yield "\n" if "\n" in paragraph else ""
            continue
        if paragraph.lstrip().startswith("#"):
            heading = paragraph.strip().lstrip("#").strip()
            yield _coloured(_folded(heading, width), BOLD, colour) + "\n"
        elif paragraph.lstrip().startswith("|"):
            yield paragraph.strip("\n").replace("**", "").replace("`", "") + "\n"
        else:
            for item in re.split(r"\n(?=\s*(?:- |\d+\. ))", paragraph.strip("\n")):
                yield _styled(_wrapped(item, width), colour) + "\n"


def _wrapped(item: str, width: int) -> str:
    lead = re.match(r"\s*(?:- |\d+\. )?", item)
    assert lead is not None
    rest = " ".join(item[lead.end() :].split())
    return textwrap.fill(
        rest,
        width,
        initial_indent=lead[0],
        subsequent_indent=" " * len(lead[0]),
        break_on_hyphens=False,
    )


def _folded(line: str, width: int) -> str:
    """A line of code that is too long goes on below, indented."""
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 8)
    return textwrap.fill(
        line, width, subsequent_indent=indent, drop_whitespace=False, break_on_hyphens=False
    )


def _styled(text: str, colour: bool) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", rf"{BOLD}\1{PLAIN}" if colour else r"\1", text, flags=re.DOTALL)
    return re.sub(r"`([^`]+)`", rf"{CYAN}\1{PLAIN}" if colour else r"\1", text)


def _coloured(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{PLAIN}" if colour and code else text
