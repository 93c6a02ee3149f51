"""Standard streams and files: UTF-8 in any locale, closed, full, or with nobody who reads."""

import argparse
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from npformer import TransformerConfig, checkpoint, cli, presets, streams, tasks
from npformer.testing import exchange
from npformer.testing.models import make_model

LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "cp1252": {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
}
PROGRAMS = ["npformer.cli", "npformer.testing.__main__", "torchformer.parallel"]
PROGRAMS += [f"benchmarks.{name}" for name in ("__main__", "training", "tables", "gpu.__main__")]
SORTS = TransformerConfig(
    13, 13, d_model=8, n_heads=2, d_ff=8, n_encoder_layers=1, n_decoder_layers=1, max_len=12
)


def run(command, code, **environment):
    """A line of shell, in which `npformer` is ours."""
    program = f'npformer() {{ "{sys.executable}" -m npformer "$@"; }}; {command}'
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, env=os.environ | environment, timeout=120
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err
    assert done.returncode == code, err
    return out, err


# --- The locale -------------------------------------------------------------------------------


@pytest.mark.parametrize("locale", LOCALES)
def test_words_sounds_and_messages_are_utf_8_in_any_locale(locale):
    environment = LOCALES[locale]
    out, err = run("npformer pronounce --ipa --stress Café ½", 2, **environment)
    assert out == "Café  kəˈfeɪ\n"
    assert "'½' has '½' (VULGAR FRACTION ONE HALF)" in err
    lines = r"printf '\xef\xbb\xbfnaïve\nb\xffd\nCafé' | npformer pronounce --json"
    out, err = run(lines, 2, **environment)
    assert '"word": "naïve", "phones": "N AY IY V", "ipa": "naɪiv"' in out
    assert '"word": "b\ufffdd", "error": "\'b\ufffdd\' has' in out
    assert '"word": "Café"' in out
    assert "input 2: 'b\ufffdd' has '\ufffd' (REPLACEMENT CHARACTER)" in err


def test_lessons_are_read_and_printed_in_any_locale():
    out, err = run("npformer lesson 2; npformer pronounce --help", 0, **LOCALES["C"])
    assert "→" in out or "√" in out or "×" in out or "−" in out
    assert "ə" in out
    assert err == ""


@pytest.mark.parametrize("locale", LOCALES)
def test_the_kit_dumps_and_scores_in_any_locale(locale, tmp_path):
    kit = f'"{sys.executable}" -m npformer.testing'
    dump = f"{kit} --dump {tmp_path}/d --level op --only softmax --examples 1"
    out, err = run(f"{dump} && {kit} --check {tmp_path}/d", 1, **LOCALES[locale])
    assert "nothing was compared" in out
    assert err == ""


def test_an_adapter_may_print_what_it_likes(tmp_path):
    """In its process as well the streams are UTF-8."""
    (tmp_path / "talkative.py").write_text(
        "def target(*_):\n    raise NotImplementedError\n\n"
        "def adapter():\n    print('ə')\n    return target\n",
        encoding="utf-8",
    )
    kit = f'"{sys.executable}" -m npformer.testing --level op --only softmax --examples 1'
    environment = LOCALES["C"] | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    out, _ = run(f"{kit} --target talkative:adapter", 1, **environment)
    assert "ə" in out
    assert "nothing was compared" in out


# --- A mark at the beginning of a file ----------------------------------------------------------


def test_a_byte_order_mark_belongs_to_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.toml").write_text("[recipe]\nbatch_size = 4\n", encoding="utf-8-sig")
    chosen = presets.settings(tasks.load("sort"), "demo", tmp_path / "c.toml")
    assert chosen["recipe"]["batch_size"] == 4
    exchange.dump(tmp_path / "d", [])
    manifest = tmp_path / "d" / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert exchange.load(tmp_path / "d") == []
    stream = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfhello\n"), encoding="cp1252")
    monkeypatch.setattr(sys, "stdin", stream)
    assert cli.main(["pronounce"]) == 0
    assert capsys.readouterr().out == "hello  HH AH L OW\n"


