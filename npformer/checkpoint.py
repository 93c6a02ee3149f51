"""A model on disk: a folder with config.json and model.safetensors, for both twins and for others.

Every file is written whole beside its place and then renamed into it, so a crash leaves the old
file or the new one, never a part (storage.py).  The config also travels inside model.safetensors,
so that weights and config are replaced in *one* rename; config.json is there to be read by people
and by other programs.  Nothing is unpickled: safetensors is a JSON header and raw numbers.

A checksum of all that is in a safetensors file travels with it, so that a flipped bit is found.

Imports NumPy, safetensors, storage and the config; no model.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from npformer import storage
from npformer.config import TransformerConfig

CONFIG, MODEL = "config.json", "model.safetensors"
VERIFIED = 64 << 20  # bytes of numbers: a larger file's checksum takes time, and `verify`
MODEST, MODEST_LAYERS = 1 << 20, 99  # numbers: so small, it is made to say what does not fit it


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: one line with its path and the reason."""


@contextmanager
def blame(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong inside into a CheckpointError that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except KeyError as error:
        raise CheckpointError(f"{path}: lacks {error}") from None
    except MemoryError as error:
        raise CheckpointError(f"{path}: {str(error) or 'more than there is memory for'}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def shortened(value: Any) -> str:
    """In a message: as Python writes it, and not all of it if it is long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


# --- A model ----------------------------------------------------------------------------------


def save(folder: str | Path, config: TransformerConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Write config.json and model.safetensors into `folder`, which is made if need be."""
    weights, text = Path(folder) / MODEL, config.to_json()
    written = Path(folder) / CONFIG
    data = _to_bytes(weights, tensors, {"config": text})
    with (
        staged(weights, *data) as put_weights,
        staged(written, text.encode()) as put_config,
        storage.in_turn(folder),
    ):
        with blame(written):
            if os.path.isfile(written) and written.read_bytes() != text.encode():
                # Of another model; its weights carry a copy of their own
                os.unlink(os.path.realpath(written))
        put_weights()
        put_config()


def load(folder: str | Path) -> tuple[TransformerConfig, dict[str, np.ndarray]]:
    """The config and the tensors of a checkpoint folder.

    Raises CheckpointError if a file is missing, truncated, damaged or foreign, or the two do not
    agree.  Sizes are compared before there is memory for them.
    """
    folder = Path(folder)
    return steady(folder / MODEL, lambda: _load(folder))


def steady(path: Path, load: Callable[[], Any]) -> Any:
    """What `load` makes of this file and of others that belong to it.

    If somebody saves meanwhile, it may see one of the old and one of the new: then once more.
    """
    for _ in range(99):
        before = _stamp(path)
        try:
            return load()
        except CheckpointError:
            if _stamp(path) == before:
                raise
    return load()


def _stamp(path: Path) -> tuple[int, ...]:
    with suppress(OSError):
        about = os.stat(path)
        return about.st_ino, about.st_mtime_ns, about.st_size
    return ()


def _load(folder: Path) -> tuple[TransformerConfig, dict[str, np.ndarray]]:
    check_folder(folder)
    weights, written = folder / MODEL, folder / CONFIG
    with opened(weights) as file:
        metadata = dict(file.metadata() or {})
        config = None
        if "config" in metadata:  # this copy cannot be out of step with the weights
            config = TransformerConfig.from_json(metadata["config"])
        found = _read_config(written, config)
        if config not in (None, found):
            raise CheckpointError(
                f"{written}: not the configuration that {MODEL} here was saved with"
            )
        config = found
        with blame(folder):
            names = file.keys()
            check_size(config, [file.get_slice(name).get_shape() for name in names])
        tensors = _tensors(file)
        for name, x in tensors.items():
            if not np.issubdtype(x.dtype, np.floating):
                raise ValueError(f"{name} is {x.dtype}, weights are floating point")
        _check_sum(tensors, metadata, VERIFIED)
    return config, tensors


def _read_config(path: Path, inside: TransformerConfig | None) -> TransformerConfig:
    """Where there is none, the one inside the weights."""
    with blame(path):
        try:
            data = storage.read(path)
        except FileNotFoundError:
            if inside is None:
                raise
            return inside
        return TransformerConfig.from_json(data.decode("utf-8-sig"))


def check_folder(folder: str | Path) -> None:
    """Raises CheckpointError, with the true reason, unless it is a folder."""
    with blame(folder):
        try:
            is_folder = os.path.isdir(folder) or not os.stat(folder)
        except (FileNotFoundError, NotADirectoryError):
            is_folder = False
        if not is_folder:
            raise CheckpointError(f"{folder}: no such checkpoint folder")


def check_size(config: TransformerConfig, shapes: list[list[int]]) -> None:
    """Raise ValueError for a config of a model that is larger than tensors of these shapes.

    A config of a few bytes asks for as many gigabytes as it likes, so this comes before any model
    is made.  What is of a modest size is made, and then compared name by name (check_state).
    """
    have, n_layers = sum(map(math.prod, shapes)), config.n_encoder_layers + config.n_decoder_layers
    if config.n_parameters > max(have, MODEST) or n_layers > max(len(shapes), MODEST_LAYERS):
        raise ValueError(
            f"the weights do not fit this model: its config makes {config.n_parameters:,} numbers "
            f"in {n_layers:,} layers, the file has {have:,} in {len(shapes):,} tensors"
        )


def check_state(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]) -> None:
    """Raise ValueError unless `state` has exactly the expected names and shapes."""
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        parts = [
            f"{what} {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for what, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise ValueError(f"the weights do not fit this model: {' and '.join(parts)}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != tuple(shape):
            raise ValueError(
                f"the weights do not fit this model: {name} is {tuple(state[name].shape)}, "
                f"the model's is {tuple(shape)}"
            )


def check_arrays(expected: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError unless `state` has exactly the expected names, shapes and dtypes."""
    check_state({name: x.shape for name, x in expected.items()}, state)
    for name, x in expected.items():
        if state[name].dtype != x.dtype:
            raise ValueError(f"{name} is {state[name].dtype}, here it is {x.dtype}")


def check_finite(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise CheckpointError, naming it, for a tensor that nothing can be computed with."""
    for name, x in tensors.items():
        if not np.isfinite(x).all():
            n = x.size - int(np.isfinite(x).sum())
            raise CheckpointError(
                f"{path}: {n:,} of the {x.size:,} numbers of {name} are NaN or infinite: training "
                "that diverged leaves such weights, and so does a file that is damaged"
            )


def fitting(expected: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `state` in the dtypes of the expected ones; nothing is written anywhere.

    Raises ValueError unless it has exactly their names and shapes, and real numbers throughout.
    """
    found = {}
    for name, value in state.items():
        try:
            found[name] = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:  # ragged, or of a dtype of torch's
            raise ValueError(f"the weights do not fit this model: {name}: {error}") from None
    check_state({name: x.shape for name, x in expected.items()}, found)
    for name, x in expected.items():
        if not np.can_cast(found[name].dtype, x.dtype, "same_kind"):  # complex, text, objects
            raise ValueError(
                f"the weights do not fit this model: {name} is {found[name].dtype}, "
                f"the model's is {x.dtype}"
            )
        found[name] = found[name].astype(x.dtype, copy=False)
    return found


# --- A file -----------------------------------------------------------------------------------


def save_tensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None
) -> None:
    """Write a safetensors file atomically; `metadata` is a flat dict of strings.

    None: not even a checksum, for readers that know of no metadata.
    """
    write_atomically(path, *_to_bytes(path, tensors, metadata))


def _to_bytes(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None
) -> tuple[Any, ...]:
    """In parts; the same content is always the same bytes."""
    from safetensors.numpy import save as to_bytes

    # safetensors writes the memory of an array as it lies: a transposed view would come back wrong.
    # (np.ascontiguousarray would do, but it turns 0-D into 1-D.)
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    with blame(path):
        for name, x in arrays.items():
            if x.dtype.kind not in "fiubc":
                raise ValueError(f"{name} is {x.dtype}, which safetensors does not have")
        if metadata is None:
            return (to_bytes(arrays),)
        marked = {**metadata, "checksum": checksum(arrays, metadata)}
        data = memoryview(to_bytes(arrays, metadata=marked))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    header["__metadata__"] = dict(sorted(marked.items()))  # the library has them in any order
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little"), text, data[start:]


def checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Of names, dtypes, shapes, bytes and metadata.

    crc32 finds every burst of up to 32 wrong bits and all but 2^-32 of other damage, at 4 GB/s: 3
    to 4 times as fast as sha256, which would find no more, because who means harm can compute any.
    """
    found = 0
    for key in sorted(metadata):
        found = zlib.crc32(f"{key}: {metadata[key]}\n".encode(), found)
    for name in sorted(tensors):
        x = np.asarray(tensors[name], order="C")
        found = zlib.crc32(f"{name} {x.dtype} {x.shape}\n".encode(), found)
        found = zlib.crc32(x.data, found)
    return f"crc32:{found:08x}"


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """A safetensors file, of which the header has been read; what goes wrong inside is its."""
    from safetensors import safe_open

    with blame(path):
        storage.check_regular(path)  # safe_open waits for a FIFO, and calls everything missing
        with safe_open(path, framework="numpy") as file:
            yield file


def load_tensors(
    path: str | Path, largest: float = VERIFIED
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Its checksum, if it has one, is verified up to so many bytes.
    """
    with opened(path) as file:
        tensors, metadata = _tensors(file), dict(file.metadata() or {})
        _check_sum(tensors, metadata, largest)
        metadata.pop("checksum", None)
        return tensors, metadata


def _tensors(file: Any) -> dict[str, np.ndarray]:
    tensors = {}
    for name in file.keys():  # noqa: SIM118
        kind = file.get_slice(name).get_dtype()
        if kind.startswith(("BF", "F4", "F6_", "F8")):
            raise ValueError(f"{name} is {kind}, which NumPy does not have")
        tensors[name] = file.get_tensor(name)
    return tensors


def _check_sum(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], largest: float
) -> None:
    """What others wrote, and we before, has none."""
    saved = metadata.get("checksum")
    if saved is None and any(value.startswith("crc32:") for value in metadata.values()):
        raise ValueError("damaged: its checksum goes by another name")
    if saved is None or sum(x.nbytes for x in tensors.values()) > largest:
        return
    found = checksum(tensors, {key: x for key, x in metadata.items() if key != "checksum"})
    if found != saved:
        raise ValueError(f"damaged: its checksum is {found}, and was {saved[:40]}")


def verify(path: str | Path, largest: float = math.inf) -> None:
    """Raises CheckpointError for a safetensors file of up to so many bytes that was damaged."""
    with blame(path):
        if os.path.getsize(path) <= largest:
            load_tensors(path, math.inf)


def to_json(value: Any, **options: Any) -> str:
    """As json.dumps; NaN and infinity, for which JSON has no word, are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # rare, and to look for it takes as long as all the rest
        return json.dumps(plain(value), allow_nan=False, **options)


def save_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """`indent` None: for what is long, several times as fast."""
    write_atomically(path, _json(value, indent))


def _json(value: Any, indent: int | None = 2) -> bytes:
    return (to_json(value, indent=indent) + "\n").encode()


def load_json(path: str | Path) -> Any:
    with blame(path):
        data = storage.read(path)
        try:
            return parse_json(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from None


def parse_json(text: str) -> Any:
    """Raises ValueError also for Infinity, NaN and 1e999, which JSON does not have."""

    def finite(text: str) -> float:
        if not math.isfinite(x := float(text)):
            raise ValueError(f"{text[:40]} is no number")
        return x

    return json.loads(text, parse_float=finite, parse_constant=finite)


def write_atomically(path: str | Path, *data: Any) -> None:
    """Write beside the place, flush to disk, rename into it: a reader sees the old or the new."""
    with staged(path, *data) as put:
        put()


def save_together(
    path: Path, value: Any, arrays_path: Path, arrays: Mapping[str, np.ndarray]
) -> None:
    """A JSON file and the arrays that it describes: both on disk before the first is replaced."""
    data = _to_bytes(arrays_path, arrays, {})
    with (
        staged(arrays_path, *data) as put_arrays,
        staged(path, _json(value)) as put_json,
        storage.in_turn(path.parent),
    ):
        put_arrays()
        put_json()


@contextmanager
def staged(path: str | Path, *data: Any) -> Iterator[Callable[[], None]]:
    """The file is written, beside its place; calling what this yields renames it into it."""
    with blame(path):
        file = storage.stage(path, *data)

    def put() -> None:
        with blame(path):
            file.put()

    try:
        yield put
    finally:
        file.drop()
