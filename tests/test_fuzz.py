"""A short run of the fuzzer (tests/fuzz), which finds nothing; and planted faults, which it finds.

python -m tests.fuzz --mutations 10000 is the long one.
"""

import os
import sys
from pathlib import Path

import pytest

from npformer import checkpoint, cli, storage

sys.path.insert(0, str(Path(__file__).parent.parent))  # as `python -m tests.fuzz` has it

from tests.fuzz.runner import fuzz
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the workers are forked")
N = {"checkpoints": 50, "resumes": 20, "shards": 30, "traces": 30, "kit": 20, "commands": 20}


def said(findings):
    return "\n".join(f"{f['i']}  {f['said']}\n{f['problem']}" for f in findings)


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """What `hurry` changes for the workers' sake, it changes in this process."""
    from npformer import training
    from npformer.tasks import digits, g2p

    for owner, name in (
        (digits.Digits, "test"),
        (g2p.G2P, "test"),
        (training, "run"),
        (cli, "draw_history"),
        (__import__("torch"), "set_num_threads"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.parametrize("what", N)
def test_no_mutation_of_a_few_does_harm(what):
    findings, codes = fuzz(what, N[what], seed=0)
    assert not findings, said(findings)
    assert sum(codes.values()) == N[what]
    assert codes[2] > N[what] / 4  # most of what is broken is noticed


def escapes(path, *_):
    raise ZeroDivisionError


def eats(path, *_):
    return len(bytearray(700 << 20)), {}


def hangs(path, *_):
    while True:
        pass


def dies(path, *_):
    os.abort()


def writes(path, *_):
    Path(path).with_name("new").write_text("")
    raise checkpoint.CheckpointError(f"{path}: no")


def rambles(path, *_):
    raise checkpoint.CheckpointError(f"{path}: one\ntwo")


PLANTED = {
    escapes: "ZeroDivisionError",
    eats: " MB",
    hangs: "took more than",
    dies: "the process died",
    writes: "/new']: ",
    rambles: "said in 2 lines",
}


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_planted_faults_are_found(fault, monkeypatch):
    """Where the tensors of a trace are read."""
    from tests.fuzz import runner, targets

    monkeypatch.setattr(runner, "SECONDS", 1 if fault is hangs else 5)
    make, main = targets.Traces.make, cli.main

    def planted(self, folder):
        make(self, folder)
        monkeypatch.setattr(checkpoint, "load_tensors", fault)
        monkeypatch.setattr(storage, "read", lambda path, *_: Path(path).read_bytes())
        monkeypatch.setattr(cli, "main", lambda line: direct(main, line))

    def direct(main, line):
        """Without the program's own care for its lines."""
        checkpoint.load_tensors(Path(line[1]) / "trace.safetensors")
        return main(line)

    monkeypatch.setattr(targets.Traces, "make", planted)
    monkeypatch.setattr(targets.Traces, "mutate", lambda *_: "nothing")
    findings, _ = fuzz("traces", 1 if fault in (hangs, dies) else 3, seed=0)
    assert findings
    assert all(PLANTED[fault] in found["problem"] for found in findings), said(findings)


def test_every_kind_of_file_has_its_target():
    assert set(TARGETS) == set(N)
