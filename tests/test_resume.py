"""A run goes on as if it had never stopped, whatever stopped it, and only where it is that run."""

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import kills
import numpy as np
import pytest
import torch
from test_training import TRAINERS, StopAt, small

from npformer import checkpoint, tasks, training
from npformer.checkpoint import CheckpointError
from npformer.cli import main

SMALL = """
[model]
d_model = 8
n_encoder_layers = 1
n_decoder_layers = 1
d_ff = 8
[recipe]
batch_size = 4
evaluate_every = 5
dev_examples = 4
"""


def go(folder, backend="numpy", **options):
    task = tasks.load("sort")
    config, recipe = small(task)
    recipe = replace(recipe, **options.pop("recipe", {}))
    trainer = TRAINERS[backend](config, recipe, 3)
    return training.run(trainer, task, folder, recipe=recipe, seed=3, test_examples=8, **options)


def command(folder, *arguments, code=0):
    (folder / "small.toml").write_text(SMALL)
    assert main([*map(str, arguments)]) == code


# --- What a run is, however often it was stopped --------------------------------------------------


@pytest.mark.parametrize("average", [0, 2])
def test_stopped_at_any_step_a_run_ends_with_the_same_files(tmp_path, average):
    """The best checkpoint among them: an interruption evaluates nothing."""
    recipe = {"average": average, "rate": 0.02}  # so high that the score goes up and down
    go(tmp_path / "whole", recipe=recipe)
    whole = kills.contents(tmp_path / "whole")
    for step in (1, 4, 7, 10, 12):
        folder = tmp_path / str(step)
        assert go(folder, recipe=recipe, report=StopAt(step)).ended == "interrupted"
        assert go(folder, recipe=recipe, resume=True).ended == "done"
        assert kills.contents(folder) == whole, step


def test_what_is_done_is_done(tmp_path):
    go(tmp_path, recipe={"average": 2})
    before = kills.contents(tmp_path)
    assert go(tmp_path, recipe={"average": 2}, resume=True).ended == "done"
    assert kills.contents(tmp_path) == before


def test_more_steps_go_on_from_the_last_weights_not_from_their_average(tmp_path):
    recipe = {"schedule": "constant", "average": 2}
    go(tmp_path / "a", recipe=recipe)
    go(tmp_path / "a", recipe=recipe | {"steps": 20}, resume=True)
    go(tmp_path / "b", recipe=recipe | {"steps": 20})
    a, b = (checkpoint.load_tensors(tmp_path / x / training.RESUME)[0] for x in "ab")
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name], err_msg=name)


def test_patience_is_counted_over_all_sessions(tmp_path):
    hopeless = {"rate": 1e-12, "steps": 1000}
    whole = go(tmp_path / "a", recipe=hopeless, patience=3)
    go(tmp_path / "b", recipe=hopeless, patience=3, report=StopAt(11))
    parts = go(tmp_path / "b", recipe=hopeless, patience=3, resume=True)
    assert (whole.ended, parts.ended) == ("early", "early")
    assert whole.progress.step == parts.progress.step == 16


def test_a_run_that_was_killed_before_its_first_save_begins_anew(tmp_path):
    go(tmp_path / "whole")
    go(tmp_path / "parts")
    for path in (tmp_path / "parts").iterdir():
        if path.name != training.RUN:
            path.unlink()
    assert go(tmp_path / "parts", resume=True).ended == "done"
    assert kills.contents(tmp_path / "parts") == kills.contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "n"), [("numpy", 300), ("torch", 60)])
def test_killed_at_any_moment_a_run_ends_as_one_that_never_stopped(backend, n):
    words = [sys.executable, kills.__file__, "--kills", str(n), "--backend", backend]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "all went on and ended as one that never stopped" in done.stdout