# --- Closed, full, not read ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "out", "err"),
    [
        ("pronounce <&-", "", "npformer pronounce: standard input: Bad file descriptor\n"),
        ("pronounce hello >&-", "", "npformer pronounce: standard output: Bad file descriptor\n"),
        ("--help >&-", "", "npformer: standard output: Bad file descriptor\n"),
        ("pronounce hello >/dev/full", "", "npformer pronounce: No space left on device\n"),
        ("pronounce hello 4 2>&-", "hello  HH AH L OW\n", ""),
        ("pronounce hello >&- 2>&- <&-", "", ""),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stream_that_fails_is_one_line_and_exit_code_2(command, out, err):
    assert run(f"npformer {command}", 2) == (out, err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_training_goes_on_where_its_output_cannot_be_written(tmp_path):
    small = (
        "[model]\nd_model = 8\nn_heads = 2\nd_ff = 8\nn_encoder_layers = 1\nn_decoder_layers = 1\n"
    )
    (tmp_path / "c.toml").write_text(f"{small}[recipe]\ndev_examples = 2\n", "utf-8")
    for i, closed in enumerate((">&-", ">/dev/full", "| false")):
        end = "; exit ${PIPESTATUS[0]}"
        train = f"train sort --steps 1 --config {tmp_path}/c.toml --out {tmp_path}/{i} {closed}"
        out, err = run(f"npformer {train}{end}", 0)
        assert (out, err) == ("", "npformer: the output is closed; the work goes on without it\n")
        assert (tmp_path / str(i) / "model.safetensors").exists()


def test_training_goes_on_where_its_terminal_is_closed(tmp_path):
    """Both streams are gone then, and the bar in mid-line; a nohup or disown kept it alive."""
    (tmp_path / "c.toml").write_text(
        "[model]\nd_model = 8\nn_heads = 2\nd_ff = 8\nn_encoder_layers = 1\nn_decoder_layers = 1\n"
        "[recipe]\ndev_examples = 2\n",
        "utf-8",
    )
    ours, theirs = os.openpty()
    line = f"train sort --steps 400 --config {tmp_path}/c.toml --out {tmp_path}/a".split()
    training = subprocess.Popen(
        [sys.executable, "-m", "npformer", *line],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    assert b"Training sort" in os.read(ours, 1000)
    os.close(ours)
    assert training.wait(timeout=300) == 0
    assert "results" in json.loads((tmp_path / "a" / "run.json").read_text("utf-8"))


def test_predictions_in_json_are_one_list_that_comes_item_by_item(tmp_path, monkeypatch, capsys):
    """300 MB of line breaks took 30 GB: all was kept for the end."""
    make_model(SORTS, 0).save(tmp_path)
    about = {"task": "sort", "backend": "numpy", "seed": 0, "recipe": {}}
    checkpoint.save_json(tmp_path / "run.json", about)
    seen = []

    def arriving():
        yield ["31"]
        seen.append(capsys.readouterr().out)
        yield ["x", "3"]

    monkeypatch.setattr(streams, "arriving", arriving)
    assert cli.main(["predict", str(tmp_path), "--json"]) == 2
    assert '"input": "31"' in seen[0]
    text = seen[0] + capsys.readouterr().out
    found = json.loads(text)
    assert [item["input"] for item in found] == ["31", "x", "3"]
    assert text == json.dumps(found, indent=2) + "\n"
    monkeypatch.setattr(streams, "arriving", lambda: iter([]))
    assert cli.main(["predict", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_a_reader_that_has_gone_ends_a_program_silently_as_any_other():
    _, err = run("npformer lesson 2 | head -1; exit ${PIPESTATUS[0]}", 141)
    assert err == ""


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_goes_through_the_one_place(name, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        try:
            code = importlib.import_module(name).main(["--help"])
        except SystemExit as end:
            code = end.code
        monkeypatch.undo()
    assert code == 141
    assert capsys.readouterr().err == ""


def test_an_interrupt_and_an_error_without_words_are_one_line(capsys):
    def ended_by(error):
        def fail(_):
            raise error

        parser = argparse.ArgumentParser("it")
        code = streams.program(parser, [], fail, MemoryError, LookupError)
        return code, capsys.readouterr().err

    assert ended_by(KeyboardInterrupt()) == (130, "it: interrupted\n")
    assert ended_by(MemoryError()) == (2, "it: MemoryError\n")
    assert ended_by(LookupError("two\n lines")) == (2, "it: two lines\n")
    assert ended_by(FileNotFoundError(2, "No such file", "a.txt")) == (
        2,
        "it: a.txt: No such file\n",
    )
    assert ended_by(BrokenPipeError(32, "Broken pipe")) == (141, "")
    with pytest.raises(ZeroDivisionError):  # a bug of ours is no message
        ended_by(ZeroDivisionError())


def test_somebody_elses_stream_is_left_as_it_is(monkeypatch):
    theirs = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", theirs)
    streams.use_utf8()
    assert (sys.stdout, theirs.encoding) == (theirs, "cp1252")
