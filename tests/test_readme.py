"""What the README shows is true: its Python runs, its quotes are the source, its commands parse."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import npformer
from npformer import cli, presets, tasks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
QUOTES = [text for text in PYTHON if text.startswith("def ")]
COMMANDS = [
    line.split("#")[0].split("&&")[-1].strip()
    for language, text in BLOCKS
    if language == "sh"
    for line in text.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("quote", QUOTES, ids=lambda text: text.split("(")[0])
def test_a_quote_is_the_source(quote):
    assert quote.strip() in (ROOT / "npformer" / "ops.py").read_text()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    task = tasks.load("g2p")
    config, _ = presets.build(task, presets.settings(task, "notes"))
    npformer.Transformer(config, np.random.default_rng(0)).save(tmp_path / "runs" / "g2p")
    monkeypatch.chdir(tmp_path)
    names = {}
    for text in PYTHON:
        if text not in QUOTES:
            exec(compile(text, "README.md", "exec"), names)
    assert np.isfinite(names["loss"])
    assert any(p.grad.any() for p in names["optimizer"].parameters)
    expected = names["model"].state_dict()
    for name, x in names["same"].state_dict().items():
        np.testing.assert_array_equal(x, expected[name])


@pytest.mark.parametrize("line", [c for c in COMMANDS if re.match(r"(\.venv/bin/)?npformer ", c)])
def test_the_commands_of_the_readme_are_understood(line):
    cli.parser().parse_args(shlex.split(line)[1:])


def test_every_file_that_the_readme_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_file_in_the_reading_order_is_there():
    for name in re.findall(
        r"`((?:npformer|torchformer|tests|benchmarks|docs)/[\w/]+\.\w+)`", README
    ):
        assert (ROOT / name).exists(), name