def test_killed_at_some_moments_a_run_ends_as_one_that_never_stopped():
    words = [sys.executable, kills.__file__, "--kills", "10", "--seed", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("at", [7, 12])
def test_a_run_of_the_first_version_goes_on(tmp_path, at):
    """It wrote down neither the task, nor which weights it would average, nor its patience."""
    recipe = {"average": 2, "steps": 12}
    go(tmp_path / "whole", recipe=recipe)
    go(tmp_path / "parts", recipe=recipe, report=StopAt(at))
    path = tmp_path / "parts" / training.RESUME
    tensors, metadata = checkpoint.load_tensors(path)
    del metadata["task"]
    progress = json.loads(metadata["progress"])
    assert progress["recent"]
    kept = {k: v for k, v in progress.items() if k not in ("recent", "since_best")}
    checkpoint.save_tensors(path, tensors, metadata | {"progress": json.dumps(kept)})
    assert go(tmp_path / "parts", recipe=recipe, resume=True).ended == "done"
    whole, parts = (kills.contents(tmp_path / x) for x in ("whole", "parts"))
    for name in ("model.safetensors", "history.json"):
        assert parts[name] == whole[name]


# --- What the command line asked for -------------------------------------------------------------


@pytest.mark.parametrize("name", ["my run's", "-runs"])
def test_the_command_that_is_printed_can_be_typed(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    run = training.run
    monkeypatch.setattr(
        training, "run", lambda *a, **k: run(*a, **k | {"report": StopAt(3)}, test_examples=4)
    )
    line = ["train", "sort", "--config", "small.toml", "--steps", "6", f"--out={name}"]
    command(tmp_path, *line, code=130)
    printed = shlex.split(capsys.readouterr().out.partition("Go on with: npformer ")[2])
    monkeypatch.setattr(training, "run", run)
    command(tmp_path, *printed)
    assert json.loads((tmp_path / name / "run.json").read_text())["results"]["ended"] == "done"
    again = [*line, "--steps", "7"]
    command(tmp_path, *again, code=2)
    assert " ".join(map(shlex.quote, printed[1:2])) in capsys.readouterr().err


def test_a_resumed_run_knows_its_time_and_its_patience(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []

    def interrupted(trainer, task, folder, **options):
        seen.append((options["minutes"], options["patience"], options["recipe"].steps))
        if len(seen) == 1:
            options["report"] = StopAt(7)
        options["clock"] = (0.02 * looks for looks in itertools.count()).__next__
        return run(trainer, task, folder, **options, test_examples=4)

    run = training.run
    monkeypatch.setattr(training, "run", interrupted)
    limits = ["--minutes", "0.02", "--patience", "1000", "--out", "a"]
    command(tmp_path, "train", "sort", "--config", "small.toml", *limits, code=130)
    assert "npformer train --resume a" in capsys.readouterr().out
    command(tmp_path, "train", "--resume", "a")
    assert seen == [(0.02, 1000, 10**9)] * 2  # and it ended, by its time
    command(tmp_path, "train", "--resume", "a", "--steps", "8")
    assert seen[2] == (None, 1000, 8)
    command(tmp_path, "train", "--resume", "a", "--patience", "2")
    assert seen[3] == (None, 2, 8)


def test_an_endless_run_of_the_first_version_is_asked_for_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command(tmp_path, "train", "sort", "--config", "small.toml", "--steps", "3", "--out", "a")
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    about["recipe"]["steps"] = 10**9
    about.pop("plan")
    (tmp_path / "a" / "run.json").write_text(json.dumps(about))
    before = kills.contents(tmp_path)
    command(tmp_path, "train", "--resume", "a", code=2)
    assert "was to end with its time: say --minutes or --steps" in capsys.readouterr().err
    assert kills.contents(tmp_path) == before


@pytest.mark.parametrize("lines", [0, 1])
def test_training_goes_on_where_nobody_listens_any_more(tmp_path, lines):
    """`npformer train ... | head -1` trains to the end, and says so by its exit code."""
    (tmp_path / "small.toml").write_text(SMALL)
    words = "npformer train sort --config small.toml --steps 20 --out a"
    pipe = f"{sys.executable} -m {words} | head -{lines}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", pipe], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert run["results"]["ended"] == "done"


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM], [signal.SIGHUP], [signal.SIGHUP, signal.SIGHUP]],
    ids=["SIGTERM", "SIGHUP", "SIGHUP by the shell and by the kernel"],
)
def test_other_signals_save_as_ctrl_c_does(tmp_path, signals):
    class Terminate(training.Silent):
        def step(self, entry):
            if entry["step"] == 5:
                for each in signals:
                    os.kill(os.getpid(), each)

    before = signal.getsignal(signals[0])
    go(tmp_path / "whole")
    assert go(tmp_path / "parts", report=Terminate()).ended == "interrupted"
    assert signal.getsignal(signals[0]) is before
    go(tmp_path / "parts", resume=True)
    assert kills.contents(tmp_path / "parts") == kills.contents(tmp_path / "whole")


