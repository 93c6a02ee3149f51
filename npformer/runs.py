"""Whose folder is this?  Asked before anything is written into one.

    with locked("runs/sort"):                   nobody else trains there meanwhile
        claim("runs/sort", "run", overwrite)    refuses what is taken; nothing changes
        clear("runs/sort", "run")               removes what an earlier run wrote there

We write into a folder only if the names that we need are free there, or if what has them is what
we wrote ourselves, which `--overwrite` says may go.  Whatever else lies there stays.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from npformer import checkpoint, storage
from npformer.checkpoint import CONFIG, MODEL, CheckpointError
from npformer.options import shown

RUN, HISTORY, RESUME, RECENT = "run.json", "history.json", "resume.safetensors", "recent"
LOSS, CERTIFICATE = "loss.png", "certificate.json"
SHARDS, INDEX = "shards", "index.json"
TRACE, ARRAYS = "trace.json", "trace.safetensors"
MANIFEST = "manifest.json"
ASKED = ("task", "backend", "seed", "recipe")  # what run.json says of every run


class Kind(NamedTuple):
    """What we write into a folder of this kind."""

    what: str
    mark: str  # the file by which we know our own
    is_ours: Callable[[Any], bool]  # asked of its content
    files: tuple[str, ...]
    inside: dict[str, re.Pattern[str]]  # folders, and what the names in them look like


def _is_run(about: Any) -> bool:
    return isinstance(about, dict) and set(ASKED) <= set(about) and about.get("kind") != "export"


def _is_export(about: Any) -> bool:
    return isinstance(about, dict) and set(ASKED) <= set(about) and about.get("kind") == "export"


def _is_list(name: str) -> Callable[[Any], bool]:
    """A list under this name, beside a version: a trace's entries, the kit's cases."""
    return lambda x: isinstance(x, dict) and "format_version" in x and isinstance(x.get(name), list)


SNAPSHOT = re.compile(r"\d{8,}\.safetensors")
SHARD = re.compile(r"\d{8,}-\d{5}-of-\d{5}\.safetensors|index\.json")
CASE = re.compile(r"[a-z]+\.\w+-\d+\.safetensors")
FILES = (CONFIG, MODEL, RUN, CERTIFICATE)
KINDS = {
    "run": Kind(
        "a run",
        RUN,
        _is_run,
        (*FILES, HISTORY, RESUME, LOSS),
        {RECENT: SNAPSHOT, SHARDS: SHARD},
    ),
    "export": Kind("an exported model", RUN, _is_export, FILES, {}),
    "trace": Kind("a trace", TRACE, _is_list("entries"), (TRACE, ARRAYS), {}),
    "cases": Kind("cases", MANIFEST, _is_list("cases"), (MANIFEST,), {"cases": CASE}),
}


def load_run(folder: str | Path) -> dict[str, Any]:
    """run.json of a trained folder: its task, recipe and seed.  Raises CheckpointError."""
    checkpoint.check_folder(folder)
    found = checkpoint.load_json(Path(folder) / RUN)
    if not (_is_run(found) or _is_export(found)):
        raise CheckpointError(f"{Path(folder) / RUN}: does not say what was trained")
    plan = found.get("plan", {})
    for name, is_right in (
        ("task", isinstance(found["task"], str)),
        ("backend", found["backend"] in ("numpy", "torch")),
        ("seed", _is_integer(found["seed"], 0)),
        ("config", isinstance(found.get("config", ""), str)),
        ("recipe", isinstance(found["recipe"], dict)),
        ("threads", found.get("threads") is None or _is_integer(found["threads"], 1)),
        ("precision", found.get("precision") in (None, "float32", "bfloat16")),
        ("compile", isinstance(found.get("compile"), bool | None)),
        ("capture", isinstance(found.get("capture"), bool | None)),
        ("plan", isinstance(plan, dict) and all(map(_is_limit, plan.values()))),
    ):
        if not is_right:
            said = shown(found[name])
            raise CheckpointError(f"{Path(folder) / RUN}: {name} cannot be {said}")
    return found


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_limit(value: Any) -> bool:
    """Of minutes, patience, a score: none, or a number."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def is_demo(folder: str | Path) -> bool:
    """A run by `npformer demo`, which may be typed twice."""
    with suppress(CheckpointError):
        about = load_run(folder)
        return about.get("kind", about.get("preset")) == "demo"  # the first version had no kind
    return False


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """storage.lock.  Raises CheckpointError where another training has it.

    And where recent/ or shards/ is a link: what is in such a folder gets removed in time, and it
    may be another run's.
    """
    with ExitStack() as stack:
        with checkpoint.blame(folder):
            stack.enter_context(storage.lock(folder))
        for path in (Path(folder, name) for name in KINDS["run"].inside):
            if path.is_symlink():
                raise CheckpointError(f"{path}: this is a link, and what it leads to is not ours")
        yield


def claim(folder: str | Path, kind: str, overwrite: bool = False, instead: str = "") -> None:
    """See that what is written into the folder replaces nothing but what we wrote there earlier.

    overwrite   an earlier one of this kind may go: `clear` it when all else is known to be well
    instead     what else to do where there is one: "--resume DIR, "

    Raises ValueError, which says what lies there.
    """
    folder, k = Path(folder), KINDS[kind]
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is there already, and is no folder")
    taken = [name for name in (*k.files, *k.inside) if os.path.lexists(folder / name)]
    if not taken:
        return
    if not _holds(folder, k):
        others = [other.what for other in KINDS.values() if _holds(folder, other)]
        reason = f"{folder} holds {others[0]}" if others else f"{folder / taken[0]} is not ours"
        raise ValueError(f"{reason}, and stays as it is: name another folder")
    if not overwrite:
        raise ValueError(f"{folder} holds {k.what}: {instead}--overwrite, or name another folder")


def _holds(folder: Path, kind: Kind) -> bool:
    with suppress(CheckpointError):
        return kind.is_ours(checkpoint.load_json(folder / kind.mark))
    return False


def clear(folder: str | Path, kind: str) -> None:
    """Removes what we write into a folder of this kind, the mark last, and nothing else."""
    folder, k = Path(folder), KINDS[kind]
    for name, pattern in k.inside.items():
        forget(folder / name, pattern)
    with checkpoint.blame(folder):
        for name in sorted(k.files, key=lambda name: name == k.mark):
            if os.path.isfile(folder / name) or os.path.islink(folder / name):
                os.unlink(folder / name)


def forget(folder: Path, pattern: re.Pattern[str] = SNAPSHOT) -> None:
    """Removes the files of such names and then the folder, unless there is something else in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    storage.sweep(folder)
    with checkpoint.blame(folder):
        for path in listed(folder, pattern):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


def listed(folder: Path, pattern: re.Pattern[str] = SNAPSHOT) -> list[Path]:
    """The files of such names, in order; by default the snapshots of a run."""
    return sorted(
        path for path in folder.glob("*") if pattern.fullmatch(path.name) and path.is_file()
    )
