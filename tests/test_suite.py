"""The suite itself: where its tests run, which of them, and that no clock decides."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

TESTS = Path(__file__).parent
ONE_THREAD = "assert {os.environ[f'{x}_NUM_THREADS'] for x in ('OMP', 'OPENBLAS', 'MKL')} == {'1'}"


@pytest.fixture
def suite(tmp_path):
    """A suite of three tests with our settings and our conftest."""
    settings = (TESTS.parent / "pyproject.toml").read_text().split("[tool.pytest")[1]
    (tmp_path / "pyproject.toml").write_text(f"[tool.pytest{settings}")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "tests" / "test_it.py").write_text(
        "import os\nimport pytest\n\n\n"
        f"def test_quick():\n    {ONE_THREAD}\n"
        "    print('by', os.environ.get('PYTEST_XDIST_WORKER'))\n"
        "\n\n@pytest.mark.slow\ndef test_slow():\n    pass\n"
        "\n\n@pytest.mark.real\ndef test_real():\n    pass\n"
    )
    return tmp_path


def run(folder, *arguments):
    """What it says, in an environment that wants three threads of every library."""
    threads = {f"{library}_NUM_THREADS": "3" for library in conftest.THREADS}
    ours = {k: x for k, x in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=ours | threads,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_all_of_it_runs_in_processes_of_its_own_but_neither_slow_nor_real(suite):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    said = run(suite)
    assert "1 passed" in said
    assert ("by gw" in said) == (conftest.cores() > 1)


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        (["-p", "no:xdist"], ["quick"]),
        (["tests/test_it.py", "-m", "slow"], ["slow"]),
        (["tests/test_it.py::test_real"], ["real"]),
    ],
)
def test_what_is_asked_for_runs(suite, arguments, passed):
    said = run(suite, *arguments)
    assert [
        name
        for name in ("quick", "slow", "real")
        if f"PASSED tests/test_it.py::test_{name}" in said
    ] == passed
    assert "by gw" not in said


@pytest.mark.parametrize(
    ("arguments", "changed", "processes"),
    [
        (["."], {}, 6),
        ([__file__], {}, None),
        ([f"{__file__}::test"], {}, None),
        (["."], {"numprocesses": 0}, 0),
        (["."], {"numprocesses": 3}, 3),
        (["."], {"usepdb": True}, None),
        (["."], {"capture": "no"}, None),
    ],
)
def test_single_files_and_whoever_looks_on_have_one_process(
    arguments, changed, processes, monkeypatch
):
    monkeypatch.setattr(conftest, "cores", lambda: 6)
    option = {"numprocesses": None, "usepdb": False, "capture": "fd", "tx": []} | changed
    config = SimpleNamespace(option=SimpleNamespace(**option), args=arguments)
    conftest.pytest_cmdline_main(config)
    assert config.option.numprocesses == processes
    config = SimpleNamespace(option=SimpleNamespace(), args=["."])  # without pytest-xdist
    conftest.pytest_cmdline_main(config)
