"""The kit beyond its command: cases and answers as files, the pytest plugin, bounds, docs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from npformer.testing import bounds, exchange
from npformer.testing.__main__ import main
from npformer.testing.cases import LEVELS, make_cases
from npformer.testing.reference import OPERATIONS, reference
from npformer.testing.report import Report

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


# --- Files ------------------------------------------------------------------------------------


def answer_all(folder):
    """What npformer says, through nothing but the files."""
    for entry in json.loads((folder / "manifest.json").read_text())["cases"]:
        tensors = load_file(folder / "cases" / f"{entry['name']}.safetensors")
        arrays = {name: tensors[name] for name in entry["arrays"]}
        answer = reference(entry["op"], arrays, entry["options"])
        answer = {name: np.array(x, order="C") for name, x in answer.items()}
        save_file(answer, folder / "answers" / f"{entry['name']}.safetensors")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_what_is_dumped_can_be_answered_and_scored(dtype, tmp_path, capsys):
    folder = tmp_path / "cases"
    assert main(["--dump", str(folder), "--examples", "2", "--seed", "5", "--dtype", dtype]) == 0
    answer_all(folder)
    assert main(["--check", str(folder)]) == 0
    assert re.search(r"all \d+ cases agree", capsys.readouterr().out)


def test_a_dump_is_the_cases_exactly(tmp_path):
    cases = make_cases(LEVELS, 2, 7)
    exchange.dump(tmp_path, cases)
    for case, again in zip(cases, exchange.load(tmp_path), strict=True):
        assert (case.name, case.op, case.dtype, case.options) == (
            (again.name, again.op, again.dtype, again.options)
        )
        assert list(case.expected) == list(again.expected)  # the order of backward
        for ours, theirs in ((case.arrays, again.arrays), (case.expected, again.expected)):
            for name, x in ours.items():
                assert x.dtype == theirs[name].dtype
                np.testing.assert_array_equal(x, theirs[name])
        for name, bound in case.bounds.items():
            np.testing.assert_array_equal(
                again.bounds[name], np.broadcast_to(bound, case.expected[name].shape)
            )


def test_an_answer_that_is_wrong_missing_or_broken_is_named(tmp_path, capsys):
    cases = make_cases(("layer",), 3, only=("linear",))
    exchange.dump(tmp_path, cases)
    answer_all(tmp_path)
    answers = tmp_path / "answers"
    wrong = load_file(answers / "layer.linear-0.safetensors")
    save_file(wrong | {"d.weight": wrong["d.weight"] * 2}, answers / "layer.linear-0.safetensors")
    (answers / "layer.linear-1.safetensors").write_bytes(b"nonsense")
    (answers / "layer.linear-2.safetensors").unlink()
    verdicts = exchange.check(tmp_path)
    assert [v.status for v in verdicts] == ["failed", "failed", "skipped"]
    assert "d.weight" in verdicts[0].note
    assert "constant factor: actual = 2 * expected" in verdicts[0].note
    assert "layer.linear-1.safetensors: not a safetensors file" in verdicts[1].note
    assert main(["--check", str(tmp_path)]) == 1
    assert "2 of 2 cases differ, 1 skipped" in capsys.readouterr().out


def test_folders_that_will_not_do_are_refused_in_one_line(tmp_path, capsys):
    cases = make_cases(("layer",), 1, only=("linear",))
    exchange.dump(tmp_path / "full", cases)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text('{"format_version": 1')
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "manifest.json").write_text('{"format_version": 2, "cases": []}')
    (tmp_path / "file").write_text("")
    exchange.dump(tmp_path / "stray", cases)
    (tmp_path / "stray" / "answers" / "linear.safetensors").write_bytes(b"")
    for arguments, said in {
        ("--dump", "full"): "full holds cases: --overwrite, or name another folder",
        ("--dump", "file"): "file: is there already, and is no folder",
        ("--check", "nowhere"): "nowhere/manifest.json: no such file",
        ("--check", "broken"): "broken/manifest.json: not JSON",
        ("--check", "later"): "format_version is 2",
        ("--check", "stray"): "there is no such case",
    }.items():
        assert main([arguments[0], str(tmp_path / arguments[1]), "--examples", "1"]) == 2, arguments
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node to run JavaScript")
def test_plain_javascript_goes_through_the_files(tmp_path):
    exchange.dump(tmp_path, make_cases(("op", "layer"), 12))
    done = run("node", str(TESTS / "adapters" / "few_ops.js"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = Report(exchange.check(tmp_path))
    assert {v.case.op for v in report.compared} == {"relu", "softmax", "linear", "layer_norm"}
    assert {v.case.op for v in report.failed} == {"layer_norm"}
    assert "you match if LayerNorm's eps is outside the root" in report.text()


@pytest.mark.skipif(not shutil.which("gcc"), reason="there is no gcc to compile C")
def test_plain_c_goes_through_the_files(tmp_path):
    program = tmp_path / "few_ops"
    flags = ["-O1", "-Wall", "-Werror", str(TESTS / "adapters" / "few_ops.c"), "-lm"]
    done = run("gcc", *flags, "-o", str(program))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "cases"
    cases = make_cases(("op",), 8, only=("relu", "gelu"))
    exchange.dump(folder, cases)
    for case in cases:
        name = f"{case.name}.safetensors"
        done = run(
            str(program), case.op, str(folder / "cases" / name), str(folder / "answers" / name)
        )
        assert done.returncode == 0, done.stderr
    report = Report(exchange.check(folder))
    assert report.exit_code == 0, report.text()
    assert len(report.compared) == len(cases)


# --- The pytest plugin ------------------------------------------------------------------------


def environment():
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


def pytest_of(folder, *arguments):
    """As the command `pytest` in that folder, which is not on its path: python -m pytest puts it
    there, if it is not told not to by -P."""
    command = [sys.executable, "-P", "-m", "pytest", "-p", "pytest_npformer"]
    command += ["-p", "no:cacheprovider"]
    return run(*command, *arguments, cwd=folder, env=environment())


@pytest.fixture
def project(tmp_path):
    """Somebody else's project, with a test that says what the plugin has imported."""
    (tmp_path / "test_theirs.py").write_text(
        "import sys\n\n\ndef test_theirs():\n"
        "    assert 'pytest_npformer' in sys.modules\n"
        "    assert not {'numpy', 'npformer', 'hypothesis', 'torch'} & set(sys.modules)\n"
    )
    return tmp_path


