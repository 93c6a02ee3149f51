"""The command line as a user runs it."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import npformer
from npformer import checkpoint, presets, tasks
from npformer.cli import main

SMALL = """
[model]
d_model = 16
n_encoder_layers = 1
n_decoder_layers = 1
d_ff = 32
[recipe]
batch_size = 8
evaluate_every = 5
dev_examples = 8
"""


def run(*arguments, cwd, code=0, stdin=None, env=None):
    """What `npformer ...` prints.  A process of its own only where it is given an input or an
    environment: to import torch takes longer than what is asked."""
    arguments = [str(x) for x in arguments]
    if stdin is None and env is None:
        found, out, err = here(arguments, cwd)
    else:
        done = subprocess.run(
            [sys.executable, "-m", "npformer", *arguments],
            cwd=cwd,
            input=stdin,
            capture_output=True,
            timeout=300,
            env={**os.environ, **(env or {})},
        )
        found, out, err = done.returncode, done.stdout.decode(), done.stderr.decode()
    assert found == code, f"exit code {found}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err


def here(arguments, cwd):
    """Exit code, stdout and stderr of the command in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:  # argparse, after --help
            code = stop.code
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.toml").write_text(SMALL)
    out, _ = run("train", "sort", "--config", "small.toml", "--steps", 10, cwd=folder)
    assert "Held-out test data: exact match" in out
    assert "npformer predict runs/sort" in out
    return folder


@pytest.fixture
def no_torch(tmp_path):
    """An environment in which `import torch` fails as it does where it is not installed."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without/torch.py").write_text(
        "raise ModuleNotFoundError('no torch', name='torch')"
    )
    return {"PYTHONPATH": str(tmp_path / "without")}


def test_check_and_predict(trained):
    out, _ = run("check", "runs/sort", cwd=trained)
    assert out.strip().splitlines()[-1].startswith("agree:")
    out, _ = run("predict", "runs/sort", "312", "99", cwd=trained)
    assert len(out.splitlines()) == 2
    piped, _ = run("predict", "runs/sort", cwd=trained, stdin=b"312\n99\n")
    assert piped == out
    by_torch, _ = run("predict", "runs/sort", "312", "99", "--backend", "torch", cwd=trained)
    assert by_torch == out
    out, _ = run("predict", "runs/sort", "312", "--json", cwd=trained)
    assert json.loads(out)[0]["input"] == "312"


def test_check_sees_a_twin_that_differs(trained, monkeypatch):
    """A torchformer with a wrong feed-forward layer: exit code 1, and the line says disagree."""
    from torchformer.feedforward import FeedForward

    def wrong(self, x, rng=None):
        return 1.001 * self.linear2(self.activation(self.linear1(x)))

    monkeypatch.setattr(FeedForward, "forward", wrong)
    out, _ = run("check", "runs/sort", cwd=trained, code=1)
    assert out.strip().splitlines()[-1].startswith("disagree:")


def test_resume_goes_on(trained):
    out, _ = run("train", "--resume", "runs/sort", "--steps", 15, "--json", cwd=trained)
    assert json.loads(out)["steps"] == 15


def test_demo_ends_in_agree_and_runs_without_torch(tmp_path, no_torch):
    out, _ = run("demo", "--steps", 5, "--out", tmp_path / "demo", cwd=tmp_path)
    assert out.strip().splitlines()[-1].startswith("agree:")
    out, _ = run("train", "--resume", tmp_path / "demo", "--steps", 6, "--json", cwd=tmp_path)
    assert json.loads(out)["steps"] == 6  # an interrupted demo says that this can be done
    out, _ = run("demo", "--steps", 5, "--out", tmp_path / "d", cwd=tmp_path, env=no_torch)
    assert "torch is not installed" in out
    assert "pip install" in out


BAD = {
    "unknown token": (["predict", "runs/sort", "31x"], "unknown token 'x'"),
    "empty": (["predict", "runs/sort", ""], "empty input"),
    "too long": (["predict", "runs/sort", "1" * 11], "11 tokens are too many"),
    "no folder": (["predict", "nowhere", "312"], "no such checkpoint folder"),
    "no run": (["predict", ".", "312"], "no such file"),
    "taken": (["train", "sort", "--out", "runs/sort"], "holds a run"),
    "preset": (["train", "sort", "--preset", "big"], "no preset 'big'"),
    "device": (["train", "sort", "--device", "cuda"], "--backend torch"),
    "no cuda": (["train", "sort", "--device", "cuda", "--backend", "torch"], "no CUDA device"),
    "heads": (["train", "sort", "--config", "heads.toml"], "not a multiple of n_heads"),
    "key": (["train", "sort", "--config", "key.toml"], "unknown key 'depth'"),
    "toml": (["train", "sort", "--config", "bad.toml"], "not TOML"),
    "unwritable": (["train", "sort", "--steps", "1", "--out", "small.toml/x"], "small.toml"),
    "which task": (["train"], "which task?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(trained, case, monkeypatch, capsys):
    if case == "no cuda" and __import__("torch").cuda.is_available():
        pytest.skip("there is a CUDA device here")
    (trained / "heads.toml").write_text("[model]\nn_heads = 5\n")
    (trained / "key.toml").write_text("[model]\ndepth = 5\n")
    (trained / "bad.toml").write_text("[model\n")
    arguments, expected = BAD[case]
    monkeypatch.chdir(trained)
    assert expected in refused(capsys, *arguments)


def test_torch_asked_for_and_missing(trained, no_torch):
    for arguments in (["train", "sort", "--backend", "torch"], ["check", "runs/sort"]):
        _, err = run(*arguments, cwd=trained, code=2, env=no_torch)
        assert "torch is not installed: pip install" in err


def test_a_broken_checkpoint_is_refused_by_name(trained, tmp_path):
    for name in ("config.json", "run.json", "model.safetensors"):
        (tmp_path / name).write_bytes((trained / "runs/sort" / name).read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    for data in (whole[: len(whole) // 2], b"not tensors", b""):
        (tmp_path / "model.safetensors").write_bytes(data)
        _, err = run("predict", tmp_path, "312", cwd=trained, code=2)
        assert "model.safetensors" in err


def test_bad_lines_of_standard_input_do_not_stop_the_good_ones(trained):
    out, err = run("predict", "runs/sort", cwd=trained, stdin=b"312\n\xff\nabc\n45\n", code=2)
    assert len(out.splitlines()) == 4
    assert out.splitlines()[1:3] == ["", ""]
    assert "input 2" in err
    assert "input 3" in err


def test_help_names_every_command(tmp_path):
    out, _ = run("--help", cwd=tmp_path)
    assert out == run(cwd=tmp_path)[0]
    for command in ("demo", "train", "check", "predict"):
        assert command in out
        assert "--json" in run(command, "--help", cwd=tmp_path)[0]


# --- Bad input: one clear line, exit code 2, and nothing is lost ------------------------------


def refused(capsys, *arguments):
    """What `npformer` says, run in this process; it must be one line."""
    assert main([str(x) for x in arguments]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith(f"npformer {arguments[0]}: ")
    return err


def files(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the trained run, to break."""
    return Path(shutil.copytree(trained / "runs/sort", tmp_path / "run"))


