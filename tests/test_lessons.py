"""A lesson is what its code gives: outputs, numbers in the prose and quoted sources."""

import ast
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import npformer
from npformer import cli, lessons

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "lessons"
sys.path.insert(0, str(FOLDER))

import refresh  # noqa: E402

FILES = lessons.files()
TEXTS = {path: path.read_text() for path in FILES}
every_lesson = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

# Digits in the prose that are names, not numbers
NAMES = (
    "float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8 log1p conv1d norm1 norm2 norm3"
)
SOURCES = {
    "Ba et al. 2016",
    "Glorot and Bengio 2010",
    "He et al. 2015",
    "He et al. 2016",
    "Hendrycks and Gimpel 2016",
    "Holtzman et al. 2020",
    "Ioffe and Szegedy 2015",
    "Kingma and Ba 2015",
    "Loshchilov and Hutter 2019",
    "Micikevicius et al. 2018",
    "Press and Wolf 2017",
    "Radford et al. 2019",
    "Srivastava et al. 2014",
    "Sutskever et al. 2014",
    "Szegedy et al. 2016",
    "Ulyanov et al. 2016",
    "Vaswani et al. 2017",
    "Williams and Zipser 1989",
    "Wu and He 2018",
    "Xiong et al. 2020",
    "Zhang and Sennrich 2019",
}
PARTS = {  # of a source that a lesson may name
    "Vaswani et al. 2017": {
        "eq. 1", "eq. 2", "eq. 3", "figure 1", "figure 2", "table 3",
        "§ 3.1", "§ 3.2", "§ 3.2.1", "§ 3.2.2", "§ 3.2.3", "§ 3.3", "§ 3.4", "§ 3.5",
        "§ 5.1", "§ 5.3", "§ 5.4", "§ 6.1",
    },
    "Ba et al. 2016": {"eq. 4"},
    "Sutskever et al. 2014": {"§ 3.2"},
    "Szegedy et al. 2016": {"§ 7"},
}  # fmt: skip


@every_lesson
def test_a_lesson_is_what_its_code_gives(path):
    text = TEXTS[path]
    now = lessons.refreshed(text, refresh.quote)
    assert now == text, (
        f"python docs/lessons/refresh.py {int(path.name[:2])} shows what has changed"
    )


def prose(text):
    """Without fences and comments; numbers and formulas that are checked are gone as well."""
    text = lessons.FENCE.sub("", text)
    text = lessons.CHECKED.sub("", lessons.FORMULA.sub("", text))
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


@every_lesson
def test_every_digit_in_the_prose_is_checked(path):
    text = prose(TEXTS[path])
    number = int(path.name[:2])
    assert text.startswith(f"# {number}. ")
    text = text.split("\n", 1)[1]
    for said, target in re.findall(r"\[lesson (\d+)\]\(([^)]*)\)", text):
        assert (FOLDER / target).exists(), target
        assert int(said) == int(target[:2]), target
    for said in re.findall(r"\[([^\]\d]*\b(?:19|20)\d\d\b[^\]]*)\](?!\()", text):
        source, *parts = (part.strip() for part in " ".join(said.split()).split(","))
        assert source in SOURCES, said
        assert set(parts) <= PARTS.get(source, set()), said
    text = re.sub(r"\[[^\]]*\b(?:19|20)\d\d\b[^\]]*\](?!\()", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"\[lesson \d+\]", "", text)
    text = re.sub(rf"\b({'|'.join(NAMES.split())})\b", "", text)
    loose = [line for line in text.splitlines() if re.search(r"[0-9]", line)]
    assert not loose, "a digit that nothing checks: use words, or <!--= an expression -->"


@every_lesson
def test_comments_in_the_code_have_no_digits(path):
    for inside in re.findall(r"^```pycon\n(.*?)^```", TEXTS[path], re.DOTALL | re.MULTILINE):
        for line in inside.splitlines():
            if line.startswith((">>>", "...")) and re.search(r"  # [^'\"]*\d[^'\"]*$", line):
                raise AssertionError(f"nothing checks this comment, use letters: {line}")