def test_the_plugin_imports_nothing_until_its_option_is_given(project):
    done = pytest_of(project, "-p", "no:hypothesispytest", "-p", "no:xdist")
    assert "1 passed" in done.stdout, done.stdout


def test_the_plugin_makes_a_test_of_every_case(project):
    chosen = ["--npformer-level", "layer", "--npformer-examples", "2", "-v"]
    done = pytest_of(
        project, "--npformer-target", "adapters.bad:shape", *chosen, "--deselect=test_theirs.py"
    )
    assert done.returncode == 1
    assert "13 passed" in done.stdout, done.stdout
    assert "1 failed" in done.stdout
    assert re.search(r"npformer::layer\.layer_norm-\d FAILED", done.stdout)
    assert re.search(r"d\.bias .*expected the shape", done.stdout)
    assert "Traceback" not in done.stdout


def test_the_plugin_says_you_match_if_and_skips_what_is_not_there(project):
    chosen = ["--npformer-level", "layer", "--npformer-examples", "3"]
    done = pytest_of(
        project,
        "--npformer-target",
        "adapters.readme:adapter",
        *chosen,
        "--deselect=test_theirs.py",
    )
    assert done.returncode == 1
    assert "layer.layer_norm: you match if LayerNorm's eps is outside the root" in done.stdout
    assert "18 skipped" in done.stdout


# In folders without a test: pytest puts that of every test on the path
FEW = ["--npformer-level", "layer", "--npformer-examples", "1"]


def write_adapter(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text((TESTS / "adapters" / "readme.py").read_text())


def test_the_plugin_finds_a_module_in_the_current_folder_as_the_command_does(tmp_path):
    write_adapter(tmp_path / "my_module.py")
    done = pytest_of(tmp_path, "--npformer-target", "my_module:adapter", *FEW)
    assert "1 failed, 6 skipped" in done.stdout, done.stdout + done.stderr
    command = [sys.executable, "-m", "npformer.testing", "--target", "my_module:adapter"]
    done = run(*command, "--level", "layer", "--examples", "1", cwd=tmp_path, env=environment())
    assert "1 of 1 cases differ, 6 skipped" in done.stdout, done.stderr


def test_the_plugin_finds_a_module_that_the_settings_name(tmp_path):
    """In a package beside them, from a folder below, and what it imports by their pythonpath."""
    write_adapter(tmp_path / "src" / "theirs.py")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_module.py").write_text("from theirs import adapter\n")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npythonpath = src\naddopts = --npformer-target my_package.my_module:adapter\n"
    )
    (tmp_path / "below").mkdir()
    done = pytest_of(tmp_path / "below", "..", *FEW)
    assert "1 failed, 6 skipped" in done.stdout, done.stdout + done.stderr


