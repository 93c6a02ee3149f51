"""Files: whole under any number of writers, never through a planted link, nothing left behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import npformer
import torchformer
from npformer import checkpoint, runs, storage
from npformer.checkpoint import MODEL, CheckpointError

SMALL = npformer.TransformerConfig(
    11, 9, d_model=6, n_heads=2, d_ff=7, n_encoder_layers=1, n_decoder_layers=1, max_len=9
)
PATHS = {"PYTHONPATH": str(Path(npformer.__file__).parents[1])}
LEFT = ".npformer.0123456789abcdef.part"


def make(config=SMALL, seed=0):
    return npformer.Transformer(config, np.random.default_rng(seed))


def same(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all((a == b).all() for a, b in pairs)


# --- Many writers -----------------------------------------------------------------------------


def test_a_full_disk_has_room_for_a_lock_and_nothing_is_left(tmp_path, monkeypatch):
    """Else the lock that could not be signed would stay, and keep its own process out."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for _ in range(2):
        with storage.lock(tmp_path / "a" / "b"):
            pass
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_goes_while_we_ask_about_it_is_made_anew(tmp_path, monkeypatch):
    """Another writer may remove it, and that is no lack of permission."""
    path = tmp_path / "config.json"
    path.write_bytes(b"old")

    def after_it_went(function):
        def call(name, *rest):
            if str(name) == str(path):
                path.unlink(missing_ok=True)
            return function(name, *rest)

        return call

    for name in ("access", "open"):
        monkeypatch.setattr(os, name, after_it_went(getattr(os, name)))
    storage.write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"new"


def test_a_write_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write(tmp_path / "a" / "b" / "page.html", b"x")
    assert list(tmp_path.iterdir()) == []


def test_eight_threads_save_one_folder_and_readers_see_one_of_the_models_whole(tmp_path):
    """Of different shapes, so that a config of one with the weights of another cannot pass."""
    models = [make(replace(SMALL, d_ff=7 + i), seed=i) for i in range(8)]
    models[0].save(tmp_path)
    failures, done = [], threading.Event()

    def write(model):
        try:
            for _ in range(6):
                model.save(tmp_path)
        except Exception as error:
            failures.append(error)

    def read():
        while not done.is_set():
            try:
                found = npformer.Transformer.load(tmp_path)
                assert same(found, models[found.config.d_ff - 7])
            except Exception as error:
                failures.append(error)

    writers = [threading.Thread(target=write, args=(model,)) for model in models]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not failures
    assert sorted(os.listdir(tmp_path)) == ["config.json", MODEL]
    read()


def test_a_link_planted_under_the_old_temporary_name_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / f".{MODEL}.{os.getpid()}").symlink_to(precious)
    make().save(tmp_path)
    assert precious.read_text() == "kept"


