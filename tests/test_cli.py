"""The command line as a user runs it."""

import json
import os
import subprocess
import sys

import pytest

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
    done = subprocess.run(
        [sys.executable, "-m", "npformer", *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        timeout=300,
        env={**os.environ, **(env or {})},
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, f"exit code {done.returncode}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err


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


def test_check_sees_a_twin_that_differs(trained, tmp_path):
    """A torchformer with a wrong feed-forward layer: exit code 1, and the line says disagree."""
    code = (
        "import torchformer.feedforward as f, sys, npformer.cli\n"
        "f.FeedForward.forward = lambda self, x, rng=None: 1.001 * self.linear2("
        "self.activation(self.linear1(x)))\n"
        "sys.exit(npformer.cli.main(['check', 'runs/sort']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=trained, capture_output=True)
    assert done.returncode == 1
    assert done.stdout.decode().strip().splitlines()[-1].startswith("disagree:")


def test_resume_goes_on(trained):
    out, _ = run("train", "--resume", "runs/sort", "--steps", 15, "--json", cwd=trained)
    assert json.loads(out)["steps"] == 15


def test_demo_ends_in_agree_and_runs_without_torch(tmp_path, no_torch):
    out, _ = run("demo", "--steps", 5, "--out", tmp_path / "demo", cwd=tmp_path)
    assert out.strip().splitlines()[-1].startswith("agree:")
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
def test_bad_input_is_one_line_and_exit_code_2(trained, case):
    if case == "no cuda" and __import__("torch").cuda.is_available():
        pytest.skip("there is a CUDA device here")
    (trained / "heads.toml").write_text("[model]\nn_heads = 5\n")
    (trained / "key.toml").write_text("[model]\ndepth = 5\n")
    (trained / "bad.toml").write_text("[model\n")
    arguments, expected = BAD[case]
    _, err = run(*arguments, cwd=trained, code=2)
    assert expected in err
    assert len(err.strip().splitlines()) == 1


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
