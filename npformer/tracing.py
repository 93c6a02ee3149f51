"""Every named intermediate of one step, forward and backward, of your model on your input.

    seen = trace(model, src, tgt_in, target=tgt_out)
    seen["encoder.layers.0.self_attn.scores"].value
    for entry in seen: print(entry.name, entry.shape, entry.formula, entry.file, entry.line)

Nothing is written down for it: the interpreter's tracing hook, which debuggers use, reads the named
locals of the ops and modules after each line.  So the entries come in the order in which they were
made, the code that people read has no line for it, and it costs nothing when nobody looks.
In backward, `dx` is the gradient of `x`, in the same place.

On disk a trace is a folder that any program can write:

    trace.safetensors    the arrays, called 000000, 000001, ... in the order in which they came
    trace.json           {"format_version": 1, "about": {...}, "entries": [{"name", "phase",
                         "shape", "dtype", "letters", "formula", "refined", "equation", "file",
                         "line"}, ...]}, in the same order
"""

import ast
import functools
import inspect
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np

from npformer import checkpoint, compare
from npformer.module import Module
from npformer.ops import Array, cross_entropy
from npformer.transformer import Transformer

PACKAGE = Path(__file__).parent
READ = ("ops", "layers", "attention", "feedforward", "positional", "encoder", "decoder")
READ += ("transformer",)
FORMAT_VERSION = 1
TRACE, ARRAYS = "trace.json", "trace.safetensors"


@dataclass(frozen=True)
class Entry:
    """One array, where it was made and how."""

    name: str  # "encoder.layers.0.self_attn.scores"; in backward "....dscores"
    phase: str  # "forward" or "backward"
    value: Array
    letters: str  # "(B, H, T, S)", from the comment at the end of the line; "" where there is none
    formula: str  # the line of source that made it
    file: str  # "npformer/ops.py"
    line: int
    refined: str = ""  # the lines that went on to change it in place; "" where none did
    equation: str = ""  # of the function that the line stands in, and of those that it calls

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> str:
        return str(self.value.dtype)


class Trace:
    """The entries of a step, in the order in which they came."""

    def __init__(self, entries: list[Entry], about: dict[str, Any] | None = None):
        self.entries, self.about = entries, about or {}
        self._by_name = {entry.name: entry for entry in entries}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Entry:
        if name not in self._by_name:
            close = [known for known in self._by_name if name.split(".")[-1] in known][:3]
            hint = f"; there are {', '.join(close)}" if close else ""
            raise KeyError(f"the trace has no {name}{hint}")
        return self._by_name[name]

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        arrays = {f"{i:06}": entry.value for i, entry in enumerate(self.entries)}
        described = []
        for entry in self.entries:
            about = asdict(entry) | {"shape": list(entry.shape), "dtype": entry.dtype}
            about.pop("value")
            described.append(about)
        about = {
            name: str(x) if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in self.about.items()  # JSON has neither NaN nor infinity
        }
        content = {"format_version": FORMAT_VERSION, "about": about, "entries": described}
        content["checksum"] = checkpoint.checksum(arrays, {})  # says which arrays are meant
        checkpoint.save_together(folder / TRACE, content, folder / ARRAYS, arrays)

    @classmethod
    def load(cls, folder: str | Path) -> "Trace":
        """Raises CheckpointError for a folder that is no trace."""
        folder = Path(folder)
        return checkpoint.steady(folder / ARRAYS, lambda: cls(*_contents(folder)))


def _contents(folder: Path) -> tuple[list[Entry], dict[str, Any]]:
    content = checkpoint.load_json(folder / TRACE)
    with checkpoint.blame(folder / TRACE):
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            version = content.get("format_version") if isinstance(content, dict) else None
            raise ValueError(f"format_version is {checkpoint.shortened(version)}, not 1")
        described, about = content.get("entries"), content.get("about", {})
        if not isinstance(described, list) or not isinstance(about, dict):
            raise ValueError("lacks a list of entries, or about is no object")
        arrays, _ = checkpoint.load_tensors(folder / ARRAYS)
        if content.get("checksum") not in (None, checkpoint.checksum(arrays, {})):
            raise ValueError(f"{ARRAYS} here is not the one that was written with it")
        if sorted(arrays) != [f"{i:06}" for i in range(len(described))]:
            raise ValueError(f"{len(described)} entries, but {len(arrays)} arrays or other names")
        return [_entry(e, arrays[f"{i:06}"]) for i, e in enumerate(described)], about


