"""Run the lessons and write down what comes out: outputs, checked numbers, quoted sources.

    python docs/lessons/refresh.py          all of them
    python docs/lessons/refresh.py 7 8      these

Read the difference before you commit it: what has changed, and is the prose still true?
"""

import ast
import difflib
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from npformer import lessons, streams  # noqa: E402
from npformer.lessons import Piece  # noqa: E402


def quote(piece: Piece) -> str:
    """The source that a lesson quotes, as it stands in its file, or with a bug of the zoo in it.

    source: npformer/ops.py softmax                         a function, class or Class.method
    source: npformer/ops.py softmax, less its docstring
    bug: NAME OF THE ZOO, npformer/ops.py softmax, as buggy    the same with the bug, no docstring
    """
    import zoo

    first, *more = (part.strip() for part in piece.about.split(","))
    if piece.kind == "bug":
        bug = next(bug for bug in zoo.ZOO if bug.name == first)
        file, name = more[0].split()
        assert file == f"npformer/{bug.file}", f"{bug.name} is in {bug.file}"
        return definition(zoo.patched_source(bug), name, bare=True)
    file, name = first.split()
    return definition(
        (ROOT / file).read_text(encoding="utf-8"), name, bare=more == ["less its docstring"]
    )


def definition(source: str, name: str, bare: bool) -> str:
    """The lines of a function, class or Class.method, moved to the left margin."""
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        node = next(
            inner
            for inner in ast.iter_child_nodes(node)
            if isinstance(inner, ast.FunctionDef | ast.ClassDef) and inner.name == part
        )
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    lines = source.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
    if bare and ast.get_docstring(node) is not None:
        said = node.body[0]
        assert said.end_lineno is not None
        del lines[said.lineno - node.lineno : said.end_lineno - node.lineno + 1]
    return textwrap.dedent("".join(lines))


def main(arguments: list[str]) -> None:
    streams.use_utf8()
    for path in [lessons.find(int(n)) for n in arguments] or lessons.files():
        before = path.read_text(encoding="utf-8")
        after = lessons.refreshed(before, quote)
        path.write_text(after, encoding="utf-8")
        changed = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
        print(path.name, *list(changed)[2:], sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
