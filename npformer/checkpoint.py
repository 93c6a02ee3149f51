"""A model on disk: a folder with config.json and model.safetensors, for both twins and for others.

Every file is written whole beside its place and then renamed into it, so a crash leaves the old
file or the new one, never a part.  The config also travels inside model.safetensors, so that
weights and config are replaced in *one* rename; config.json is there to be read by people and by
other programs.  Nothing is unpickled: safetensors is a JSON header and raw numbers.

Imports NumPy, safetensors and the config; no model.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from npformer.config import TransformerConfig

CONFIG, MODEL = "config.json", "model.safetensors"


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
    except (ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def save(folder: str | Path, config: TransformerConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Write config.json and model.safetensors into `folder`, which is made if need be."""
    weights, text = Path(folder) / MODEL, config.to_json()
    written = Path(folder) / CONFIG
    data = _to_bytes(weights, tensors, {"config": text})
    with staged(weights, data) as put_weights, staged(written, text.encode()) as put_config:
        with blame(written):
            if written.exists() and written.read_bytes() != text.encode():
                written.unlink()  # of another model; its weights carry a copy of their own
        put_weights()
        put_config()


def load(folder: str | Path) -> tuple[TransformerConfig, dict[str, np.ndarray]]:
    """The config and the tensors of a checkpoint folder.

    Raises CheckpointError if a file is missing, truncated, foreign, or the two do not agree.
    """
    folder = Path(folder)
    weights, written = folder / MODEL, folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    tensors, metadata = load_tensors(weights)
    for name, x in tensors.items():
        if not np.issubdtype(x.dtype, np.floating):
            raise CheckpointError(f"{weights}: {name} is {x.dtype}, weights are floating point")
    config = None
    if "config" in metadata:  # this copy cannot be out of step with the weights
        with blame(weights):
            config = TransformerConfig.from_json(metadata["config"])
    if config is None or written.exists():
        with blame(written):
            found = TransformerConfig.from_json(written.read_text(encoding="utf-8"))
            if config not in (None, found):
                raise CheckpointError(
                    f"{written}: not the configuration that {MODEL} here was saved with"
                )
            config = found
    return config, tensors


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


def save_tensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file atomically; `metadata` is a flat dict of strings."""
    write_atomically(path, _to_bytes(path, tensors, metadata))


def _to_bytes(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> bytes:
    from safetensors.numpy import save as to_bytes

    # safetensors writes the memory of an array as it lies: a transposed view would come back wrong.
    # (np.ascontiguousarray would do, but it turns 0-D into 1-D.)
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    with blame(path):
        return to_bytes(arrays, metadata=dict(metadata))


def load_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    from safetensors import safe_open

    tensors = {}
    with blame(path), safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            kind = file.get_slice(name).get_dtype()
            if kind.startswith(("BF", "F4", "F6_", "F8")):
                raise CheckpointError(f"{path}: {name} is {kind}, which NumPy does not have")
            tensors[name] = file.get_tensor(name)
        return tensors, dict(file.metadata() or {})


def save_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """`indent` None: for what is long, five times as fast."""
    write_atomically(path, (json.dumps(value, indent=indent) + "\n").encode())


def load_json(path: str | Path) -> Any:
    with blame(path):
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from None


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write beside the place, flush to disk, rename into it: a reader sees the old or the new."""
    with staged(path, data) as put:
        put()


@contextmanager
def staged(path: str | Path, data: bytes) -> Iterator[Callable[[], None]]:
    """The file is written, beside its place; calling what this yields renames it into it.

    So that what is likely to fail, as on a full disk, has been done before anything is replaced.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")

    def put() -> None:
        with blame(path):
            os.replace(temporary, path)

    try:
        with blame(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        yield put
    finally:
        with suppress(OSError):  # it is in its place, or it was never written
            temporary.unlink()
