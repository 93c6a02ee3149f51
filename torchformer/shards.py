"""What the ranks of a group save to go on from: any number of ranks, by any engine, can read it.

    shards/index.json                    the step, and which of the files belong together
    shards/00000007-00000-of-00002.safetensors      generation, rank: what one rank held

Each rank writes the pieces that it has, and says in the file's metadata where in the whole tensor
they lie; a reader takes from every file what overlaps with its own share.  A new generation lies
beside the old one until index.json, in one rename, says that it counts.

torch.distributed.checkpoint would do the same, but unpickles whatever lies in the folder.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from npformer import checkpoint, runs
from npformer.checkpoint import CheckpointError
from torchformer.transformer import as_numpy

FORMAT_VERSION = 1
DTYPES = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class Piece(NamedTuple):
    """A part of a tensor, and the file that has it."""

    path: Path
    dtype: str
    whole: tuple[int, ...]  # the tensor's shape
    start: tuple[int, ...]  # where in it the part begins
    shape: tuple[int, ...]


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Every rank writes its share; a crash leaves this one or the one before, whole."""
    weights, state = get_state_dict(model, optimizer)
    dist.barrier()  # nobody writes while somebody still reads
    generation = _generation(folder) + 1
    arrays, places = {}, {}
    for name, x in _named(weights, state):
        local, start = _share(x)
        if local.numel() and (dist.get_rank() == 0 or local.shape != x.shape):
            arrays[name] = as_numpy(local)
            places[name] = {"start": list(start), "whole": list(x.shape)}
    path = _path(folder, generation, dist.get_rank(), dist.get_world_size())
    checkpoint.save_tensors(path, arrays, {"places": json.dumps(places)})
    dist.barrier()  # all have written
    if dist.get_rank() == 0:
        index = {"format_version": FORMAT_VERSION, "step": step, "generation": generation}
        checkpoint.save_json(folder / runs.INDEX, index | {"world": dist.get_world_size()})
        for old in runs.listed(folder, runs.SHARD):
            if old.name != runs.INDEX and not old.name.startswith(f"{generation:08d}-"):
                old.unlink()
    dist.barrier()


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Goes on from there, whatever the engine and the number of ranks were; returns the step.

    Raises CheckpointError, with nothing changed, unless names, shapes and dtypes are the model's
    and every number is there once.
    """
    index = read_index(folder)
    weights, state = get_state_dict(model, optimizer)
    wanted = dict(_named(weights, state))
    pieces = _pieces(folder, index)
    with checkpoint.blame(folder):
        _check(wanted, pieces)
    read = []
    for name, x in wanted.items():
        local, start = _share(x)
        read.append((local, _read(name, local, start, pieces[name])))
    for local, array in read:
        local.copy_(torch.from_numpy(array))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return index["step"]


def read_index(folder: Path) -> dict[str, int]:
    """Raises CheckpointError where there is none, or none of ours."""
    path = folder / runs.INDEX
    if not path.exists() and (folder / ".metadata").exists():
        raise CheckpointError(f"{folder}: of an earlier version, which pickled: it is not read")
    index = checkpoint.load_json(path)
    names = ("format_version", "step", "generation", "world")
    if not isinstance(index, dict) or set(index) != set(names):
        raise CheckpointError(f"{path}: not an index of shards")
    for name in names:
        if type(index[name]) is not int or not 0 <= index[name] < 10**9:
            raise CheckpointError(f"{path}: {name} is {checkpoint.shortened(index[name])}")
    if index["format_version"] != FORMAT_VERSION or not 1 <= index["world"] < 10**5:
        raise CheckpointError(f"{path}: not a version, or a number of ranks, that can be read")
    return index


def _generation(folder: Path) -> int:
    return read_index(folder)["generation"] if (folder / runs.INDEX).exists() else 0


def _path(folder: Path, generation: int, rank: int, world: int) -> Path:
    return folder / f"{generation:08d}-{rank:05d}-of-{world:05d}.safetensors"


def _named(weights: Any, state: Any) -> Iterator[tuple[str, Tensor]]:
    """What the next step depends on: the weights, and the optimizer's state of each."""
    for name, x in weights.items():
        yield f"model.{name}", x
    for name, values in state["state"].items():
        for key, x in values.items():
            yield f"optimizer.{name}.{key}", x