def untrained(folder, task_name, **changes):
    """A checkpoint as `train` leaves it, of a small model that has learned nothing."""
    task = tasks.load(task_name)
    small = {"d_model": 8, "n_heads": 2, "d_ff": 8, "n_encoder_layers": 1, "n_decoder_layers": 1}
    config, _ = presets.build(task, {"model": small, "recipe": {}})
    model = npformer.Transformer(replace(config, **changes), np.random.default_rng(0))
    model.save(folder)
    about = {"task": task_name, "backend": "numpy", "seed": 0, "recipe": {}}
    checkpoint.save_json(folder / "run.json", about)
    return folder


WORDS = {
    "na\u00efve": "'na\u00efve' has '\u00ef': a word is letters a-z and apostrophes",
    "R2D2": "'R2D2' has '2'",
    "two words": "'two words' has ' '",
    "don\u2019t": "has '\u2019'",  # a typographic apostrophe
    "\x00": r"has '\x00'",
    "": "empty input: expected a word, such as hypothesis",
    "  \t": "empty input",
    "a" * 41: "41 tokens are too many: at most 40",
}


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_words_that_are_none_are_refused_and_the_others_answered(tmp_path, capsys, backend):
    untrained(tmp_path, "g2p")
    for word, message in WORDS.items():
        assert message in refused(capsys, "predict", tmp_path, word, "--backend", backend)
    arguments = ["predict", str(tmp_path), "Don't", *WORDS, "a" * 40, "--backend", backend]
    assert main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    first, *others, last = json.loads(out)
    assert first["input"] == "Don't"
    assert "error" not in first | last
    assert [other["input"] for other in others] == list(WORDS)
    assert all("error" in other for other in others)
    assert len(err.splitlines()) == len(WORDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("31x", "unknown token 'x'; the vocabulary is 0123456789"),
        ("3.5", "unknown token '.'"),
        ("-3", "unknown token '-'"),
        ("<pad>", "unknown token '<'"),
        ("\u0663", "unknown token"),  # a digit, but not one of ours
        (" , ", "empty input: expected digits, such as 312"),
        ("12345678901", "11 tokens are too many: at most 10"),
    ],
)
def test_digits_that_are_none_are_refused(folder, capsys, text, message):
    assert message in refused(capsys, "predict", "--", folder, text)