def test_a_link_planted_under_the_very_name_is_not_followed(tmp_path, monkeypatch):
    """Somebody guessed the name: another one is taken."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / f".npformer.{bytes(8).hex()}.part").symlink_to(precious)
    names = iter([bytes(8), bytes(7) + b"1"])
    monkeypatch.setattr(os, "urandom", lambda n: next(names))
    storage.write(tmp_path / "x", b"new")
    assert precious.read_text() == "kept"
    assert (tmp_path / "x").read_bytes() == b"new"


# --- What is left behind ----------------------------------------------------------------------


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    code = (
        "import os, signal, npformer.storage as s\n"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "s.write('x', b'never')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | PATHS)
    assert done.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert storage.PART.fullmatch(left)
    storage.write(tmp_path / "y", b"")
    assert os.listdir(tmp_path) == ["y"]


def test_what_another_is_writing_and_what_is_not_ours_stays(tmp_path):
    writing = storage.stage(tmp_path / "x", b"new")
    (tmp_path / "folder").mkdir()
    (tmp_path / LEFT).symlink_to("folder")  # our name, but a link
    (tmp_path / ".x.1234").write_text("another program's")
    before = sorted(os.listdir(tmp_path))
    storage.sweep(tmp_path)
    storage.write(tmp_path / "y", b"")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "y"])
    writing.put()
    writing.drop()
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_thousand_letters_are_too_many_for_a_name_but_250_are_not(tmp_path):
    storage.write(tmp_path / ("x" * 250), b"")
    with pytest.raises(OSError, match="name too long"):
        storage.write(tmp_path / ("x" * 1000), b"")
    assert os.listdir(tmp_path) == ["x" * 250]


# --- One training at a time -------------------------------------------------------------------


def test_a_folder_is_locked_for_others_and_free_afterwards(tmp_path):
    code = (
        "import sys, npformer.storage as s\n"
        "with s.lock('runs/a'):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | PATHS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"locked\n"
    folder = tmp_path / "runs" / "a"
    with pytest.raises(CheckpointError, match=rf"at work there \(process {other.pid}\)$"):
        runs.locked(folder).__enter__()
    other.kill()  # no matter how it ends
    other.communicate()
    with storage.lock(folder):
        assert os.listdir(folder) == [storage.LOCK]
        with storage.lock(folder):  # who has it may ask again
            pass
        assert os.listdir(folder) == [storage.LOCK]
    assert os.listdir(folder) == []


def test_another_thread_is_refused_and_a_folder_that_stays_empty_goes(tmp_path):
    said = []

    def another():
        try:
            storage.lock(tmp_path / "a" / "b").__enter__()
        except OSError as error:
            said.append(str(error))

    with storage.lock(tmp_path / "a" / "b"):
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
    assert "another training is at work there" in said[0]
    assert os.listdir(tmp_path) == []


# --- Checksums --------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [npformer.Transformer.load, torchformer.Transformer.load])
def test_no_flipped_bit_is_loaded(tmp_path, load):
    """In the numbers; in the header most change what it means, and are refused for that."""
    make().save(tmp_path)
    path = tmp_path / MODEL
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for position in np.random.default_rng(0).integers(start, len(raw), 40):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: its checksum is"):
            load(tmp_path)
    path.write_bytes(raw)
    load(tmp_path)


def test_swapped_names_and_another_config_inside_are_damage_as_well(tmp_path):
    make().save(tmp_path)
    (tmp_path / "config.json").unlink()
    raw = (tmp_path / MODEL).read_bytes()
    for old, new in ((b"q_proj", b"x_proj"), (b'\\"eps\\": 1e-05', b'\\"eps\\": 1e-04')):
        changed = raw.replace(old, new)
        if old == b"q_proj":  # q and k change places
            changed = changed.replace(b"k_proj", b"q_proj").replace(b"x_proj", b"k_proj")
        assert changed != raw
        (tmp_path / MODEL).write_bytes(changed)
        with pytest.raises(CheckpointError, match="damaged"):
            npformer.Transformer.load(tmp_path)


def test_large_files_are_verified_when_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERIFIED", 100)
    path = tmp_path / MODEL
    make().save(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    npformer.Transformer.load(tmp_path)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.verify(path)


# --- Sizes before memory ----------------------------------------------------------------------

HUGE = {
    "max_len": 30_000_000,
    "d_ff": 60_000_000,
    "n_encoder_layers": 200_000_000,
    "n_decoder_layers": 200_000_000,
    "src_vocab_size": 2**31 - 1,
    "tgt_vocab_size": 2**31 - 1,
    "d_model": 2**31 - 2,
}


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("field", HUGE)
@pytest.mark.parametrize("load", [npformer.Transformer.load, torchformer.Transformer.load])
def test_a_small_file_that_asks_for_gigabytes_is_refused(
    tmp_path, monkeypatch, load, field, positions
):
    def made(*_):
        pytest.fail("a model of that size was made")

    model = make(replace(SMALL, positions=positions))
    text = json.dumps(json.loads(model.config.to_json()) | {field: HUGE[field]})
    checkpoint.save_tensors(tmp_path / MODEL, model.state_dict(), {"config": text})
    monkeypatch.setattr(npformer.Transformer, "__init__", made)
    monkeypatch.setattr(torchformer.Transformer, "__init__", made)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "the file has" in str(caught.value) or "max_len=" in str(caught.value)


def test_a_table_of_positions_is_no_larger_than_the_model_or_16_million_numbers():
    """So that whatever is trained can be loaded again."""
    small = {"d_model": 64, "n_encoder_layers": 1, "n_decoder_layers": 1}
    assert npformer.TransformerConfig(9, 9, **small, max_len=2**17)
    with pytest.raises(ValueError, match="max_len=131073 is too much for a model of"):
        npformer.TransformerConfig(9, 9, **small, max_len=2**17 + 1)
    assert npformer.TransformerConfig(9, 9, **small, max_len=2**20, positions="learned")
    assert npformer.TransformerConfig(9, 9, d_model=2048, n_heads=2, max_len=2**15)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_encoder_layers": 0, "n_decoder_layers": 3},
        {"positions": "learned", "tie_head": True},
        {"norm_first": True, "n_encoder_layers": 2},
        {"tgt_vocab_size": 11, "share_embeddings": True, "positions": "learned"},
        {"n_encoder_layers": 0, "positions": "learned", "final_norm": True},
    ],
)
def test_the_number_of_parameters_is_that_of_both_twins(changes):
    config = replace(SMALL, **changes)
    assert config.n_parameters == sum(p.data.size for p in make(config).parameters())
    twin = torchformer.Transformer(config, np.random.default_rng(0))
    assert config.n_parameters == sum(p.numel() for p in twin.parameters())