def _share(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a tensor, and where in the whole it begins.

    One that is spread along an axis is cut as by torch.chunk: all parts alike but the last.
    """
    start = [0] * x.ndim
    if not isinstance(x, DTensor):
        return x, tuple(start)
    local, (placement,) = x.to_local(), x.placements
    if placement.is_shard():
        n, dim = x.shape[placement.dim], placement.dim  # type: ignore[attr-defined]
        size = -(-n // x.device_mesh.size())
        start[dim] = min(n, size * x.device_mesh.get_local_rank())
        assert local.shape[dim] == min(size, n - start[dim])
    return local, tuple(start)


def _pieces(folder: Path, index: dict[str, int]) -> dict[str, list[Piece]]:
    """Where everything lies, by name; no numbers have been read, except to verify small files."""
    found: dict[str, list[Piece]] = {}
    for rank in range(index["world"]):
        path = _path(folder, index["generation"], rank, index["world"])
        with checkpoint.opened(path) as file:
            checkpoint.verify(path, checkpoint.VERIFIED)
            places = checkpoint.parse_json((file.metadata() or {})["places"])
            if not isinstance(places, dict) or set(places) != set(file.keys()):
                raise ValueError("does not say where its pieces belong")
            for name, place in places.items():
                x = file.get_slice(name)
                shape, dtype = tuple(x.get_shape()), x.get_dtype()
                start, whole = (_integers(place, key, len(shape)) for key in ("start", "whole"))
                found.setdefault(name, []).append(Piece(path, dtype, whole, start, shape))
    return found


def _integers(place: Any, key: str, n: int) -> tuple[int, ...]:
    values = place.get(key) if isinstance(place, dict) else None
    if not isinstance(values, list) or len(values) != n:
        raise ValueError(f"{key} of a piece is not {n} integers")
    if not all(type(x) is int and 0 <= x < 2**40 for x in values):
        raise ValueError(f"{key} of a piece is {checkpoint.shortened(values)}")
    return tuple(values)


def _check(wanted: dict[str, Tensor], pieces: dict[str, list[Piece]]) -> None:
    """Raises ValueError unless the pieces are of these tensors, and have each number once."""
    shapes = {name: tuple(x.shape) for name, x in wanted.items()}
    checkpoint.check_state(shapes, {name: Whole(parts[0].whole) for name, parts in pieces.items()})
    for name, parts in pieces.items():
        for i, p in enumerate(parts):
            if DTYPES.get(p.dtype) != wanted[name].dtype or p.whole != shapes[name]:
                raise ValueError(f"{name} is {p.dtype} {p.whole}, not {wanted[name].dtype}")
            if any(a + n > N for a, n, N in zip(p.start, p.shape, p.whole, strict=True)):
                raise ValueError(f"a piece of {name} lies outside of it")
            if any(_common(p.start, p.shape, q) for q in parts[:i]):
                raise ValueError(f"two pieces of {name} overlap")
        if sum(math.prod(p.shape) for p in parts) != math.prod(shapes[name]):
            raise ValueError(f"a piece of {name} is missing")


class Whole(NamedTuple):
    """All that is asked of a tensor before it is read."""

    shape: tuple[int, ...]


def _common(
    start: tuple[int, ...], shape: tuple[int, ...], p: Piece
) -> list[tuple[int, int]] | None:
    """What a region and a piece have in common, axis by axis from where to where; None: nothing."""
    zipped = zip(start, shape, p.start, p.shape, strict=True)
    found = [(max(a, b), min(a + n, b + m)) for a, n, b, m in zipped]
    return found if all(a < b for a, b in found) else None


def _read(name: str, local: Tensor, start: tuple[int, ...], pieces: list[Piece]) -> np.ndarray:
    """The numbers of this rank's share of a tensor, of whatever files have them."""
    found = np.empty(local.shape, as_numpy(local.flatten()[:0]).dtype)
    for p in pieces:
        if (common := _common(start, tuple(local.shape), p)) is None:
            continue
        here = tuple(slice(a - o, b - o) for (a, b), o in zip(common, start, strict=True))
        there = tuple(slice(a - o, b - o) for (a, b), o in zip(common, p.start, strict=True))
        with checkpoint.opened(p.path) as file:
            found[here] = file.get_slice(name)[there] if there else file.get_tensor(name)
    return found
