"""The rules of the house: who imports whom, twins by name, and what every function says."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NPFORMER, TORCHFORMER = ROOT / "npformer", ROOT / "torchformer"
TWINS = sorted(path.stem for path in TORCHFORMER.glob("*.py") if (NPFORMER / path.name).exists())
TWINS = [name for name in TWINS if name not in ("__init__", "tracing")]  # a trace is one for both

# What each file of the model may import of ours.  What is not listed stands above the model: the
# loop, the tasks, the commands.
LEAVES: set[str] = set()
WIRING = {"options", "ops", "module", "layers", "cache", "attention", "feedforward"}
MAY_IMPORT = {
    "options": LEAVES,
    "config": {"options"},
    "ops": {"options"},
    "masks": {"options"},
    "compare": LEAVES,
    "schedules": {"options"},
    "allocator": LEAVES,
    "arguments": LEAVES,
    "streams": {"arguments"},
    "answers": {"options"},
    "cache": {"ops"},
    "module": {"ops", "checkpoint"},
    "layers": {"ops", "module", "options"},
    "positional": {"ops", "module", "options"},
    "attention": {"ops", "module", "layers", "cache", "options"},
    "feedforward": {"ops", "module", "layers", "options"},
    "encoder": WIRING,
    "decoder": WIRING,
    "transformer": WIRING | {"checkpoint", "config", "decoder", "encoder", "masks", "positional"},
    "storage": LEAVES,
    "checkpoint": {"config", "storage"},
    "optim": {"ops", "module", "options", "schedules"},
    "decoding": {"ops", "options", "transformer", "cache", "answers"},
    "parallel": {"ops", "options", "transformer"},
}
HEAVY = ("torch", "rich", "matplotlib", "hypothesis", "safetensors", "torchformer")


def imports(path, inside_functions=True):
    """What a file imports, by its full name: package.module or package.module.name."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if inside_functions else top_level(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level(tree):
    """Everything outside functions that is run on import (TYPE_CHECKING blocks are not)."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from [node] if isinstance(node, ast.Import | ast.ImportFrom) else []


def ours(path, package):
    """Which files of a package a file imports."""
    files = {p.stem for p in (ROOT / package).iterdir()}
    names = [name.split(".") for name in imports(path)]
    return {n[1] for n in names if n[0] == package and len(n) > 1 and n[1] in files}


# --- Who may import whom ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_file_of_the_model_imports_only_what_is_below_it(name):
    assert ours(NPFORMER / f"{name}.py", "npformer") <= MAY_IMPORT[name]


def test_ops_imports_numpy_and_what_an_option_is():
    for name, known in (("ops", {"numpy", "npformer"}), ("options", set())):
        outside = {name.split(".")[0] for name in imports(NPFORMER / f"{name}.py")}
        assert outside - set(sys.stdlib_module_names) == known, name


MAY_KNOW_TORCH = {"cli.py", "testing", "trace.py", "export.py"}


def test_only_the_command_line_and_the_kit_know_torch_and_only_inside_functions():
    for path in NPFORMER.rglob("*.py"):
        relative = path.relative_to(NPFORMER)
        known = {name.split(".")[0] for name in imports(path)}
        early = {name.split(".")[0] for name in imports(path, inside_functions=False)}
        assert not early & {"torch", "torchformer"}, relative
        if relative.parts[0] not in MAY_KNOW_TORCH:
            assert not known & {"torch", "torchformer"}, relative


def test_nothing_imports_the_tests_the_benchmarks_or_the_kit():
    for path in [*NPFORMER.rglob("*.py"), *TORCHFORMER.rglob("*.py")]:
        known = set(imports(path))
        assert not {name for name in known if name.split(".")[0] in ("tests", "benchmarks")}, path
        if "testing" not in path.parts:
            assert not {name for name in known if name.startswith("npformer.testing")}, path


def test_torchformer_does_not_need_the_numpy_model():
    """convert makes one twin of the other, check compares them; the rest shares data alone."""
    model = {"ops", "module", "layers", "attention", "encoder", "decoder", "transformer", "optim"}
    for path in TORCHFORMER.glob("*.py"):
        if path.stem not in ("convert", "check"):
            assert not ours(path, "npformer") & model, path


def test_attention_of_torch_is_called_in_one_place_alone():
    """ops.attention knows which of its kernels are right with a mask."""
    for path in TORCHFORMER.rglob("*.py"):
        named = {n for n in ("scaled_dot_product", "sdpa_kernel") if n in path.read_text()}
        assert not named or path == TORCHFORMER / "ops.py", path


def test_importing_npformer_loads_neither_torch_nor_anything_else_that_is_heavy():
    loaded = "import sys, npformer; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    )
    assert not set(HEAVY) & set(done.stdout.split())
    assert "numpy" in done.stdout.split()


# --- Twins ------------------------------------------------------------------------------------


def test_every_file_of_the_model_has_its_twin():
    """ops has torch.nn.functional, module and layers have torch.nn, optim has torch.optim."""
    has_torch_itself = {"module", "layers", "optim"}
    # No numbers, or no model
    shared = {"config", "options", "compare", "schedules", "allocator", "checkpoint", "answers"}
    shared |= {"arguments", "storage", "streams"}
    assert set(MAY_IMPORT) - has_torch_itself - shared <= {*TWINS, "parallel"}


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_same_classes_in_the_same_order(name):
    numpys, torchs = (classes(package / f"{name}.py") for package in (NPFORMER, TORCHFORMER))
    shared = [c for c in numpys if c in torchs]
    assert shared == [c for c in torchs if c in numpys]
    if name not in ("ops", "training", "parallel"):
        assert set(numpys) - {"KeyValues"} <= set(torchs) | {"Linear", "Embedding", "LayerNorm"}
    for c in shared:
        ours, theirs = (methods(package / f"{name}.py", c) for package in (NPFORMER, TORCHFORMER))
        both = [m for m in ours if m in theirs]
        assert both == [m for m in theirs if m in ours], c
        assert "forward" in both or "forward" not in ours, c


@pytest.mark.parametrize("name", [name for name in TWINS if name not in ("ops", "training")])
def test_twins_take_the_same_arguments(name):
    numpys, torchs = (import_module(f"{package}.{name}") for package in ("npformer", "torchformer"))
    for c in classes(NPFORMER / f"{name}.py"):
        if not hasattr(torchs, c):
            continue
        for method in ("forward", "step", "start", "infer", "encode", "decode"):
            if hasattr(getattr(numpys, c), method) and hasattr(getattr(torchs, c), method):
                ours, theirs = (
                    list(inspect.signature(getattr(getattr(module, c), method)).parameters)
                    for module in (numpys, torchs)
                )
                assert ours == theirs, f"{c}.{method}"


def classes(path):
    tree = ast.parse(path.read_text())
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def methods(path, name):
    tree = ast.parse(path.read_text())
    found = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return [n.name for n in found.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]


# --- What everything says ---------------------------------------------------------------------


EVERYTHING = sorted([*NPFORMER.rglob("*.py"), *TORCHFORMER.rglob("*.py")])


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_everything_public_in_it_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.stat().st_size == 0, f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


# --- Files and streams ------------------------------------------------------------------------


PROGRAMS = [*EVERYTHING, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").rglob("*.py")]


def test_no_text_is_read_or_written_in_an_encoding_of_the_locale():
    for path in PROGRAMS:
        for call in calls(path):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            where, _, name = ast.unparse(call.func).rpartition(".")
            mode = options.get("mode", ast.unparse(call.args[1]) if len(call.args) > 1 else "")
            is_open = name == "fdopen" or (name == "open" and where in ("", "io"))
            asks = where == "subprocess" and {"text", "universal_newlines"} & {*options}
            if asks or (is_open and "b" not in mode) or name in ("read_text", "write_text"):
                assert "encoding" in options, f"{path}:{call.lineno}: {ast.unparse(call)}"


def test_every_program_parses_its_arguments_where_its_streams_are_set():
    """And its errors told: in streams.program."""
    found = {
        path.name
        for path in PROGRAMS
        for call in calls(path)
        if ast.unparse(call.func).endswith(".parse_args")
    }
    assert found == {"streams.py", "memory.py"}  # the benchmark asks itself for one case


def calls(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", ["ops", "masks", "attention", "optim", "decoding", "schedules"])
def test_every_public_function_that_people_read_says_what_it_is(name):
    tree = ast.parse((NPFORMER / f"{name}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            one_line = name == "attention"  # split_heads and merge_heads say it together
            assert ast.get_docstring(node) or one_line, node.name


def test_every_op_has_its_gradient_right_below_it():
    """A function that returns (y, backward) defines backward last, or hands on another op's."""
    found = 0
    for node in ast.parse((NPFORMER / "ops.py").read_text()).body:
        if not isinstance(node, ast.FunctionDef) or ast.unparse(node.returns or node) != "Forward":
            continue
        inner = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        last = node.body[-1]
        assert isinstance(last, ast.Return), node.name
        if inner:
            assert [n.name for n in inner] == ["backward"], node.name
            assert node.body[-2] is inner[0], f"{node.name}: something stands after its backward"
            assert ast.unparse(last.value).endswith("backward)"), node.name
        found += 1
    assert found >= 18


@pytest.mark.parametrize("path", sorted(NPFORMER.glob("*.py")), ids=lambda path: path.name)
def test_a_function_fits_on_a_screen(path):
    """50 lines, docstring included: what a reader can hold."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and path.name not in ("training.py", "cli.py"):
            assert node.end_lineno - node.lineno < 75, node.name
