"""NaN and infinity: in the weights of a folder, which commands refuse, and in what is printed."""

import json

import numpy as np
import pytest
from test_cli import refused, untrained

import npformer
import torchformer
from npformer import checkpoint, cli, pronunciation

COMMANDS = {
    "predict": ["312"],
    "predict by torch": ["312", "--backend", "torch"],
    "check": [],
    "check as JSON": ["--json"],
    "export": ["out"],
    "trace": ["312"],
    "explain": ["312"],
    "attention": ["312"],
    "embeddings": [],
}


def poisoned(folder, task="sort", name="decoder.layers.0.norm2.bias", value=np.nan):
    untrained(folder, task)
    model = npformer.Transformer.load(folder)
    dict(model.named_parameters())[name].data[2] = value
    model.save(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_with_nan_is_refused_naming_the_tensor(command, tmp_path, monkeypatch, capsys):
    """`predict` printed an empty line and exited with 0."""
    monkeypatch.chdir(tmp_path)
    name, *rest = [command.split()[0], str(poisoned(tmp_path / "run")), *COMMANDS[command]]
    said = refused(capsys, name, *rest)
    assert "model.safetensors: 1 of the 8 numbers of decoder.layers.0.norm2.bias are NaN" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_and_so_is_infinity(value, tmp_path, capsys):
    folder = poisoned(tmp_path, name="head.weight", value=value)
    assert "numbers of head.weight are NaN or infinite" in refused(capsys, "predict", folder, "312")


def test_no_pronunciation_by_weights_that_are_nan(tmp_path, capsys):
    folder = poisoned(tmp_path, "g2p")
    said = refused(capsys, "pronounce", "--weights", folder, "--model", "hello")
    assert "decoder.layers.0.norm2.bias are NaN or infinite" in said
    with pytest.raises(checkpoint.CheckpointError, match="are NaN or infinite"):
        pronunciation.pronounce("hello", weights=folder, model=True)


def test_python_may_load_them_to_look_at(tmp_path):
    folder = poisoned(tmp_path)
    for model in (npformer.Transformer.load(folder), torchformer.Transformer.load(folder)):
        bias = dict(model.named_parameters())["decoder.layers.0.norm2.bias"]
        assert np.isnan(np.asarray(bias.data)[2])


def test_weights_too_large_to_compute_with_are_one_line(tmp_path, capsys):
    """Finite, and so loaded; what is computed with them is not."""
    folder = poisoned(tmp_path, name="head.weight", value=3e38)
    with np.errstate(all="ignore"):
        said = refused(capsys, "predict", folder, "312")
    assert "the logits are" in said


def strict(text):
    """What there is in JSON, which has no NaN and no Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("command", ["check", "export"])
def test_json_has_no_nan(command, tmp_path, monkeypatch, capsys):
    nan, inf = float("nan"), float("inf")
    rows = [{"name": "loss", "error": nan, "bound": inf, "holds": False, "where": (nan, 1.0)}]
    found = {"agree": command == "export", "verdict": "", "comparisons": rows}
    monkeypatch.setattr(cli, "_compare", lambda *_: found)
    monkeypatch.setattr(cli.training, "score", lambda *_: {"exact_match": -inf})
    untrained(tmp_path / "run", "sort")
    out = [str(tmp_path / "out")] if command == "export" else []
    cli.main([command, str(tmp_path / "run"), *out, "--json"])
    printed = strict(capsys.readouterr().out)
    (row,) = printed["comparisons"]
    assert row == {"name": "loss", "error": None, "bound": None, "holds": False, "where": [None, 1]}
    if command == "export":
        assert printed["exact_match"] is None
        assert strict((tmp_path / "out/certificate.json").read_text()) == printed


def test_every_json_of_the_command_line_is_written_in_one_place():
    source = (checkpoint.Path(cli.__file__)).read_text(encoding="utf-8")
    assert "json.dumps" not in source


def test_what_is_no_nan_stays_what_it_is():
    value = {"a": [1, 2.5, None, True, "NaN"], "b": {"c": (float("inf"), np.float64("nan"))}}
    expected = {"a": [1, 2.5, None, True, "NaN"], "b": {"c": [None, None]}}
    assert strict(checkpoint.to_json(value)) == expected
