"""docs/files.md, row by row."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import npformer
from npformer import checkpoint, cli, runs, storage, training
from npformer.checkpoint import CheckpointError
from npformer.page import write_page
from npformer.plot import write_figure
from npformer.tasks.digits import Digits
from npformer.testing.models import make_model
from npformer.testing.report import Report

ROOT = Path(__file__).parent.parent
PATHS = {"PYTHONPATH": str(ROOT)}
CONFIG = npformer.TransformerConfig(
    13, 13, d_model=8, n_heads=2, d_ff=8, n_encoder_layers=1, n_decoder_layers=1, max_len=12
)


def rows(heading):
    """The first column of the table under a heading."""
    text = (ROOT / "docs" / "files.md").read_text()
    part = re.split(r"^## ", text, flags=re.MULTILINE)
    (section,) = [each for each in part if each.startswith(heading)]
    return [line.split(" | ")[0].lstrip("| ") for line in section.splitlines() if "|" in line][2:]


CASES = {}


def row(text):
    def note(function):
        CASES[text] = function
        return function

    return note


# --- A file that is written -------------------------------------------------------------------


def page(path):
    ids = np.array([[3, 4]])
    seen = npformer.trace(make_model(CONFIG, 0), ids, ids)
    write_page(seen, path, src=[3, 4], tgt=[3, 4], source=["a", "b"], target=["c", "d"])


WRITERS = {
    "page": page,
    "picture": lambda path: write_figure(Figure(), path, dpi=20),
    "report": lambda path: Report().write_json(path),
    "JSON": lambda path: checkpoint.save_json(path, {"a": 1}),
    "weights": lambda path: checkpoint.save_tensors(path, {"x": np.ones(3)}, {}),
}


def is_new(data):
    return data[:1] in (b"<", b"\x89", b"{") or b'"x":' in data


@row("nothing")
def _(write, path, folder):
    before = os.umask(0o027)
    try:
        write(path := folder / "deep" / "er" / "x.png")
    finally:
        os.umask(before)
    assert is_new(path.read_bytes())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@row("a file")
def _(write, path, folder):
    path.write_text("old")
    path.chmod(0o600)
    inode = path.stat().st_ino
    write(path)
    assert is_new(path.read_bytes())
    assert path.stat().st_ino != inode
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@row("a file of several names (hard links)")
def _(write, path, folder):
    path.write_text("old")
    os.link(path, folder / "other")
    write(path)
    assert is_new(path.read_bytes())
    assert (folder / "other").read_text() == "old"


@row("a file that may not be written")
def _(write, path, folder):
    path.write_text("old")
    path.chmod(0o400)
    opened = os.open

    def forbidding(name, flags, *rest):  # root may write everything
        if str(name) == str(path) and flags & os.O_WRONLY:
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return opened(name, flags, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", forbidding)
        refused(write, path, "Permission denied")
    assert path.read_text() == "old"


@row("a link to a file")
def _(write, path, folder):
    (folder / "elsewhere").mkdir()
    target = folder / "elsewhere" / "target"
    target.write_text("old")
    target.chmod(0o604)
    path.symlink_to(target)
    write(path)
    assert path.is_symlink()
    assert is_new(target.read_bytes())
    assert stat.S_IMODE(target.stat().st_mode) == 0o604
    assert os.listdir(folder / "elsewhere") == ["target"]


@row("a link to nothing")
def _(write, path, folder):
    path.symlink_to("target")
    write(path)
    assert path.is_symlink()
    assert is_new((folder / "target").read_bytes())


@row("a link to itself")
def _(write, path, folder):
    path.symlink_to(path)
    refused(write, path, "Too many levels of symbolic links")
    assert path.is_symlink()


@row("a folder")
def _(write, path, folder):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")
    refused(write, path, "Is a directory")
    assert (path / "thesis.txt").read_text() == "mine"


@row("a device, such as /dev/null")
def _(write, path, folder):
    if os.geteuid():  # only root could replace it
        write("/dev/null")
        return
    os.mknod(path, 0o660 | stat.S_IFCHR, os.makedev(1, 3))  # another null, in case we are wrong
    write(path)
    assert stat.S_ISCHR(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.lstat().st_mode)
    write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    refused(write, Path("/dev/full"), "No space left on device")


@row("/dev/stdout")
def _(write, path, folder):
    file = os.open(folder / "out", os.O_RDWR | os.O_CREAT)
    os.write(file, b"before")
    write(f"/dev/fd/{file}")
    os.write(file, b"after")
    os.close(file)
    data = (folder / "out").read_bytes()
    assert data.startswith(b"before")
    assert is_new(data.removeprefix(b"before"))
    assert data.endswith(b"after")


@row("a FIFO with a reader")
def _(write, path, folder):
    os.mkfifo(path)
    found = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    write(path)
    reader.join()
    assert is_new(found[0])
    assert stat.S_ISFIFO(path.stat().st_mode)


@row("a FIFO that nobody reads")
def _(write, path, folder):
    os.mkfifo(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "PATIENCE", 0.05)
        refused(write, path, "nobody reads from the other end")
    assert stat.S_ISFIFO(path.stat().st_mode)


@row("a socket")
def _(write, path, folder):
    with socket.socket(socket.AF_UNIX) as s:
        os.chdir(folder)  # the name of a socket must be short
        s.bind("x.png")
        refused(write, path, "this is a socket, not a file")
    assert stat.S_ISSOCK(path.stat().st_mode)


@row("a disk that gets full")
def _(write, path, folder):
    path.write_text("old")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(write, path, "No space left on device")
    assert path.read_text() == "old"
    assert os.listdir(folder) == [path.name]


@row("a writer that is killed")
def _(write, path, folder):
    """In test_storage.py as a process; here, what it leaves."""
    path.write_text("old")
    pid = os.fork()
    if pid == 0:
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        write(path)
    os.waitpid(pid, 0)
    assert path.read_text() == "old"
    assert len(os.listdir(folder)) == 2
    write(path)
    assert os.listdir(folder) == [path.name]


def refused(write, path, message):
    with pytest.raises(CheckpointError) as caught:
        write(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("what", rows("A file that is written"))
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_is_written(kind, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CASES[what](WRITERS[kind], tmp_path / "x.png", tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


# --- A folder that is written -----------------------------------------------------------------

SMALL = """
[model]
d_model = 8
n_heads = 2
d_ff = 8
n_encoder_layers = 1
n_decoder_layers = 1
[recipe]
batch_size = 4
evaluate_every = 1
dev_examples = 4
average = 2
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A run, an exported model, a trace and cases, each with what the command is that wrote it."""
    home = tmp_path_factory.mktemp("material")
    config = home / "small.toml"
    config.write_text(SMALL)
    about = {"task": "sort", "backend": "numpy", "seed": 0, "recipe": {}}
    made = {}
    for kind in ("train", "demo", "export"):
        folder = home / kind
        make_model(CONFIG, 0).save(folder)
        checkpoint.save_json(folder / runs.RUN, about | {"kind": kind, "config": CONFIG.to_json()})
        made[kind] = folder
    checkpoint.save_tensors(
        made["train"] / "recent" / "00000001.safetensors", {"x": np.ones(1)}, {}
    )
    checkpoint.save_json(made["export"] / runs.CERTIFICATE, {})
    made["trace"] = home / "trace"
    assert cli.main(["trace", str(made["train"]), "31", "--out", str(made["trace"])]) == 0
    made["dump"] = home / "dump"
    assert kit(["--dump", str(made["dump"]), *FEW]) == 0
    commands = {
        "train": ["train", "sort", "--config", str(config), "--steps", "2", "--out"],
        "demo": ["demo", "--steps", "1", "--out"],
        "export": ["export", str(made["train"])],
        "trace": ["trace", str(made["train"]), "31", "--out"],
        "dump": [*FEW, "--dump"],
    }
    return made, commands


FEW = ["--only", "softmax", "--examples", "1", "--level", "op"]


def kit(line):
    from npformer.testing.__main__ import main

    try:
        return main(line)
    except SystemExit as end:
        return end.code


@pytest.fixture
def command(material, monkeypatch, capsys):
    """command(kind, folder, *options): its exit code, and the one line if it was refused."""
    monkeypatch.setattr(cli, "draw_history", lambda *_: False)
    monkeypatch.setattr(cli, "_compare", lambda *_: {"agree": True, "verdict": "agree"})
    monkeypatch.setattr(Digits, "dev", lambda self: self._held_out(4, seed=1))
    run = training.run
    short = {"test_examples": 2}
    monkeypatch.setattr(training, "run", lambda *a, **k: run(*a, **k, **short))

    def go(kind, folder, *options):
        before = files(folder)
        line = [*material[1][kind], str(folder), *options]
        code = (kit if kind == "dump" else cli.main)(line)
        err = capsys.readouterr().err
        if code == 2:
            assert err.count("\n") == 1, err
            assert files(folder) == before
        return code, err

    return go


def files(folder):
    if not folder.is_dir():
        return folder.read_bytes() if folder.exists() else None
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


KINDS = ("train", "demo", "export", "trace", "dump")
MARKS = {"trace": "trace.json", "dump": "manifest.json"}


@row("nothing, or other names than we need")
def _(kind, command, material, folder):
    assert command(kind, folder / "new")[0] == 0
    assert (folder / "new" / MARKS.get(kind, "run.json")).exists()
    if kind != "export":  # which is a folder to be given away
        folder.joinpath("mine").mkdir()
        folder.joinpath("mine", "thesis.txt").write_text("mine")
        assert command(kind, folder / "mine")[0] == 0
        assert folder.joinpath("mine", "thesis.txt").read_text() == "mine"


@row("what such a command wrote")
def _(kind, command, material, folder):
    found = shutil.copytree(material[0][kind], folder / "it")
    (found / "notes.txt").write_text("mine") if kind != "export" else None
    code, err = command(kind, found)
    if kind != "demo":
        assert code == 2
        assert "--overwrite, or name another folder" in err
    assert command(kind, found, "--overwrite")[0] == 0
    assert kind == "export" or (found / "notes.txt").read_text() == "mine"
    assert (found / MARKS.get(kind, "run.json")).exists()


@row("a run by `npformer demo`")
def _(kind, command, material, folder):
    found = shutil.copytree(material[0]["demo"], folder / "it")
    code, err = command(kind, found)
    assert code == {"demo": 0, "trace": 0, "dump": 0}.get(kind, 2), err
    if kind == "train":
        assert "holds a run: --resume" in err
        assert command(kind, found, "--overwrite")[0] == 0
        assert json.loads((found / "run.json").read_text())["kind"] == "train"
        assert command("demo", found)[0] == 2  # it is no demo's any more


@row("something under a name that we need, and not by us")
def _(kind, command, material, folder):
    own = {"trace": ("trace.json", "trace.safetensors"), "dump": ("manifest.json", "cases")}
    for name in own.get(kind, ("config.json", "model.safetensors", "run.json", "certificate.json")):
        place = folder / f"with {name}"
        place.mkdir()
        (place / name).write_text('{"name": "my project"}')
        for options in ([], ["--overwrite"]):
            code, err = command(kind, place, *options)
            assert code == 2
            assert f"{place / name} is not ours" in err
    if kind in ("train", "demo"):
        (folder / "with a folder" / "recent").mkdir(parents=True)
        (folder / "with a folder" / "recent" / "thesis.txt").write_text("mine")
        assert command(kind, folder / "with a folder", "--overwrite")[0] == 2


@row("what another kind of command wrote")
def _(kind, command, material, folder):
    others = {"train": "export", "demo": "export", "export": "train"}
    if kind in others:  # traces and cases have names that nobody else has
        found = shutil.copytree(material[0][others[kind]], folder / "it")
        for options in ([], ["--overwrite"]):
            code, err = command(kind, found, *options)
            assert code == 2
            assert "and stays as it is: name another folder" in err


@row("other files in `recent/`, with `--overwrite`")
def _(kind, command, material, folder):
    if kind == "train":
        found = shutil.copytree(material[0][kind], folder / "it")
        for name in ("thesis.txt", "best.safetensors"):
            (found / "recent" / name).write_text("mine")
        assert command(kind, found, "--overwrite")[0] == 0
        for name in ("thesis.txt", "best.safetensors"):
            assert (found / "recent" / name).read_text() == "mine"
        assert (found / "recent" / "00000002.safetensors").exists()
        runs.clear(found, "run")
        assert sorted(p.name for p in found.rglob("*")) == [
            "best.safetensors",
            "recent",
            "thesis.txt",
        ]


@row("a link under the name `recent` or `shards`")
def _(kind, command, material, folder):
    if kind in ("train", "demo"):
        found = shutil.copytree(material[0][kind], folder / "it")
        shutil.rmtree(found / "recent", ignore_errors=True)
        for name in ("recent", "shards"):
            theirs = folder / "other" / name
            theirs.mkdir(parents=True)
            (theirs / "00000001.safetensors").write_text("another run's")
            (found / name).symlink_to(theirs)
            for line in ([], ["--overwrite"]):
                code, err = command(kind, found, *line)
                assert (code, f"{name}: this is a link" in err) == (2, True)
            with pytest.raises(checkpoint.CheckpointError, match="this is a link"):
                runs.locked(found).__enter__()  # as a resumed run does
            assert (theirs / "00000001.safetensors").read_text() == "another run's"
            (found / name).unlink()


@row("a training that is at work")
def _(kind, command, material, folder):
    if kind in ("train", "demo", "export"):
        other = subprocess.Popen(
            [sys.executable, "-c", LOCKS, str(folder / "it")],
            env=os.environ | PATHS,
            stdout=subprocess.PIPE,
        )
        assert other.stdout.readline() == b"locked\n"
        code, err = command(kind, folder / "it", "--overwrite")
        other.kill()
        other.communicate()
        assert code == 2
        assert f"another training is at work there (process {other.pid})" in err or kind == "export"


LOCKS = """
import sys, time, npformer.storage as s
with s.lock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