@every_lesson
def test_a_lesson_stands_alone(path):
    """Every letter of a shape is said, what is linked is there, and exercises have answers."""
    text = TEXTS[path]
    said = re.search(r"^\*\*Letters\.\*\*(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    known = set(re.findall(r"\b([A-Z])\b", said[1])) if said else set()
    shapes = re.findall(
        r"\(((?:[A-Z0-9.]+(?: [A-Z])?,\s?)+(?:[A-Z0-9]+)?)\)", lessons.FENCE.sub("", text)
    )
    used = {letter for shape in shapes for letter in re.findall(r"\b[A-Z]\b", shape)}
    assert used <= known, f"letters that are not said: {sorted(used - known)}"
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (FOLDER / target).exists(), target
    exercises = text.split("\n## Exercises\n")
    assert len(exercises) == 2, "a lesson ends in exercises"
    answers = exercises[1].count("<details><summary>Answer</summary>\n\n")
    assert answers >= 2
    assert answers == exercises[1].count("\n\n</details>") == text.count("</details>")
    assert "```pycon" in exercises[1], "answers that run"


# --- The pages around them ---------------------------------------------------------------------

DOCS = ROOT / "docs"
CONTENTS, GLOSSARY = (DOCS / "README.md").read_text(), (DOCS / "glossary.md").read_text()


def anchor(heading):
    """As it is made where the pages are hosted: letters, digits, hyphens for spaces."""
    text = re.sub(r"<!--.*?-->", "", heading).lower().strip()
    kept = (
        c for c in text if c in " -" or unicodedata.category(c)[0] in "LM" or c in "_0123456789"
    )
    return "".join(kept).replace(" ", "-")


def test_the_table_of_contents_has_every_lesson():
    assert len(FILES) == 20
    for path in FILES:
        row = f"| {int(path.name[:2])} | [{lessons.title(TEXTS[path])}](lessons/{path.name}) |"
        assert row in CONTENTS


@pytest.mark.parametrize("page", [CONTENTS, GLOSSARY], ids=["README", "glossary"])
def test_what_is_linked_is_there_down_to_the_heading(page):
    for said, target, _, heading in re.findall(r"\[([^\]]*)\]\(([^)#]+)(#([^)]+))?\)", page):
        file = DOCS / target
        assert file.exists(), target
        if said.isdigit():
            assert int(said) == int(file.name[:2]), target
        if heading:
            there = re.findall(r"^##+ (.*)$", file.read_text(), re.MULTILINE)
            assert heading in [anchor(title) for title in there], f"{target}#{heading}"


def test_both_long_paths_lead_through_lessons_once():
    for name, wanted in (("One evening", 5), ("One weekend", 20)):
        part = CONTENTS.split(f"## {name}\n")[1].split("\n## ")[0]
        found = re.findall(r"\(lessons/(\d\d)-", part)
        assert len(found) == len(set(found)) == wanted


def test_the_names_that_the_glossary_calls_ours_are_ours():
    """Each word is a letter of the legend or a name in our code, each capital one of the sizes."""
    names = {"rng="}
    for path in (ROOT / "npformer").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names |= {getattr(node, field, None) for field in ("id", "attr", "arg", "name")}
    letters = re.findall(r"\b([A-Z])\b", npformer.__doc__.split("Letters")[1])
    rows = re.findall(r"^\|(.*)\|(.*)\|(.*)\|(.*)\|$", GLOSSARY, re.MULTILINE)
    rows = [row for row in rows if "---" not in row[0] and "elsewhere" not in row[0]]
    assert len(rows) > 40
    for theirs, ours, what, _ in rows:
        for code in re.findall(r"`([^`]+)`", ours):
            for word in re.split(r" & |~", code):
                assert not word or word in names, f"{theirs.strip()}: we have no {word}"
        for letter in re.findall(r"\b([A-Z])\b", re.sub(r"`[^`]+`", "", ours)):
            assert letter in letters, f"{theirs.strip()}: {letter}"
        assert theirs.strip()
        assert what.strip()


ASKED_FOR = "d_k head_dim embed_dim hidden_dim trg energy fc_q W_q combine_heads src_mask tgt_mask"


@pytest.mark.parametrize("name", ASKED_FOR.split())
def test_the_glossary_has_the_names_that_people_ask_for(name):
    theirs = " ".join(line.split("|")[1] for line in GLOSSARY.splitlines() if line.count("|") > 3)
    assert f"`{name}`" in theirs


def test_every_picture_is_drawn_by_a_command_and_stands_in_a_lesson():
    pictures = pytest.importorskip("pictures", reason="the pictures need matplotlib")
    shown = set(re.findall(r"\(pictures/([\w-]+)\.svg\)", "".join(TEXTS.values())))
    files = {path.stem for path in (FOLDER / "pictures").iterdir()}
    assert shown == files == set(pictures.PICTURES)


QUICK = ["attention", "broadcast", "heads", "masks", "positions", "residuals", "shift"]


@pytest.mark.parametrize("name", QUICK)
def test_a_picture_is_what_its_command_draws(name, tmp_path):
    """The same words: lines and letters differ from one matplotlib to another."""
    pictures = pytest.importorskip("pictures", reason="the pictures need matplotlib")
    pictures.save(name, tmp_path)
    now, then = (folder / f"{name}.svg" for folder in (tmp_path, FOLDER / "pictures"))
    words = re.compile(r"<!-- (.*?) -->")
    assert words.findall(now.read_text()) == words.findall(then.read_text())


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("banana", "there is no picture 'banana', of: broadcast, "),
        ("masks", "the pictures need matplotlib: pip install 'npformer[plot]'\n"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_one_line(argument, said):
    without = "sys.modules['matplotlib'] = None; " if argument == "masks" else ""
    program = f"import runpy, sys; {without}runpy.run_path(sys.argv[0], run_name='__main__')"
    program = f"import sys; sys.argv = {[str(FOLDER / 'pictures.py'), argument]}; {program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


def luminance(colour):
    """Of sRGB "#rrggbb", by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("path", sorted((FOLDER / "pictures").iterdir()), ids=lambda p: p.stem)
def test_a_picture_can_be_read_on_white_and_on_black(path):
    """Nothing behind it; every line and letter at 3:1 or more, WCAG 2's bound for graphics."""
    picture = path.read_text()
    background = re.search(r'id="patch_1">.*?style="(.*?)"', picture, re.DOTALL)
    assert background
    assert background[1] == "fill: none"
    for text in re.findall(r'<g id="text_\d+">\s*<!-- .*? -->\s*<g style="(.*?)"', picture):
        assert "fill: #" in text, "a text without a colour is black"
    for colour in set(re.findall(r"#[0-9a-f]{6}", picture)):
        for page in ("#ffffff", "#0d1117"):
            low, high = sorted((luminance(colour), luminance(page)))
            assert (high + 0.05) / (low + 0.05) >= 3, f"{colour} on {page}"


def test_many_exercises_are_bugs_of_the_zoo():
    found = {name for text in TEXTS.values() for name in re.findall(r"<!-- bug: ([\w-]+),", text)}
    assert len(found) >= 8


# --- The machinery ----------------------------------------------------------------------------

SMALL = """\
# 1. Small

Half is 0.50<!--= x / 2 -->, and `(1,)`<!--= (x,) --> a tuple; `x * x`<!--: x * x == 1 --> too.

```pycon
>>> x = 1
>>> for i in range(2):
...     print([i, x / 3])
[0, 0.3333333333333333]
[1, 0.3333333333333333]
>>> int("1x")
Traceback (most recent call last):
    ...
ValueError: invalid literal for int() with base 10: '1x'
```

As 1<!--= x --> and −1.0e-3<!--= -x / 10**3 -->, 1,000<!--= 1000 * x --> and +2.0**<!--= 2 * x -->.

<!-- source: npformer/ops.py relu, less its docstring -->
```python
```

<!-- bug: relu-learns-at-zero, npformer/ops.py relu, as buggy -->
```python
```

Planted: `True`<!--= buggy.__name__ == "relu" -->
"""


def small():
    text = SMALL.replace("\nHalf", "\n```pycon\n>>> x = 1\n```\n\nHalf")
    return lessons.refreshed(text, refresh.quote)


def test_a_lesson_refreshed_is_settled():
    text = small()
    assert "[1, 0.3333333333333333]" in text
    assert "ValueError: invalid literal for int()" in text
    assert "Half is 0.50<!--" in text
    assert "−1.0e-3<!--" in text
    assert "+2.0**<!--" in text
    assert text.count("def relu(") == 2
    assert lessons.refreshed(text, refresh.quote) == text


def test_no_digit_of_a_lesson_can_be_changed_unnoticed():
    """Every single one, by the next: in outputs, prose, sources.  Inputs change what is printed."""
    text = small()
    unnoticed = []
    for place in [m.start() for m in re.finditer(r"\d", text)]:
        changed = f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"
        try:
            noticed = lessons.refreshed(changed, refresh.quote) != changed
        except Exception:
            noticed = True
        if not noticed and not text[:place].endswith("# "):
            unnoticed.append(text[max(0, place - 30) : place + 20])
    assert not unnoticed


def test_a_formula_that_is_not_true_or_not_in_its_condition_is_refused():
    with pytest.raises(lessons.LessonError, match="1 == 2 is not true"):
        lessons.refreshed("`1 == 2`<!--: 1 == 2 -->")
    with pytest.raises(lessons.LessonError, match="x > 1 does not say x > 2"):
        lessons.refreshed("`x > 2`<!--: x > 1 -->")
    with pytest.raises(lessons.LessonError, match="line 2: a python block needs"):
        lessons.refreshed("Look\n```python\nx = 1\n```\n")


# --- In a terminal ----------------------------------------------------------------------------


def said(capsys, *arguments):
    code = cli.main(["lesson", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_lists_the_lessons(capsys):
    code, out, _ = said(capsys)
    assert code == 0
    for path in FILES:
        assert f"{int(path.name[:2]):3}  {lessons.title(TEXTS[path])}" in out


def test_there_is_no_lesson_99(capsys):
    code, out, err = said(capsys, "99")
    assert (code, out) == (2, "")
    assert (
        err == f"npformer lesson: there is no lesson 99; they are 1 to {int(FILES[-1].name[:2])}\n"
    )


def test_a_lesson_without_lessons_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(lessons, "FOLDERS", (tmp_path,))
    code, _, err = said(capsys, "1")
    assert code == 2
    assert err.count("\n") == 1
    assert "not installed" in err


@pytest.mark.parametrize("width", [60, 80])
@every_lesson
def test_a_lesson_fits_a_narrow_terminal_without_colour(path, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = said(capsys, str(int(path.name[:2])))
    assert code == 0
    assert "\x1b" not in out
    assert "<!--" not in out
    assert "<details>" not in out
    assert max(len(line) for line in out.splitlines()) <= width


def test_colour_is_for_terminals_alone(monkeypatch):
    pieces = list(lessons.split(small()))
    assert "\x1b[1m" in "".join(lessons.shown(iter(pieces), 80, colour=True))
    assert "\x1b" not in "".join(lessons.shown(iter(pieces), 80, colour=False))


def test_a_lesson_runs_live(capsys):
    code, out, _ = said(capsys, "6", "--run")
    assert code == 0
    still = said(capsys, "6")[1]
    assert out.startswith(still[:1000])
    assert out.rstrip().endswith("All of it came out as it is written down.")


def test_what_comes_out_differently_is_shown(capsys, monkeypatch, tmp_path):
    (tmp_path / "01-small.md").write_text(small().replace("[1, 0.3333333333333333]", "[1, 0.34]"))
    monkeypatch.setattr(lessons, "FOLDERS", (tmp_path,))
    code, out, _ = said(capsys, "1", "--run")
    assert code == 0
    assert out.endswith("here, but (+):\n- [1, 0.34]\n+ [1, 0.3333333333333333]\n")


def test_a_lesson_that_needs_what_is_missing_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = said(capsys, "6", "--run")
    assert code == 2
    assert err == "npformer lesson: this needs torch: pip install 'npformer[all]'\n"
