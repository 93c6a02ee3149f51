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
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
    with np.printoptions():  # whatever a lesson sets ends with it
        for piece in split(text):
            yield again(piece, names, quote)


def again(
    piece: Piece, names: dict[str, Any], quote: Callable[[Piece], str] | None = None
) -> Piece:
    """One piece with what it gives now; what it defines is in `names`.   See `run`."""
    names["__name__"] = "lesson"
    if piece.kind == "prose":
        for formula in FORMULA.finditer(piece.text):
            _check(formula, names)
        return piece._replace(text=CHECKED.sub(lambda m: _checked(m, names), piece.text))
    if piece.kind == "session":
        return piece._replace(text="".join(_session(piece.text, names)))
    if piece.kind in ("source", "bug"):
        shown = quote(piece) if quote else piece.text
        if piece.kind == "bug":
            _plant(piece.about, shown, names)
        return piece._replace(text=shown)
    return piece


STATEMENT = re.compile(r"^>>> .*\n(?:^\.\.\.(?: .*)?\n)*", re.MULTILINE)


def _session(text: str, names: dict[str, Any]) -> Iterator[str]:
    """The session again: its statements as they are, and what they print now."""
    for statement in STATEMENT.findall(text):
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


def shown(pieces: Iterable[Piece], width: int | None = None, colour: bool = False) -> Iterator[str]:
    """A lesson as text for a terminal, piece by piece, `width` columns wide."""
    from rich.console import Console
    from rich.markdown import Heading, Markdown
    from rich.text import Text
    from rich.theme import Theme

    class Plain(Heading):  # rich's own are in the middle and in boxes
        def __rich_console__(self, console, options):
            yield self.text
            yield Text(("=" if self.tag == "h1" else "-") * min(len(self.text), options.max_width))

    class Prose(Markdown):
        elements: ClassVar = Markdown.elements | {"heading_open": Plain}

    console = Console(
        width=min(width or shutil.get_terminal_size().columns, 100),
        theme=Theme({"markdown.code": "cyan", "markdown.h1": "bold", "markdown.h2": "bold"}),
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
    )
    for piece in pieces:
        with console.capture() as said:
            if piece.kind == "prose":
                console.print(Prose(_plain(piece.text)))
            for line in piece.text.splitlines() if piece.kind != "prose" else ():
                is_code = piece.kind != "session" or line.startswith((">>> ", "... "))
                console.print(Text(_folded(line, console.width), "cyan" if is_code else ""))
        text = "\n".join(line.rstrip() for line in said.get().splitlines()).strip("\n")
        around = "\n" if piece.kind == "prose" else ""
        yield f"{around}{text}\n{around}" if text else around


def _plain(text: str) -> str:
    """Markdown without what is only for a page: comments, foldings, pictures, links."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"</?details>", "", text)
    text = re.sub(r"<summary>(.*?)</summary>", r"**\1**", text)
    text = re.sub(r"!\[(.*?)\]\(.*?\)", r"(picture: \1)", text, flags=re.DOTALL)
    return re.sub(r"\[([^\]]*)\]\(.*?\)", r"\1", text)


def _folded(line: str, width: int) -> str:
    """A line of code that is too long goes on below, indented."""
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 8)
    return textwrap.fill(
        line, width, subsequent_indent=indent, drop_whitespace=False, break_on_hyphens=False
    )
