"""bench.json: what was measured, on which card.  It is written whole after every section.

{"schema": ..., "environment": {...}, "settings": {...},
 "results": {section: rows, or "failed: ..." or "skipped: ..."},
 "unfinished": {section: the rows that one had found before it was lost},
 "measured": {section: when, by which commit, in how many seconds}}
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError
from npformer import storage

SCHEMA = "npformer-gpu-1"
BENCH = "bench.json"
NO_ROOM = "too little memory"  # why something was skipped, or has failed
Content = dict[str, Any]


def empty() -> Content:
    parts = ("environment", "settings", "results", "unfinished", "measured")
    return {"schema": SCHEMA, **{part: {} for part in parts}}


def load(path: Path) -> Content:
    """Raises BenchmarkError for what is no whole result of this benchmark."""
    try:
        content = json.loads(storage.read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path}: not a result of this benchmark ({error})") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise BenchmarkError(f"{path}: the schema is {schema!r}, this program reads {SCHEMA!r}")
    for part in empty():
        if part != "schema" and not isinstance(content.get(part), dict):
            raise BenchmarkError(f"{path}: not a whole result, it lacks {part!r}")
    if not isinstance(content["environment"].get("device"), str):
        raise BenchmarkError(f"{path}: does not say which card was measured")
    return content


def save_content(path: Path, content: Content) -> None:
    """Whole or not at all, whenever this is interrupted."""
    storage.write(path, (json.dumps(content, indent=1, default=str) + "\n").encode())


def check_same_card(path: Path, content: Content, about: dict[str, Any]) -> None:
    """Figures of two kinds of card, or of two versions of torch, do not stand in one table."""
    for key, what in (("device", ""), ("torch", "torch ")):
        there, here = content["environment"].get(key), about.get(key)
        if there != here:
            raise BenchmarkError(
                f"{path} holds results of {what}{there}, these are of {what}{here}: "
                "give another --out"
            )


def merge(path: Path, content: Content, other: Content) -> None:
    """Take over what `other` has measured.   path: of `content`"""
    if content["environment"]:
        check_same_card(path, content, other["environment"])
    else:
        content["environment"], content["settings"] = other["environment"], other["settings"]
    for name, rows in other["results"].items():
        if is_whole(rows) or not is_whole(content["results"].get(name)):
            forget(content, name)
            content["results"][name] = rows
            for part in ("unfinished", "measured"):
                if name in other[part]:
                    content[part][name] = other[part][name]


def forget(content: Content, name: str) -> None:
    for part in ("results", "unfinished", "measured"):
        content[part].pop(name, None)


def is_whole(rows: Any) -> bool:
    """Measured, and nothing in it has failed; what has no room on a card is not tried again."""
    if not isinstance(rows, dict | list) or not rows:
        return False
    inner = rows.values() if isinstance(rows, dict) else rows
    return not any(isinstance(row, dict) and row.get("failed", NO_ROOM) != NO_ROOM for row in inner)