def test_with_xdist_the_plugin_says_you_match_if_once_and_of_all_cases(tmp_path):
    """Each process has asked some of them only."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    write_adapter(tmp_path / "my_module.py")
    chosen = ["--npformer-target", "my_module:adapter", "--npformer-level", "layer"]
    done = pytest_of(tmp_path, *chosen, "--npformer-examples", "4", "-k", "layer_norm", "-n", "2")
    assert "4 failed" in done.stdout
    assert set(re.findall(r"\[(gw\d)\] ", done.stdout)) == {"gw0", "gw1"}
    assert [line for line in done.stdout.splitlines() if "you match if" in line] == [
        "layer.layer_norm: you match if LayerNorm's eps is outside the root and LayerNorm's eps is "
        "1e-06"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--npformer-target", "nowhere_at_all:f"], "No module named 'nowhere_at_all'"),
        (["--npformer-target", "adapters.bad:shape", "--npformer-fix", "x=1"], "--fix x=1"),
        (["--npformer-target", "nowhere_at_all:f", "-n", "2"], "No module named 'nowhere_at_all'"),
    ],
)
def test_the_plugin_refuses_in_one_line(arguments, said, project):
    done = pytest_of(project, *arguments, "--npformer-examples", "1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert said in line


def test_the_entry_point_is_declared_and_the_plugin_packaged():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"pytest_npformer": "pytest_npformer"}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "pytest_npformer.py" in wheel["only-include"]


# --- The bounds -------------------------------------------------------------------------------


def test_bounds_are_measured_op_by_op(capsys):
    assert main(["--bounds", "30", "--only", "softmax", "--only", "layer_norm"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"layer_norm +float32 +\d+  y 0\.\d\d  d\.x 0\.\d\d  d\.weight", said)
    assert re.search(r"\d+ examples, no false alarm", said)


def test_a_bound_that_is_too_narrow_is_a_false_alarm(monkeypatch, capsys):
    (case,) = [case for case in bounds.OP_CASES if case.name == "layer_norm"]

    def narrow(example, dy, dtype):
        found = case.bounds(example, dy, dtype)
        return found._replace(value=found.value / 1e3)

    changed = type(case)(case.name, case.op, case.torch, case.examples, narrow)
    monkeypatch.setattr(bounds, "OP_CASES", [changed])
    assert main(["--bounds", "30"]) == 1
    assert "2 false alarms" in capsys.readouterr().out


# --- What the docs say ------------------------------------------------------------------------

DOCS = (ROOT / "docs" / "testing-kit.md").read_text()
OPERATION_ROWS = [
    [cell.strip() for cell in row.split("|")]
    for row in re.findall(r"^\|( (?:op|layer|block|model|decoding)\b.*)\|$", DOCS, re.M)
]


def described(op, level):
    for levels, names, arrays, options, outputs in OPERATION_ROWS:
        if level in levels and f"`{op}`" in names:
            return arrays, options, outputs
    raise AssertionError(f"docs/testing-kit.md does not describe {op} at the level {level}")


def test_the_docs_name_every_array_option_and_output():
    names = set()
    for case in make_cases(LEVELS, 8):
        names.add(case.op)
        arrays, options, outputs = described(case.op, case.level)
        for name in case.arrays:
            if "parameter" not in arrays or "." not in name:
                stem = name if f"`{name}`" in arrays else f"{name.split('.')[0]}.*"
                assert f"`{stem}`" in arrays, (case.op, name)
        for name in case.options:
            assert f"`{name}`" in options or options.startswith("the same"), (case.op, name)
        for name in case.expected:
            assert name.startswith("d.") or f"`{name}`" in outputs, (case.op, name)
    assert names == set(OPERATIONS)


def test_every_link_of_the_docs_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", DOCS):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target


README = (ROOT / "README.md").read_text()


def test_the_readme_example_is_the_file_and_gets_the_answer_it_shows(capsys, monkeypatch):
    shown = (TESTS / "adapters" / "readme.py").read_text()
    assert f"```python\n{shown}```" in README
    assert len(shown.split("\n")) <= 26
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    assert main(["--target", "adapters.readme:adapter", "--level", "op"]) == 1
    said = capsys.readouterr().out
    (promised,) = re.findall(r"=> you match if LayerNorm.*", README)
    assert promised in said
    assert re.search(r"op +softmax +(\d+) of \1 +yes", said)