def test_a_source_longer_than_the_models_positions_is_refused(tmp_path, capsys):
    """The task would allow it, the model has no such position."""
    untrained(tmp_path, "sort", max_len=5)
    assert "the model has 5 positions" in refused(capsys, "predict", tmp_path, "1234567")
    assert "src has 8 positions, the model takes 1 to 5" in refused(capsys, "check", tmp_path)


def rewrite(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def change_run(**values):
    def change(folder):
        about = json.loads((folder / "run.json").read_text()) | values
        about = {name: x for name, x in about.items() if x is not None}
        (folder / "run.json").write_text(json.dumps(about))

    return change


def change_config(folder):
    text = (folder / "config.json").read_text()
    assert '"d_ff": 32' in text
    (folder / "config.json").write_text(text.replace('"d_ff": 32', '"d_ff": 48'))


def foreign_tensors(name, metadata=None):
    tensors = {"resnet.conv1": np.ones(3, np.float32)}
    return lambda folder: checkpoint.save_tensors(folder / name, tensors, metadata or {})


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def remove(name):
    return lambda folder: (folder / name).unlink()


BROKEN = {
    "no weights": (remove("model.safetensors"), "model.safetensors: no such file"),
    "half of the weights": (cut("model.safetensors"), "model.safetensors: "),
    "weights of something else": (foreign_tensors("model.safetensors"), "has unknown 'resnet"),
    "weights that are text": (rewrite("model.safetensors", b"weights"), "model.safetensors: "),
    "another config": (change_config, "config.json: not the configuration that model.safet"),
    "a config that is no JSON": (rewrite("config.json", b"{"), "config.json: not JSON"),
    "a config nested without end": (rewrite("config.json", b"[" * 10**5), "config.json: not JSON"),
    "another task": (change_run(task="g2p"), "vocabularies are not those of g2p"),
    "an unknown task": (change_run(task="chess"), "run.json: unknown task 'chess'"),
    "no task": (change_run(task=None), "run.json: does not say what was trained"),
    "a run that is no JSON": (rewrite("run.json", b""), "run.json: not JSON"),
    "a run that is a list": (rewrite("run.json", b"[]"), "run.json: does not say what"),
    "a run nested without end": (rewrite("run.json", b"[" * 10**5), "run.json: not JSON"),
    "no run": (remove("run.json"), "run.json: no such file"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused_and_left_as_it_is(folder, capsys, what):
    damage, message = BROKEN[what]
    damage(folder)
    before = files(folder)
    for arguments in (["predict", folder, "312"], ["check", folder]):
        err = refused(capsys, *arguments)
        assert message in err
        assert str(folder) in err
    assert files(folder) == before


RESUMES = {
    "nothing to go on from": (remove("resume.safetensors"), [], "safetensors: no such file"),
    "half of the state": (cut("resume.safetensors"), [], "resume.safetensors: "),
    "half of the best weights": (cut("model.safetensors"), [], "model.safetensors: "),
    "best weights of something else": (
        foreign_tensors("model.safetensors"),
        [],
        "has unknown 'resnet",
    ),
    "a history that cannot be written": (
        lambda folder: (os.unlink(folder / "history.json"), os.mkdir(folder / "history.json")),
        [],
        "history.json: this is a folder, not a file",
    ),
    "another config beside them": (change_config, [], "config.json: not the configuration that"),
    "a state of something else": (
        foreign_tensors("resume.safetensors"),
        [],
        "resume.safetensors: lacks 'config'",
    ),
    "no config": (change_run(config=None), [], "run.json: lacks 'config'"),
    "a config that no model has": (change_run(config="{"), [], "run.json: not JSON"),
    "an unknown recipe": (change_run(recipe={"speed": 3}), [], "run.json: .*'speed'"),
    "a recipe that is a list": (change_run(recipe=[1]), [], "run.json: "),
    "another backend": (change_run(), ["--backend", "torch"], "has backend numpy"),
    "another seed": (change_run(), ["--seed", "3"], "has seed 0"),
    "threads without end": (change_run(threads=10**9), [], "threads must be at most 256, got 1000"),
    "a tampered seed": (change_run(seed=3), [], "resume.safetensors: the run has the seed 0"),
    "a tampered backend": (
        change_run(backend="torch"),
        [],
        "resume.safetensors: the run has the backend numpy, not torch",
    ),
    "another preset": (change_run(), ["--preset", "notes"], "--resume goes on as it began"),
    "another place": (change_run(), ["--out", "x"], "--resume goes on as it began"),
}


@pytest.mark.parametrize("what", RESUMES)
def test_a_run_that_cannot_go_on_is_refused_and_left_as_it_is(folder, capsys, what):
    damage, options, message = RESUMES[what]
    damage(folder)
    before = files(folder)
    err = refused(capsys, "train", "--resume", folder, *options)
    assert re.search(message, err), err
    assert files(folder) == before


def test_a_full_disk_ends_training_and_keeps_the_best_checkpoint(tmp_path, monkeypatch, capsys):
    (tmp_path / "small.toml").write_text(SMALL)
    synced, left = os.fsync, [8]

    def fsync(file):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(file)

    monkeypatch.setattr(os, "fsync", fsync)
    out = tmp_path / "run"
    settings = ["--config", tmp_path / "small.toml", "--steps", "50", "--out", out]
    assert "No space left on device" in refused(capsys, "train", "sort", *settings)
    monkeypatch.undo()
    assert main(["predict", str(out), "312"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not [name for name in os.listdir(out) if name.startswith(".")]


LARGE = {
    "[model]\nd_model = 1000000000000\n": "d_model must be at most 2147483647, got 1000000000000",
    f"[model]\nd_ff = {10**400}\n": "d_ff must be at most",
    "[model]\nd_model = 2000000000\n": "to train this model needs 1,536,",
    "[model]\nd_ff = 2000000000\n": "GB of memory, there are",
    "[model]\nn_decoder_layers = 200000000\n": "GB of memory, there are",
    "[model]\nmax_len = 2000000000\n": "max_len=2000000000 is too much for a model of",
    "[recipe]\nbatch_size = 1000000\n": "batch_size must be at most 65536, got 1000000",
    f"[recipe]\nsteps = {10**400}\n": "steps must be at most 1000000000, got 1000",
    f"[recipe]\nsteps = 1{'0' * 5000}\n": "large.toml: a line is longer than 1000 bytes",
    f"[recipe]\nrate = {'[' * 10**5}\n": "large.toml: larger than",
    f"[recipe]\nrate = {'[' * 900}\n": "large.toml: not TOML (",
    "[recipe]\nrate = inf\n": "rate must be positive, got inf",
}


def test_a_model_that_no_memory_holds_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for text, said in LARGE.items():
        Path("large.toml").write_text(text)
        assert said in refused(capsys, "train", "sort", "--config", "large.toml"), text
        assert os.listdir() == ["large.toml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "{}", "312", "--backend", "torch"],
        ["check", "{}"],
        ["train", "sort", "--backend", "torch", "--out", "{}/new"],
        ["train", "sort", "--backend", "torch", "--device", "cuda", "--out", "{}/new"],
    ],
)
def test_without_torch_what_needs_it_says_so(folder, monkeypatch, capsys, arguments):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    before = files(folder)
    err = refused(capsys, *[x.format(folder) for x in arguments])
    assert "torch is not installed: pip install 'npformer[torch]'" in err
    assert files(folder) == before
    assert main(["predict", str(folder), "312"]) == 0  # what does not need it goes on working


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path, capsys, backend):
    """Below a regular file, where not even root can make a folder."""
    (tmp_path / "file").write_text("kept")
    for place in ("file", "file/below"):
        out = tmp_path / place
        err = refused(capsys, "train", "sort", "--out", out, "--backend", backend)
        assert f"{out}: " in err
    assert files(tmp_path) == {str(tmp_path / "file"): b"kept"}
