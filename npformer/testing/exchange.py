"""The cases as files, for programs that are not Python: --dump DIR writes them, --check DIR scores.

    DIR/manifest.json              the cases: operation, options, names, shapes, dtypes
    DIR/cases/NAME.safetensors     the arrays of one case; expected.*, the answer; bound.*, how far
                                   each entry may be off
    DIR/answers/NAME.safetensors   what the other program writes: the outputs and, if it has them,
                                   the gradients as d.*

docs/testing-kit.md describes both files for whoever has no safetensors library.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from npformer.testing.cases import Case
from npformer.testing.judge import Verdict, judge

Array = np.ndarray
FORMAT_VERSION = 1


def dump(folder: Path, cases: list[Case]) -> None:
    """Write every case and the manifest.  Raises ValueError where there is a dump already."""
    if (folder / "manifest.json").exists():
        raise ValueError(f"{folder} already holds cases; name a new folder")
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    (folder / "answers").mkdir(exist_ok=True)
    for case in cases:
        expected = {f"expected.{name}": x for name, x in case.expected.items()}
        bounds = {f"bound.{name}": _full(case, name) for name in case.expected}
        tensors = {
            name: np.array(x, order="C") for name, x in (case.arrays | expected | bounds).items()
        }
        save_file(tensors, folder / "cases" / f"{case.name}.safetensors")
    manifest = {"format_version": FORMAT_VERSION, "cases": [_entry(case) for case in cases]}
    content = json.dumps(manifest, indent=1) + "\n"
    (folder / "manifest.json").write_text(content, encoding="utf-8")


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
    try:
        manifest = json.loads(path.read_text(encoding="utf-8-sig"))
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version is {version!r}, this program reads {FORMAT_VERSION}"
            )
        return [_case(folder, entry) for entry in manifest["cases"]]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; --dump writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of cases ({error})") from None


def _case(folder: Path, entry: dict[str, Any]) -> Case:
    tensors = _tensors(folder / "cases" / f"{entry['name']}.safetensors")

    def part(prefix: str) -> dict[str, Array]:  # in the manifest's order: backward's
        return {name: tensors[f"{prefix}.{name}"] for name in entry["expected"]}

    arrays = {name: tensors[name] for name in entry["arrays"]}
    kind = (entry["name"], entry["level"], entry["op"], entry["dtype"])
    return Case(*kind, arrays, entry["options"], part("expected"), part("bound"))


def _tensors(path: Path) -> dict[str, Array]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


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
        return judge(case, _tensors(path))
    except ValueError as error:
        return Verdict(case, "failed", str(error))