def _entry(about: Any, value: Array) -> Entry:
    """As it is described in the file.  Raises ValueError where that is nonsense."""
    optional = {"letters": "", "formula": "", "file": "", "line": 0, "refined": "", "equation": ""}
    if not isinstance(about, dict):
        raise ValueError(f"an entry is {checkpoint.shortened(about)}, not an object")
    said = optional | {k: about[k] for k in ("name", "phase", *optional) if k in about}
    for key in ("name", "phase"):
        if key not in said:
            raise ValueError(f"an entry lacks {key!r}")
    for key, x in said.items():
        kind = int if key == "line" else str
        if not isinstance(x, kind) or isinstance(x, bool):
            raise ValueError(f"the {key} of an entry is {checkpoint.shortened(x)}")
    if value.dtype.kind not in "biuf":
        raise ValueError(f"{said['name']} is of {value.dtype}")
    return Entry(value=value, **said)


# --- Looking ----------------------------------------------------------------------------------


def trace(model: Transformer, *inputs: Any, target: Array | None = None, **options: Any) -> Trace:
    """One step of the model: forward and, where there is a `target`, loss and backward.

    inputs     what the model is called with: src (B, S) or None, tgt (B, T), masks
    target     (B, T) ids, of which the model's pads are ignored; None: forward alone
    options    of the call as well: src_mask, tgt_mask, rng
    """
    watcher = Watcher(model)
    about: dict[str, Any] = {"config": model.config.to_json()}
    about["inputs"] = [list(np.shape(x)) for x in inputs if x is not None]
    kept = [p.grad.copy() for p in model.parameters()]
    try:
        with watcher:
            logits, backward_model = model(*inputs, **options)
            if target is not None:
                watcher.outside = "loss"
                loss, backward_loss = cross_entropy(logits, target, model.config.tgt_pad_id)
                about["loss"] = float(loss)
                watcher.phase = "backward"
                backward_model(backward_loss(1.0))
    finally:
        for p, grad in zip(model.parameters(), kept, strict=True):
            p.grad[...] = grad  # as if nobody had looked
    return Trace(watcher.entries, about)


@dataclass
class _Open:
    """A frame that has not returned, and what of it has been noted."""

    frame: FrameType
    path: str
    module_names: frozenset[str]  # the locals of the innermost module's method
    is_op: bool
    line: int = 0  # the one that is running
    noted: dict[str, int] = field(default_factory=dict)  # local -> id of its value
    places: dict[str, int] = field(default_factory=dict)  # local -> which entry


