"""Models on disk: exact in both twins, valid by the format's own rules, whole whatever happens."""

import contextlib
import errno
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import npformer
import torchformer
from npformer import checkpoint
from npformer.checkpoint import CONFIG, MODEL, CheckpointError
from npformer.testing.strategies import layouts

SMALL = npformer.TransformerConfig(
    11, 9, d_model=6, n_heads=2, d_ff=7, n_encoder_layers=1, n_decoder_layers=1, max_len=9
)
OTHER = replace(SMALL, d_ff=8)
LOADERS = {"npformer": npformer.Transformer.load, "torchformer": torchformer.Transformer.load}
each_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=list(LOADERS))


def make(config=SMALL, seed=0, dtype=np.float32):
    return npformer.Transformer(config, np.random.default_rng(seed), dtype)


def assert_same_bits(actual, expected):
    assert list(actual) == list(expected)
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        assert actual[name].shape == x.shape, name
        assert actual[name].tobytes() == x.tobytes(), name


def numbers(model):
    """The state of either twin as arrays."""
    return {name: np.asarray(x) for name, x in model.state_dict().items()}


# --- The format, as its authors describe it: written and read here without any library --------

DTYPES = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U64": np.uint64,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def pack(header, data=b""):
    """A file: the header's length in 8 bytes, the header as JSON, the numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def unpack(raw):
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def read(raw):
    """The tensors and the metadata of a file that is valid; AssertionError for one that is not."""
    (n,) = struct.unpack("<Q", raw[:8])
    assert raw[8:9] == b"{"
    assert 8 + n <= len(raw)
    header, data = unpack(raw)
    metadata = header.pop("__metadata__", {})
    assert all(isinstance(x, str) for x in metadata.values())
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        assert set(entry) == {"dtype", "shape", "data_offsets"}
        start, stop = entry["data_offsets"]
        dtype = np.dtype(DTYPES[entry["dtype"]])
        assert start == end, "a hole or an overlap"
        assert stop - start == math.prod(entry["shape"]) * dtype.itemsize
        x = np.frombuffer(data[start:stop], dtype.newbyteorder("<"))
        tensors[name], end = x.astype(dtype).reshape(entry["shape"]), stop
    assert end == len(data), "bytes that belong to nothing"
    return tensors, metadata


def write(tensors, metadata=None):
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, x in tensors.items():
        offsets = [len(data), len(data) + x.nbytes]
        entry = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        header[name], data = entry, data + x.tobytes()
    return pack(header, data)


@st.composite
def any_tensors(draw):
    """Arrays of every dtype, rank and layout, NaN and infinity, nothing and everything."""
    names = draw(st.lists(st.text("abc.é0", min_size=1), unique=True, min_size=1, max_size=4))
    tensors = {}
    for name in names:
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        x = draw(hnp.arrays(draw(st.sampled_from(list(DTYPES.values()))), shape))
        tensors[name] = draw(layouts(x))
    return tensors


@given(any_tensors(), st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=2))
def test_every_tensor_is_written_and_read_bit_for_bit(tensors, metadata):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        checkpoint.save_tensors(path, tensors, metadata)
        raw = path.read_bytes()
        ours, found = checkpoint.load_tensors(path)
        assert os.listdir(folder) == ["x.safetensors"]
    assert found == metadata
    by_the_rules, found = read(raw)
    assert found == metadata | {"checksum": checkpoint.checksum(tensors, metadata)}
    for read_back in (ours, by_the_rules, safetensors.numpy.load(raw)):
        assert_same_bits({name: read_back[name] for name in tensors}, tensors)
    for name, x in safetensors.torch.load(raw).items():
        assert x.numpy().tobytes() == tensors[name].tobytes(), name


@given(any_tensors())
def test_what_another_program_wrote_is_read(tensors):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(write(tensors))
        ours, metadata = checkpoint.load_tensors(path)
    assert metadata == {}
    assert_same_bits({name: ours[name] for name in tensors}, tensors)


# --- A model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_both_twins_write_the_same_bytes_and_read_the_same_numbers(tmp_path, name):
    model = make(dtype=getattr(np, name))
    model.save(tmp_path / "a")
    dtype = getattr(torch, name)
    torchformer.Transformer.load(tmp_path / "a", dtype=dtype).save(tmp_path / "b")
    for file in (CONFIG, MODEL):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(os.listdir(tmp_path / "b")) == [CONFIG, MODEL]
    tensors, metadata = read((tmp_path / "b" / MODEL).read_bytes())
    assert metadata.pop("checksum") == checkpoint.checksum(tensors, metadata)
    assert metadata == {"config": (tmp_path / "b" / CONFIG).read_text()}
    expected = model.state_dict()
    assert_same_bits({name: tensors[name] for name in expected}, expected)
    for other in (
        npformer.Transformer.load(tmp_path / "b", dtype=getattr(np, name)),
        torchformer.Transformer.load(tmp_path / "a", dtype=dtype),
    ):
        assert other.config == SMALL
        assert_same_bits(numbers(other), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_the_torch_twin_comes_back_exactly(tmp_path, dtype):
    twin = torchformer.Transformer(SMALL, np.random.default_rng(0), dtype)
    with torch.no_grad():
        twin.head.bias[:2] = torch.tensor([1e30, 1e-30])  # one half's range is not the other's
    twin.save(tmp_path)
    again = torchformer.Transformer.load(tmp_path, dtype=dtype)
    in_numpy = npformer.Transformer.load(tmp_path).state_dict()
    for name, x in twin.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
        np.testing.assert_array_equal(in_numpy[name], x.float().numpy(), err_msg=name)


def test_loading_rounds_to_the_dtype_that_is_asked_for(tmp_path):
    model = make(dtype=np.float64)
    model.save(tmp_path)
    expected = {name: x.astype(np.float32) for name, x in model.state_dict().items()}
    for load in LOADERS.values():
        assert_same_bits(numbers(load(tmp_path)), expected)


def test_the_optimizer_and_the_random_numbers_come_back_as_they_were(tmp_path):
    """Steps with dropout, half of them after a visit to the disk: the same weights, bit for bit."""
    config = replace(SMALL, tie_head=True, attention_dropout=0.3)
    src, tgt = np.array([[3, 4, 5], [6, 7, 0]]), np.array([[1, 3, 4], [1, 5, 0]])

    def train(model, optimizer, rng):
        for _ in range(3):
            logits, backward = model(src, tgt, rng=rng)
            model.zero_grad()
            backward(logits)
            optimizer.step()

    model, rng = make(config), np.random.default_rng(1)
    optimizer = npformer.AdamW(model.parameters(), 0.01)
    train(model, optimizer, rng)
    model.save(tmp_path)
    state = {"rng": json.dumps(rng.bit_generator.state)}
    checkpoint.save_tensors(tmp_path / "optimizer.safetensors", optimizer.state_dict(), state)

    again, rng_again = npformer.Transformer.load(tmp_path), np.random.default_rng()
    optimizer_again = npformer.AdamW(again.parameters(), 0.01)
    arrays, state = checkpoint.load_tensors(tmp_path / "optimizer.safetensors")
    optimizer_again.load_state_dict(arrays)
    rng_again.bit_generator.state = json.loads(state["rng"])
    before = model.state_dict()
    for trained in ((model, optimizer, rng), (again, optimizer_again, rng_again)):
        train(*trained)
    assert_same_bits(again.state_dict(), model.state_dict())
    assert any((x != before[name]).any() for name, x in model.state_dict().items())


@each_loader
def test_without_a_config_inside_the_weights_config_json_is_read(tmp_path, load):
    """As other programs write it: the numbers alone, and config.json beside them."""
    model = make()
    (tmp_path / CONFIG).write_text(SMALL.to_json())
    (tmp_path / MODEL).write_bytes(write(model.state_dict()))
    assert_same_bits(numbers(load(tmp_path)), model.state_dict())
    (tmp_path / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file$"):
        load(tmp_path)


@each_loader
def test_without_config_json_the_config_inside_the_weights_is_read(tmp_path, load):
    model = make()
    model.save(tmp_path)
    (tmp_path / CONFIG).unlink()
    loaded = load(tmp_path)
    assert loaded.config == SMALL
    assert_same_bits(numbers(loaded), model.state_dict())


# --- Whole whatever happens -------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class FailsAt:
    """Does what `original` does until the nth call, and raises at that one."""

    def __init__(self, original, n, error):
        self.original, self.n, self.error = original, n, error

    def __call__(self, *arguments):
        self.n -= 1
        if self.n == 0:
            raise self.error
        return self.original(*arguments)


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["the same model", "another model"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_a_full_disk_leaves_every_byte_as_it_was(tmp_path, monkeypatch, config, nth, error):
    make(SMALL, seed=1).save(tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr(os, "fsync", FailsAt(os.fsync, nth, error))
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        make(config, seed=2).save(tmp_path)
    if expected is CheckpointError:
        assert str(caught.value) == f"{tmp_path / [MODEL, CONFIG][nth - 1]}: {error.strerror}"
    assert files(tmp_path) == before


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["the same model", "another model"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_rename_that_fails_leaves_the_old_model_or_the_new_one(
    tmp_path, monkeypatch, config, nth
):
    old, new = make(SMALL, seed=1), make(config, seed=2)
    old.save(tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr(os, "replace", FailsAt(os.replace, nth, OSError(errno.EIO, "I/O error")))
    with pytest.raises(CheckpointError, match=r": I/O error$"):
        new.save(tmp_path)
    monkeypatch.undo()
    assert set(files(tmp_path)) <= {CONFIG, MODEL}
    assert files(tmp_path) == before or nth == 2 or config != SMALL
    whole = old if nth == 1 else new  # the weights are the first to be renamed
    for load in LOADERS.values():
        assert load(tmp_path).config == whole.config
        assert_same_bits(numbers(load(tmp_path)), whole.state_dict())


@pytest.mark.parametrize("nth", [1, 2])
def test_a_process_that_dies_leaves_the_old_model_or_the_new_one(tmp_path, nth):
    """Not an exception that somebody could clean up after: the end, between two system calls."""
    old, new = make(SMALL, seed=1), make(OTHER, seed=2)
    old.save(tmp_path / "saved")
    new.save(tmp_path / "new")
    code = (
        "import os, sys, npformer\n"
        f"model, rename, left = npformer.Transformer.load('new'), os.replace, [{nth}]\n"
        "def replace(*names):\n"
        "    left[0] -= 1\n"
        "    os._exit(9) if left[0] == 0 else rename(*names)\n"
        "os.replace = replace\n"
        "model.save('saved')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | PATHS)
    assert done.returncode == 9
    whole = old if nth == 1 else new
    for load in LOADERS.values():
        assert_same_bits(numbers(load(tmp_path / "saved")), whole.state_dict())
    new.save(tmp_path / "saved")
    assert_same_bits(numbers(npformer.Transformer.load(tmp_path / "saved")), new.state_dict())


PATHS = {"PYTHONPATH": str(Path(npformer.__file__).parents[1])}


def test_saving_over_another_model_replaces_both_files(tmp_path):
    make(SMALL).save(tmp_path)
    (tmp_path / CONFIG).write_bytes(b"\xff not even text")
    new = make(OTHER)
    new.save(tmp_path)
    assert set(files(tmp_path)) == {CONFIG, MODEL}
    assert npformer.Transformer.load(tmp_path).config == OTHER


def test_numbers_that_the_format_does_not_have_are_refused_before_anything_is_replaced(tmp_path):
    make(SMALL).save(tmp_path)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*object"):
        checkpoint.save(tmp_path, OTHER, {"x": np.array([None])})
    assert files(tmp_path) == before


# --- What is refused, in one line that names the file and the reason --------------------------


def refused(load, folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert isinstance(caught.value, ValueError)
    text = str(caught.value)
    assert text.startswith(str(folder))
    assert "\n" not in text
    return text


def changed(change):
    """The file of a model whose header was tampered with."""

    def damage(raw):
        header, data = unpack(raw)
        first, second = [name for name in header if name != "__metadata__"][:2]
        change(header, first, second)
        return pack(header, data)

    return damage


def with_config(text):
    return changed(lambda header, *_: header["__metadata__"].update(config=text))


def cast(kind, n_bytes):
    """All numbers 0, of a kind that is written in `n_bytes` bytes."""

    def damage(raw):
        header, end = unpack(raw)[0], 0
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = end, end + math.prod(entry["shape"]) * n_bytes
                entry.update(dtype=kind, data_offsets=[start, end])
        return pack(header, bytes(end))

    return damage


REASON = r"model\.safetensors: .{10}"  # in the words of the safetensors library
BROKEN = {
    "truncated numbers": (lambda raw: raw[:-5], REASON),
    "truncated header": (lambda raw: raw[:50], REASON),
    "truncated length": (lambda raw: raw[:5], REASON),
    "empty": (lambda raw: b"", REASON),
    "bytes too many": (lambda raw: raw + b"x", REASON),
    "a header beyond the file": (lambda raw: struct.pack("<Q", len(raw)) + raw[8:], REASON),
    "a header beyond memory": (lambda raw: struct.pack("<Q", 2**63) + raw[8:], REASON),
    "a header that is no JSON": (lambda raw: pack(b"{no json", b""), REASON),
    "a header that is no object": (lambda raw: pack([]), REASON),
    "a header nested without end": (lambda raw: pack(b'{"a":' * 10**5), REASON),
    "text": (lambda raw: b"these are not the weights you are looking for", REASON),
    "overlapping tensors": (
        changed(lambda h, a, b: h[a].update(data_offsets=h[b]["data_offsets"])),
        REASON,
    ),
    "a hole between tensors": (
        lambda raw: pack(
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
            },
            bytes(12),
        ),
        REASON,
    ),
    "offsets beyond the file": (
        changed(lambda h, a, b: h[a].update(data_offsets=[0, 10**12])),
        REASON,
    ),
    "a shape beyond its numbers": (changed(lambda h, a, b: h[a].update(shape=[10**6])), REASON),
    "a shape beyond 64 bits": (changed(lambda h, a, b: h[a].update(shape=[2**40, 2**40])), REASON),
    "a negative size": (changed(lambda h, a, b: h[a].update(shape=[-1])), REASON),
    "an unknown dtype": (changed(lambda h, a, b: h[a].update(dtype="F7")), "F7"),
    "bfloat16": (cast("BF16", 2), "is BF16, which NumPy does not have$"),
    "float8": (cast("F8_E4M3", 1), "is F8_E4M3, which NumPy does not have$"),
    "integers": (cast("I32", 4), "is int32, weights are floating point$"),
    "complex numbers": (cast("C64", 8), "is complex64, weights are floating point$"),
    "booleans": (cast("BOOL", 1), "is bool, weights are floating point$"),
    "a config inside that is no JSON": (with_config("{"), "not JSON"),
    "a config inside that is nested without end": (with_config("[" * 10**5), "not JSON"),
    "a config inside that no model has": (
        with_config(SMALL.to_json().replace('"n_heads": 2', '"n_heads": 4')),
        "d_model=6 is not a multiple of n_heads=4",
    ),
}


@each_loader
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused(tmp_path, what, load):
    damage, message = BROKEN[what]
    make().save(tmp_path)
    raw = (tmp_path / MODEL).read_bytes()
    (tmp_path / MODEL).write_bytes(damage(raw))
    text = refused(load, tmp_path, message)
    assert text.startswith(f"{tmp_path / MODEL}: ")
    (tmp_path / MODEL).write_bytes(raw)
    load(tmp_path)  # what was refused is the damage


@settings(max_examples=30)
@given(st.data())
def test_a_file_cut_anywhere_is_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        make().save(folder)
        path = Path(folder) / MODEL
        raw = path.read_bytes()
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        refused(npformer.Transformer.load, Path(folder), REASON)


def test_no_flipped_bit_is_silent_not_even_in_the_name_of_the_checksum(tmp_path):
    path = tmp_path / MODEL
    checkpoint.save_tensors(path, {"x": np.ones(3, np.float32)}, {"config": "{}"})
    good = path.read_bytes()
    for i in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[i // 8] ^= 1 << i % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            print(i, checkpoint.load_tensors(path))


@settings(max_examples=30)
@given(st.data())
def test_a_header_with_any_other_byte_is_refused_or_harmless(data):
    """Nothing but CheckpointError comes out, and what loads has the shapes of its config."""
    with tempfile.TemporaryDirectory() as folder:
        make().save(folder)
        path = Path(folder) / MODEL
        raw = bytearray(path.read_bytes())
        (n,) = struct.unpack("<Q", raw[:8])
        raw[data.draw(st.integers(0, 8 + n - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
        with contextlib.suppress(CheckpointError):
            loaded = npformer.Transformer.load(folder)
            shapes = {name: x.shape for name, x in loaded.state_dict().items()}
            assert shapes == {name: x.shape for name, x in make().state_dict().items()}


class Trap:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


@each_loader
def test_nothing_is_unpickled(tmp_path, load):
    make().save(tmp_path)
    (tmp_path / MODEL).write_bytes(pickle.dumps(Trap()))
    refused(load, tmp_path, REASON)
    torch.save({"weights": Trap()}, tmp_path / MODEL)
    refused(load, tmp_path, REASON)


FOREIGN = {
    "the tensors of something else": (
        {"resnet.conv1": np.ones(3, np.float32)},
        r"lacks 'src_embedding.weight' and \d+ more and has unknown 'resnet.conv1'$",
    ),
    "one too few": (
        {name: x for name, x in make().state_dict().items() if name != "head.bias"},
        r"do not fit this model: lacks 'head\.bias'$",
    ),
    "one too many": (
        make().state_dict() | {"extra": np.ones(1)},
        r"do not fit this model: has unknown 'extra'$",
    ),
    "another shape": (
        make().state_dict() | {"head.bias": np.ones((9, 1), np.float32)},
        r"head\.bias is \(9, 1\), the model's is \(9,\)$",
    ),
    "another width": (
        make(OTHER).state_dict(),
        r"linear1\.weight is \(8, 6\), the model's is \(7, 6\)$",
    ),
}


@each_loader
@pytest.mark.parametrize("what", FOREIGN)
def test_weights_of_something_else_are_refused(tmp_path, what, load):
    tensors, message = FOREIGN[what]
    checkpoint.save(tmp_path, SMALL, tensors)
    refused(load, tmp_path, message)


def edited(old, new):
    text = SMALL.to_json()
    assert old in text
    return text.replace(old, new)


CONFIGS = {
    "of another model": (OTHER.to_json(), "not the configuration that model.safetensors here was"),
    "of another length": (edited('"max_len": 9', '"max_len": 10'), "not the configuration that"),
    "cut": (SMALL.to_json()[:40], "not JSON"),
    "empty": ("", "not JSON"),
    "nested without end": ("[" * 10**5, "not JSON"),
    "a list": ("[1, 2]", "not a JSON object$"),
    "without a version": ("{}", "format_version is None, this program reads 1$"),
    "of another version": (
        edited('"format_version": 1', '"format_version": 2'),
        "format_version is 2, this program reads 1$",
    ),
    "with an unknown key": (edited('"d_ff": 7', '"depth": 7'), "unknown key 'depth'$"),
    "without a vocabulary": (edited('"tgt_vocab_size": 9,', ""), "missing key 'tgt_vocab_size'$"),
    "with a string": (edited('"d_ff": 7', '"d_ff": "7"'), "d_ff must be an integer, got '7'$"),
    "with an endless number": (edited('"d_ff": 7', '"d_ff": 1' + "0" * 5000), "not JSON"),
}


@each_loader
@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_json_that_does_not_belong_is_refused(tmp_path, what, load):
    text, message = CONFIGS[what]
    make().save(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    assert refused(load, tmp_path, message).startswith(f"{tmp_path / CONFIG}: ")


def test_a_config_json_that_is_no_text_is_refused(tmp_path):
    make().save(tmp_path)
    (tmp_path / CONFIG).write_bytes(b"\xff\xfe\x00")
    refused(npformer.Transformer.load, tmp_path, r"config\.json: .*can't decode")


@each_loader
def test_a_place_without_a_checkpoint_is_refused(tmp_path, load):
    refused(load, tmp_path / "nowhere", "nowhere: no such checkpoint folder$")
    refused(load, tmp_path, r"model\.safetensors: no such file$")
    (tmp_path / "file").write_text("")
    refused(load, tmp_path / "file", "file: no such checkpoint folder$")
    refused(load, tmp_path / "file" / "below", "below: no such checkpoint folder$")
    (tmp_path / MODEL).mkdir()
    refused(load, tmp_path, r"model\.safetensors: ")


@pytest.mark.parametrize("twin", ["npformer", "torchformer"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, twin):
    """Below a regular file, where not even root can make a folder."""
    package = {"npformer": npformer, "torchformer": torchformer}[twin]
    model = package.Transformer(SMALL, np.random.default_rng(0))
    (tmp_path / "file").write_text("kept")
    refused(model.save, tmp_path / "file", r"model\.safetensors: File exists$")
    refused(model.save, tmp_path / "file" / "below", r"model\.safetensors: Not a directory$")
    assert files(tmp_path) == {"file": b"kept"}


def test_a_folder_in_the_place_of_a_file_is_refused_and_stays(tmp_path):
    (tmp_path / MODEL).mkdir()
    refused(make().save, tmp_path, r"model\.safetensors: Is a directory$")
    assert os.listdir(tmp_path) == [MODEL]


# --- JSON beside it ---------------------------------------------------------------------------


def test_json_round_trips_and_is_refused_by_name(tmp_path):
    value = {"a": [1, 2.5, None], "é": "ü"}
    path = tmp_path / "deep" / "x.json"
    checkpoint.save_json(path, value)
    assert checkpoint.load_json(path) == value
    for raw in (b"{", b"", b"\xff", b"[" * 10**5):
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"x\.json: not JSON"):
            checkpoint.load_json(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x\.json: no such file$"):
        checkpoint.load_json(path)
