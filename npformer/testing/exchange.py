"""The cases as files, for programs that are not Python: --dump DIR writes them, --check DIR scores.

    DIR/manifest.json              the cases: operation, options, names, shapes, dtypes
    DIR/cases/NAME.safetensors     the arrays of one case; expected.*, the answer; bound.*, how far
                                   each entry may be off
    DIR/answers/NAME.safetensors   what the other program writes: the outputs and, if it has them,
                                   the gradients as d.*

docs/testing-kit.md describes both files for whoever has no safetensors library.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from npformer import checkpoint, runs
from npformer.config import TransformerConfig
from npformer.testing.cases import LEVELS, Case
from npformer.testing.judge import Verdict, judge

Array = np.ndarray
FORMAT_VERSION = 1
MOST = 1 << 20  # of a number among the options, where a size is made of it


def dump(folder: Path, cases: list[Case], overwrite: bool = False) -> None:
    """Write every case and the manifest.  Raises ValueError where there is a dump already."""
    runs.claim(folder, "cases", overwrite)
    runs.clear(folder, "cases")
    with checkpoint.blame(folder):
        (folder / "answers").mkdir(parents=True, exist_ok=True)
    entries = []
    for case in cases:
        expected = {f"expected.{name}": x for name, x in case.expected.items()}
        bounds = {f"bound.{name}": _full(case, name) for name in case.expected}
        tensors = case.arrays | expected | bounds
        # Without metadata: others read them with thirty lines of their own
        checkpoint.save_tensors(folder / "cases" / f"{case.name}.safetensors", tensors, None)
        entries.append(_entry(case) | {"checksum": checkpoint.checksum(tensors, {})})
    manifest = {"format_version": FORMAT_VERSION, "checksum": _checksum(entries), "cases": entries}
    checkpoint.save_json(folder / "manifest.json", manifest)


def _checksum(entries: Any) -> str:
    return f"crc32:{zlib.crc32(json.dumps(entries).encode()):08x}"


def _full(case: Case, name: str) -> Array:
    """The bound of each entry, so that nobody has to broadcast."""
    return np.broadcast_to(np.asarray(case.bounds[name], np.float64), case.expected[name].shape)


def _entry(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "level": case.level,
        "op": case.op,
        "dtype": case.dtype,
        "options": case.options,
        "arrays": {name: _described(x) for name, x in case.arrays.items()},
        "expected": {name: list(x.shape) for name, x in case.expected.items()},
    }


def _described(x: Array) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def load(folder: Path) -> list[Case]:
    """The cases of a dump.  Raises ValueError, with the path and what is wrong there."""
    path = folder / "manifest.json"
    if folder.is_dir() and not os.path.lexists(path):
        raise ValueError(f"{path}: no such file; --dump writes it")
    manifest = checkpoint.load_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("cases"), list):
        raise ValueError(f"{path}: not a manifest of cases")
    version, entries = manifest.get("format_version"), manifest["cases"]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {version!r}, this program reads {FORMAT_VERSION}"
        )
    if manifest.get("checksum") not in (None, _checksum(entries)):
        raise ValueError(f"{path}: changed since it was written, by its checksum")
    with checkpoint.blame(path):
        return [_case(folder, _checked(entry)) for entry in entries]


def _checked(entry: Any) -> dict[str, Any]:
    """What is said of a case, of the types that it has when we write it."""
    kinds = {"name": str, "level": str, "op": str, "dtype": str}
    kinds |= {"options": dict, "arrays": dict, "expected": dict}
    if not isinstance(entry, dict) or not set(kinds) <= set(entry) <= {*kinds, "checksum"}:
        raise ValueError(f"a case has {', '.join(kinds)}")
    for key, kind in kinds.items():
        if not isinstance(entry[key], kind):
            raise ValueError(f"the {key} of a case is {checkpoint.shortened(entry[key])}")
    if not runs.CASE.fullmatch(f"{entry['name']}.safetensors"):
        raise ValueError(f"a case is called {checkpoint.shortened(entry['name'])}")
    if entry["level"] not in LEVELS or entry["dtype"] not in ("float32", "float64"):
        raise ValueError(f"{entry['name']}: unknown level or dtype")
    return entry


def _case(folder: Path, entry: dict[str, Any]) -> Case:
    path = folder / "cases" / f"{entry['name']}.safetensors"
    tensors, _ = checkpoint.load_tensors(path)
    if entry.get("checksum") not in (None, checkpoint.checksum(tensors, {})):
        raise checkpoint.CheckpointError(f"{path}: damaged, its checksum is not the manifest's")
    wanted = list(entry["arrays"])
    wanted += [f"{kind}.{name}" for kind in ("expected", "bound") for name in entry["expected"]]
    if missing := [name for name in wanted if name not in tensors]:
        raise checkpoint.CheckpointError(f"{path}: lacks {checkpoint.shortened(missing[0])}")

    def part(prefix: str) -> dict[str, Array]:  # in the manifest's order: backward's
        return {name: tensors[f"{prefix}.{name}"] for name in entry["expected"]}

    arrays, options = {name: tensors[name] for name in entry["arrays"]}, entry["options"]
    expected, bounds = part("expected"), part("bound")
    for name, x in expected.items():
        if bounds[name].shape != x.shape or bounds[name].dtype != np.float64:
            raise checkpoint.CheckpointError(f"{path}: bound.{name} is not of expected.{name}")
    _check_sizes(entry["name"], options, arrays, expected)
    kind = (entry["name"], entry["level"], entry["op"], entry["dtype"])
    return Case(*kind, arrays, options, expected, bounds)


def _check_sizes(name: str, options: Any, arrays: Any, expected: Any) -> None:
    """What is computed of the options, to explain a wrong answer, is not larger than the arrays."""
    if any(abs(n) > MOST for n in _integers(options)):
        raise ValueError(f"{name}: an option beyond {MOST:,}")
    if "config" in options:
        config = TransformerConfig(**options["config"])
        checkpoint.check_size(config, [list(x.shape) for x in arrays.values()])
    if "max_len" in options and options["max_len"] > max(
        math.prod(x.shape) for x in expected.values()
    ):
        raise ValueError(f"{name}: max_len is {options['max_len']}, and no answer is that long")


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _integers(each)


def check(folder: Path) -> list[Verdict]:
    """Score the answers that are there; a case without one is skipped."""
    cases = load(folder)
    known = {f"{case.name}.safetensors" for case in cases}
    for path in sorted((folder / "answers").glob("*")):
        if path.name not in known:
            raise ValueError(f"{path}: there is no such case; an answer is called like its case")
    return [_verdict(folder, case) for case in cases]


def _verdict(folder: Path, case: Case) -> Verdict:
    path = folder / "answers" / f"{case.name}.safetensors"
    if not path.exists():
        return Verdict(case, "skipped", "no answer")
    try:
        return judge(case, checkpoint.load_tensors(path)[0])
    except ValueError as error:
        return Verdict(case, "failed", str(error))