class Watcher:
    """Fills `entries` line by line, as names are bound."""

    package = "npformer"
    files = READ
    module_type: type = Module

    def __init__(self, model: Any):
        self.entries: list[Entry] = []
        self.phase, self.outside = "forward", ""
        self.paths = self.paths_of(model)
        self.open: list[_Open] = []  # the frames that have not returned
        self.used: dict[str, str] = {}  # a name -> the function whose local it is
        self.times: dict[str, int] = {}
        self.called: dict[tuple[str, str, int], tuple[str, Any]] = {}
        self.codes = codes_of(self.package, self.files)

    def paths_of(self, model: Any) -> dict[int, str]:
        """The id of each module -> its path."""
        return dict(_paths(model))

    def array_of(self, value: Any) -> Array | None:
        """The numbers of a local, as they are now; None where it has none."""
        return np.array(value) if isinstance(value, np.ndarray | np.floating) else None

    def __enter__(self) -> "Watcher":
        # Python has one hook for it.  Who holds it, a debugger or coverage, is told all of it
        self.before: Any = sys.gettrace()
        self.ours: Any = self.hook
        sys.settrace(self.ours)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def hook(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Called as any function begins.  What it returns is called with all else that happens in
        it: "line" before each line, "exception", and "return".
        """
        tell = self.before and self.before(frame, event, argument)
        if sys.gettrace() is not self.ours:  # coverage, once told of a call, takes the hook back
            sys.settrace(self.ours)
        if frame.f_code not in self.codes:
            return tell
        seen = _Open(frame, *self._place(frame))
        seen.noted = {name: id(value) for name, value in frame.f_locals.items()}  # its arguments
        self.open.append(seen)

        def follow(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal tell
            tell = tell and tell(frame, event, argument)
            if event == "exception":
                seen.line = 0  # it was not completed
            elif event == "return" or not self._is_one_statement(seen, frame.f_lineno):
                self._note(seen)
            if event == "return":
                self._remember(self.open.pop())
            else:
                seen.line = frame.f_lineno
            return follow

        return follow

    def _is_one_statement(self, seen: "_Open", line: int) -> bool:
        """Whether the line goes on with the statement of the line before."""
        statements = _statements(seen.frame.f_code)
        running = statements.get(seen.line)
        return line != seen.line and running is not None and running is statements.get(line)

    def _place(self, frame: FrameType) -> tuple[str, frozenset[str], bool]:
        """The path of a frame, the names that its module has, and whether it is an op."""
        method, is_nested, _ = frame.f_code.co_qualname.partition(".<locals>.")
        if is_nested:
            is_op = "." not in method  # the backward of an op, or that of a module's method
        else:
            is_op = not isinstance(frame.f_locals.get("self"), self.module_type)
        if not is_op:
            statements = _statements(frame.f_code).values()
            names = frozenset(name for statement in statements for name in statement.names)
            return self._path(frame), names, False
        names = self.open[-1].module_names if self.open else frozenset()
        return self._path(frame), names, True

    def _path(self, frame: FrameType) -> str:
        """A module's own path; an op's is the caller's; a backward's that of its forward."""
        here = self.open[-1].path if self.open else self.outside
        code = frame.f_code
        parent, nested, name = code.co_qualname.partition(".<locals>.")
        if nested and name.endswith("backward"):
            for free in code.co_freevars:
                if free in frame.f_locals:
                    key = (parent, free, id(frame.f_locals[free]))
                    if key in self.called:
                        return self.called[key][0]
            return here
        module = frame.f_locals.get("self")
        return self.paths.get(id(module), here) if isinstance(module, self.module_type) else here

    def _note(self, seen: "_Open") -> None:
        """What the line has made that has just run."""
        statement, values = _statements(seen.frame.f_code).get(seen.line), seen.frame.f_locals
        if statement is None:
            return
        for name in statement.names:
            if name not in values:
                continue
            value = values[name]
            is_new = seen.noted.get(name) != id(value)
            seen.noted[name] = id(value)
            array = self.array_of(value) if is_new or statement.is_in_place else None
            if array is None:
                continue
            if not is_new and seen.places.get(name) == len(self.entries) - 1:  # nothing came since
                made = self.entries[-1]
                lines = [*made.refined.splitlines(), statement.text]
                refined = "\n".join(dict.fromkeys(lines))  # a loop's once
                self.entries[-1] = replace(made, value=array, refined=refined)
                continue
            code = seen.frame.f_code
            op, is_taken = code.co_qualname.split(".")[0], seen.is_op and name in seen.module_names
            full = self._name(seen.path, op, name, is_taken)
            seen.places[name] = len(self.entries)
            self.entries.append(
                Entry(
                    full,
                    self.phase,
                    array,
                    statement.letters[name],
                    statement.text,
                    f"{self.package}/{Path(code.co_filename).name}",
                    statement.line,
                    equation=_equations(seen.frame, statement),
                )
            )
            self.noted(full, value)

    def _remember(self, seen: "_Open") -> None:
        """What a frame has when it returns, by which a backward is found to be of this place."""
        for name, value in seen.frame.f_locals.items():
            if callable(value) or isinstance(value, np.ndarray):
                # Kept, so that no other object gets its id while we look
                key = (seen.frame.f_code.co_qualname, name, id(value))
                self.called[key] = (seen.path, value)

    def noted(self, name: str, value: Any) -> None:
        """For a subclass: this value got that name."""

    def _name(self, path: str, op: str, local: str, is_taken: bool) -> str:
        """path.local; where that is somebody else's name, path.op.local."""
        full = f"{path}.{local}" if path else local
        if is_taken or self.used.setdefault(f"{self.phase} {full}", op) != op:
            full = f"{path}.{op}.{local}" if path else f"{op}.{local}"
        # The same line may run twice in one place: for the source, then for the target
        n = self.times[full] = self.times.get(full, 0) + 1
        return full if n == 1 else f"{full}#{n}"


def _paths(module: Module, prefix: str = "") -> Iterator[tuple[int, str]]:
    yield id(module), prefix.rstrip(".")
    for name, part in module.named_parts():
        if isinstance(part, Module):
            yield from _paths(part, f"{prefix}{name}.")


def codes_of(package: str, files: tuple[str, ...]) -> frozenset[CodeType]:
    """The code of every function, method and backward in the files that people read."""
    found: set[CodeType] = set()

    def collect(code: CodeType) -> None:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                if not constant.co_name.startswith(("<", "_check", "check_", "__init__")):
                    found.add(constant)
                collect(constant)

    for name in files:
        module = sys.modules[f"{package}.{name}"]
        for value in list(vars(module).values()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            functions = vars(value).values() if inspect.isclass(value) else [value]
            for function in functions:
                code = getattr(function, "__code__", None)
                if code and not code.co_name.startswith(("<", "_check", "check_", "__init__")):
                    found.add(code)
                    collect(code)
    return frozenset(found)


class _Statement(NamedTuple):
    """One assignment to locals."""

    line: int
    text: str
    names: tuple[str, ...]
    letters: dict[str, str]  # of each name the shape in the comment, or in the last that had one
    is_in_place: bool  # it changes what a name has: y += bias, dy[rows] = 0
    calls: tuple[ast.expr, ...]  # what it calls


@functools.cache
def _statements(code: CodeType) -> dict[int, _Statement]:
    """The assignment that each line of a function is, or is part of."""
    lines, found, shapes = _parsed(code.co_filename)[1], {}, {}
    for node in _own_statements(_definition(code)[-1]):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        first, last = node.lineno, node.end_lineno or node.lineno
        text = " ".join(line.split("  #")[0].strip() for line in lines[first - 1 : last])
        shape = re.match(r"\s*(\([^)]*\))", lines[last - 1].partition("#")[2])
        names = tuple(name for target in targets for name in _names(target))
        shapes |= dict.fromkeys(names, shape[1]) if shape else {}
        letters = {name: shapes.get(name, "") for name in names}
        in_place = isinstance(node, ast.AugAssign) or isinstance(targets[0], ast.Subscript)
        calls = tuple(n.func for n in ast.walk(node.value) if isinstance(n, ast.Call))
        statement = _Statement(first, text, names, letters, in_place, calls)
        found |= dict.fromkeys(range(first, last + 1), statement)
    return found


def _names(target: ast.expr) -> Iterator[str]:
    """The locals that an assignment changes: of x[rows] = ... it is x, and not rows."""
    while isinstance(target, ast.Subscript):
        target = target.value
    if isinstance(target, ast.Name):
        yield target.id
    for part in getattr(target, "elts", ()):
        yield from _names(part)


def _own_statements(function: ast.AST) -> Iterator[ast.Assign | ast.AugAssign]:
    """Assignments of the function itself, not of those inside it."""
    todo = [*ast.iter_child_nodes(function)]
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.Assign | ast.AugAssign):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            todo = [*ast.iter_child_nodes(node), *todo]


@functools.cache
def _definition(code: CodeType) -> list[ast.AST]:
    """The function in its file, after the classes and functions that it stands in."""

    def search(inside: list[ast.AST]) -> Iterator[list[ast.AST]]:
        node = inside[-1]
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            firsts = [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
            if code.co_firstlineno in firsts:
                yield inside
        for inner in ast.iter_child_nodes(node):
            yield from search([*inside, inner])

    return next(search([_parsed(code.co_filename)[0]]), [ast.Module([], [])])


EQUATION = re.compile(r"\s(=|←)\s")


@functools.cache
def _equation(code: CodeType) -> str:
    """What a function computes: of a backward the comment on its top, of another the first
    paragraph of its docstring, or of its class's; "" where that is no equation.
    """
    _, lines = _parsed(code.co_filename)
    *around, node = _definition(code)
    if not isinstance(node, ast.FunctionDef):
        return ""
    classes = [outer for outer in reversed(around) if isinstance(outer, ast.ClassDef)]
    if ".<locals>." in code.co_qualname:
        top = lines[node.lineno : node.body[0].lineno - 1]
        found = [line.strip().removeprefix("#").strip() for line in top]
        said = ["\n".join(found)]
    else:
        docs = [ast.get_docstring(documented) for documented in (node, *classes)]
        said = [doc.split("\n\n")[0] for doc in docs if doc]
    name = code.co_qualname.replace(".<locals>.", " ").replace(".forward", "")
    return next((f"{name}:  {text}" for text in said if EQUATION.search(text)), "")


def _equations(frame: FrameType, statement: _Statement) -> str:
    """Of the function in which it stands, and of what the statement calls."""
    codes = [frame.f_code, *(_code_of(_value(call, frame)) for call in statement.calls)]
    package = str(Path(frame.f_code.co_filename).parent)
    ours = [code for code in codes if code and code.co_filename.startswith(package)]
    return "\n".join(dict.fromkeys(filter(None, map(_equation, ours))))


def _value(name: ast.expr, frame: FrameType) -> Any:
    """What a.b.c is, there."""
    if isinstance(name, ast.Attribute):
        return getattr(_value(name.value, frame), name.attr, None)
    if isinstance(name, ast.Name):
        return frame.f_locals.get(name.id, frame.f_globals.get(name.id))
    return None


def _code_of(called: Any) -> CodeType | None:
    """Of a function or method its code, of a module its forward's."""
    called = getattr(type(called), "forward", called)
    return getattr(called, "__code__", None)


@functools.cache
def _parsed(filename: str) -> tuple[ast.Module, list[str]]:
    source = Path(filename).read_text(encoding="utf-8")
    return ast.parse(source), source.splitlines()


# --- Comparing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The first tensor in which two traces differ."""

    name: str
    phase: str
    created: bool  # here, all before it being equal; else something before is not there in both
    report: str
    at: str  # file:line
    inherited: list[str]  # the names after it that differ as well


def difference(a: Trace, b: Trace, bound: float | None = None) -> Difference | None:
    """The first entry of `a` that is not that of `b`, forward and then backward; None: none is.

    bound   of the error, of the largest entry; default 1e-10 in float64 and 1e-3 in float32

    Only names that both have are compared.  Raises ValueError where there are none, and for traces
    of different models.
    """
    _check_same_model(a, b)
    if not any(entry.name in b for entry in a):
        raise ValueError("the two traces have no name in common: traces of different models?")
    first: tuple[Entry, bool, str] | None = None
    is_missing, inherited = False, []
    for entry in a:
        if entry.name not in b:
            is_missing = is_missing or first is None
            continue
        said = _compare(entry, b[entry.name].value, bound)
        if said is not None and first is None:
            first = (entry, not is_missing, said)
        elif said is not None:
            inherited.append(entry.name)
    if first is None:
        return None
    entry, created, said = first
    at = f"{entry.file}:{entry.line}" if entry.file else ""
    return Difference(entry.name, entry.phase, created, said, at, inherited)


def _compare(entry: Entry, other: Array, bound: float | None) -> str | None:
    if entry.value.dtype == other.dtype and np.array_equal(entry.value, other):
        return None
    # Masks and ids as numbers: booleans cannot be subtracted, and unsigned integers wrap around
    value, other = (
        x.astype(np.float64) if x.dtype.kind in "biu" else x for x in (entry.value, other)
    )
    scale = float(np.abs(np.nan_to_num(other)).max(initial=0)) or 1.0
    if bound is None:
        bound = 1e-10 if value.dtype == other.dtype == np.float64 else 1e-3
    return compare.report(entry.name, value, other, bound * scale)


def _config(seen: Trace) -> dict[str, Any]:
    try:
        found = checkpoint.parse_json(seen.about["config"])
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"config of a trace is {checkpoint.shortened(seen.about['config'])}")
    return found


def _check_same_model(a: Trace, b: Trace) -> None:
    """Where both say what their model is."""
    if "config" not in a.about or "config" not in b.about:
        return
    ours, theirs = _config(a), _config(b)
    for name, value in ours.items():
        if theirs.get(name, value) != value:
            raise ValueError(
                f"traces of different models: {name} is {checkpoint.shortened(value)} in one, "
                f"{checkpoint.shortened(theirs[name])} in the other"
            )
    if a.about.get("inputs") != b.about.get("inputs"):
        raise ValueError(
            f"traces of different inputs: shapes {a.about.get('inputs')} and "
            f"{b.about.get('inputs')}"
        )