@row("a training that was killed")
def _(kind, command, material, folder):
    if kind in ("train", "demo"):
        (folder / "it").mkdir()
        (folder / "it" / storage.LOCK).write_text("1\n")
        assert command(kind, folder / "it")[0] == 0
        assert not (folder / "it" / storage.LOCK).exists()


@row("a file, not a folder")
def _(kind, command, material, folder):
    (folder / "it").write_text("mine")
    assert command(kind, folder / "it", "--overwrite")[0] == 2


@pytest.mark.parametrize("what", rows("A folder that is written"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_written(kind, what, command, material, tmp_path):
    CASES[what](kind, command, material, tmp_path)


# --- What is read -----------------------------------------------------------------------------

READERS = {
    "model.safetensors": ["predict", "RUN", "31"],
    "config.json": ["predict", "RUN", "31"],
    "run.json": ["predict", "RUN", "31"],
    "resume.safetensors": ["train", "--resume", "RUN"],
    "trace.json": ["diff", "RUN", "RUN"],
    "trace.safetensors": ["diff", "RUN", "RUN"],
    "manifest.json": ["--check", "RUN"],
    "c.toml": ["train", "sort", "--out", "RUN/new", "--config", "RUN/c.toml"],
    "m.npy": ["mask", "--file", "RUN/m.npy"],
}


def read(folder, name, capsys):
    """The line with which the command refuses that file."""
    line = [word.replace("RUN", str(folder)) for word in READERS[name]]
    code = (kit if name == "manifest.json" else cli.main)(line)
    err = capsys.readouterr().err
    assert code == 2, name
    assert err.count("\n") == 1, err
    return err


@pytest.fixture
def every(material, tmp_path):
    """A folder with everything that is read, all of it right."""
    folder = shutil.copytree(material[0]["train"], tmp_path / "it")
    for kind in ("trace", "dump"):
        shutil.copytree(material[0][kind], folder, dirs_exist_ok=True)
    checkpoint.save_tensors(folder / "resume.safetensors", {"x": np.ones(3)}, {"backend": "numpy"})
    (folder / "c.toml").write_text(SMALL)
    np.save(folder / "m.npy", np.tri(3, dtype=bool))
    return folder


@row("a FIFO, a device, a socket or a folder")
def _(folder, name, capsys):
    path = folder / name
    path.unlink()
    os.mkfifo(path)
    assert f"{path}: this is a FIFO, not a file" in read(folder, name, capsys)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert f"{path}: this is a device, not a file" in read(folder, name, capsys)
    path.unlink()
    path.mkdir()
    assert f"{path}: this is a folder, not a file" in read(folder, name, capsys)


@row("something that may not be read")
def _(folder, name, capsys):
    opened = os.open

    def forbidding(path, *rest, **more):
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", forbidding)
        assert f"{folder / name}: Permission denied" in read(folder, name, capsys)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    assert f"{folder / name}: Too many levels of" in read(folder, name, capsys)


@row("a text larger than 16 MiB, a `--config` larger than 64 KiB")
def _(folder, name, capsys):
    if not name.endswith((".safetensors", ".npy")):
        os.truncate(folder / name, storage.LARGEST + 1)
        assert re.search(rf"{name}: larger than [\d.]+ MiB", read(folder, name, capsys))


@row("weights or a state with a flipped bit")
def _(folder, name, capsys):
    if name.endswith(".safetensors"):
        raw = bytearray((folder / name).read_bytes())
        raw[-3] ^= 4
        (folder / name).write_bytes(raw)
        assert f"{name}: damaged: its checksum is crc32:" in read(folder, name, capsys)


@row("weights without a checksum")
def _(folder, name, capsys):
    if name == "model.safetensors":
        tensors = checkpoint.load(folder)[1]
        checkpoint.save_tensors(folder / name, tensors, None)
        assert cli.main(["predict", str(folder), "31"]) == 0


@row("a config that asks for more than its file has")
def _(folder, name, capsys):
    if name == "config.json":
        text = (folder / name).read_text()
        _, tensors = checkpoint.load(folder)
        for old, new, said in (
            ('"d_ff": 8', '"d_ff": 60000000', "its config makes 2,040,001,285 numbers in 2 layers"),
            ('"max_len": 12', '"max_len": 30000000', "max_len=30000000 is too much for a model of"),
        ):
            assert old in text
            (folder / name).write_text(text.replace(old, new))
            checkpoint.save_tensors(folder / "model.safetensors", tensors, None)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert said in read(folder, name, capsys)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000


@row("a pickle")
def _(folder, name, capsys):
    """In test_unpickled.py."""


@pytest.mark.parametrize("what", rows("What is read"))
@pytest.mark.parametrize("name", READERS)
def test_what_is_read(name, what, every, capsys):
    capsys.readouterr()
    CASES[what](every, name, capsys)


def test_every_test_here_is_of_a_row():
    headings = ("A file that is written", "A folder that is written", "What is read")
    assert {what for heading in headings for what in rows(heading)} == set(CASES)