def test_who_handles_ctrl_c_already_is_told_as_well(tmp_path):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        assert go(tmp_path, report=StopAt(3)).ended == "interrupted"
        assert seen == ["mine"]
    finally:
        signal.signal(signal.SIGINT, before)


# --- What is refused, and left as it is -----------------------------------------------------------


@pytest.fixture(scope="module", params=TRAINERS)
def begun(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    go(folder, request.param, report=StopAt(6))
    return request.param, folder


def other_optimizer(tensors, shape=None, dtype=None):
    name = next(k for k in tensors if k.endswith((".m", ".exp_avg")))
    x = tensors[name]
    tensors[name] = np.zeros(x.shape if shape is None else shape, dtype or x.dtype)


def without(name):
    return lambda tensors, metadata: tensors.pop(next(k for k in tensors if name in k))


def edit(key, **changes):
    def change(tensors, metadata):
        metadata[key] = json.dumps(json.loads(metadata[key]) | changes)

    return change


RNG = ("rng.cpu", "values")
STATES = {
    "an optimizer of one number": lambda t, m: other_optimizer(t, shape=(1,)),
    "an optimizer of 100,000": lambda t, m: other_optimizer(t, shape=(100_000,)),
    "an optimizer of no axis": lambda t, m: other_optimizer(t, shape=()),
    "an optimizer in float64": lambda t, m: other_optimizer(t, dtype=np.float64),
    "an optimizer in integers": lambda t, m: other_optimizer(t, dtype=np.int32),
    "a lost moment": without("state."),
    "a lost weight": without("model."),
    "a tensor too many": lambda t, m: t.update({"state.more": np.zeros(3)}),
    "a tensor of nobody": lambda t, m: t.update({"else.more": np.zeros(3)}),
    "weights in float64": lambda t, m: t.update(
        {k: x.astype(np.float64) for k, x in t.items() if k.startswith("model.")}
    ),
    "another task": lambda t, m: m.update(task="reverse"),
    "another recipe": edit("recipe", batch_size=9),
    "a recipe that is none": edit("recipe", batch_size=-9),
    "a negative step": edit("progress", step=-1),
    "a step beyond all numbers": edit("progress", step=10**400),
    "a fractional step": edit("progress", step=1.5),
    "a step of text": edit("progress", step="7"),
    "no seconds": edit("progress", seconds=float("nan")),
    "a best of text": edit("progress", best="good"),
    "a history of numbers": edit("progress", history=[1]),
    "a history of text": edit("progress", history={"steps": ["a"], "evaluations": []}),
    "snapshots that are paths": edit("progress", recent=["../../etc/passwd"]),
    "progress that is a list": lambda t, m: m.update(progress="[]"),
    "progress without end": lambda t, m: m.update(progress="[" * 100_000),
    "values that are no JSON": lambda t, m: m.update(values="{"),
}


@pytest.mark.parametrize("what", STATES)
def test_a_state_that_is_not_this_runs_is_refused_before_anything_is_loaded(begun, tmp_path, what):
    backend, folder = begun
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / training.RESUME
    tensors, metadata = checkpoint.load_tensors(path)
    STATES[what](tensors, metadata)
    checkpoint.save_tensors(path, tensors, metadata)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    task = tasks.load("sort")
    config, recipe = small(task)
    trainer = TRAINERS[backend](config, recipe, 3)
    weights, (state, values) = trainer.weights(), trainer.state()
    with pytest.raises(CheckpointError, match=r"resume\.safetensors: ") as refusal:
        training.run(trainer, task, tmp_path / "run", recipe=recipe, seed=3, resume=True)
    assert "\n" not in str(refusal.value)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    for name, x in (trainer.weights() | trainer.state()[0]).items():
        np.testing.assert_array_equal(x, (weights | state)[name], err_msg=name)
    assert trainer.state()[1] == values


RNG_STATES = {
    "numpy": (
        lambda t, m: m.update(values='{"rng": [{}]}'),
        lambda t, m: m.update(values='{"rng": [{"bit_generator": "MT19937"}]}'),
        lambda t, m: m.update(values='{"rng": 3}'),
        lambda t, m: m.update(values="{}"),
        lambda t, m: m.update(values=m["values"].replace('"state": ', '"state": -', 2)),
    ),
    "torch": (
        lambda t, m: t.update({"state.rng.cpu": np.zeros(1, np.uint8)}),
        lambda t, m: t.update({"state.rng.cpu": np.zeros_like(t["state.rng.cpu"])}),
        lambda t, m: t.update({"state.rng.cpu": np.zeros(5056, np.float32)}),
        lambda t, m: t.pop("state.rng.cpu"),
    ),
}


def test_random_numbers_that_no_generator_has_are_refused(begun, tmp_path):
    backend, folder = begun
    for i, damage in enumerate(RNG_STATES[backend]):
        shutil.copytree(folder, tmp_path / str(i))
        path = tmp_path / str(i) / training.RESUME
        tensors, metadata = checkpoint.load_tensors(path)
        damage(tensors, metadata)
        checkpoint.save_tensors(path, tensors, metadata)
        before = torch.get_rng_state()
        with pytest.raises(CheckpointError, match=r"resume\.safetensors: "):
            go(tmp_path / str(i), backend, resume=True)
        assert backend == "numpy" or len(before) == len(torch.get_rng_state())


# --- Nothing that is not ours ---------------------------------------------------------------------


def test_a_run_is_not_replaced_unless_that_is_said(tmp_path):
    go(tmp_path)
    before = kills.contents(tmp_path)
    with pytest.raises(ValueError, match="holds a run: resume it, --overwrite, or name another"):
        go(tmp_path)
    assert kills.contents(tmp_path) == before


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(tmp_path):
    go(tmp_path, recipe={"average": 2})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "recent" / "thesis.txt").write_text("mine")
    (tmp_path / "recent" / "best.safetensors").write_text("mine")
    go(tmp_path, recipe={"average": 0}, overwrite=True)
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    ours = {"run.json", "history.json", "resume.safetensors", "config.json", "model.safetensors"}
    theirs = {"notes.txt", "recent/thesis.txt", "recent/best.safetensors"}
    assert names == ours | theirs


def test_a_folder_with_a_name_that_is_not_ours_is_refused_and_stays(tmp_path):
    (tmp_path / "recent").mkdir()
    (tmp_path / "recent" / "photo.jpg").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="recent is not ours, and stays as it is"):
            go(tmp_path, recipe={"average": 2}, overwrite=overwrite)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == [
        "recent",
        "recent/photo.jpg",
    ]


def test_the_demo_replaces_a_demo_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command(tmp_path, "train", "sort", "--config", "small.toml", "--steps", "3", "--out", "a")
    before = kills.contents(tmp_path)
    command(tmp_path, "demo", "--steps", "3", "--out", "a", code=2)
    assert "a holds a run" in capsys.readouterr().err
    command(tmp_path, "train", "sort", "--steps", "3", "--out", "a", code=2)
    assert "a holds a run: --resume a, --overwrite, or" in capsys.readouterr().err
    assert kills.contents(tmp_path) == before
