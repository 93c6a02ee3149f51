"""What a run of the kit says: a line for each operation, and why it failed where it did."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from npformer import checkpoint
from npformer.testing.cases import LEVELS
from npformer.testing.judge import Verdict
from npformer.testing.variants import explain


class Report:
    """Verdicts by level and operation."""

    def __init__(self, verdicts: Iterable[Verdict] = ()):
        self.verdicts = list(verdicts)

    @property
    def failed(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.status == "failed"]

    @property
    def compared(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.status != "skipped"]

    @property
    def exit_code(self) -> int:
        """0: everything that there is, is right; 1: something is not, or nothing was compared."""
        return 1 if self.failed or not self.compared else 0

    def groups(self) -> dict[tuple[str, str], list[Verdict]]:
        """(level, op) -> its verdicts, lowest level first."""
        found: dict[tuple[str, str], list[Verdict]] = {}
        for verdict in sorted(self.verdicts, key=lambda v: LEVELS.index(v.case.level)):
            found.setdefault((verdict.case.level, verdict.case.op), []).append(verdict)
        return found

    def text(self) -> str:
        lines = [
            f"{'level':<9}{'operation':<22}{'right':>9}  {'gradients':<10}most of a bound used"
        ]
        lines += [_line(*key, group) for key, group in self.groups().items() if _is_there(group)]
        for level in LEVELS:
            absent = [
                op
                for (at, op), group in self.groups().items()
                if at == level and not _is_there(group)
            ]
            lines += [f"{level:<9}skipped: {', '.join(absent)}"] if absent else []
        for group in self.groups().values():
            lines += _why(group)
        lines += ["", self.summary()]
        return "\n".join(lines)

    def summary(self) -> str:
        n, skipped = len(self.compared), len(self.verdicts) - len(self.compared)
        rest = f", {skipped} skipped" if skipped else ""
        if not n:
            return f"nothing was compared{rest}"
        if not self.failed:
            return f"all {n} cases agree{rest}"
        return f"{len(self.failed)} of {n} cases differ{rest}"

    def write_json(self, path: str | Path) -> None:
        content: dict[str, Any] = {
            "summary": self.summary(),
            "you_match_if": {
                f"{level}.{op}": meaning
                for (level, op), group in self.groups().items()
                if (meaning := explained(group))
            },
            "cases": [verdict.as_json() for verdict in self.verdicts],
        }
        checkpoint.save_json(path, content)


def _is_there(group: list[Verdict]) -> bool:
    return any(v.status != "skipped" for v in group)


def _line(level: str, op: str, group: list[Verdict]) -> str:
    asked = [v for v in group if v.status != "skipped"]
    head = f"{level:<9}{op:<22}"
    right = sum(v.status == "ok" for v in asked)
    has_gradients = any(v.has_gradients for v in asked)
    wanted = any(name.startswith("d.") for v in asked for name in v.case.expected)
    gradients = ("yes" if has_gradients else "none") if wanted else ""
    pairs = [(v.worst, v.case.name) for v in asked if v.worst is not None]
    row, name = max(pairs, key=lambda pair: pair[0].tolerances, default=(None, ""))
    used = f"{row.tolerances:.3g}  ({row.name} of {name})" if row and row.tolerances else ""
    notes = [v.note for v in group if v.status == "skipped"]
    some = f"  ({len(notes)} skipped: {notes[0]})" if notes else ""
    return f"{head}{right:>3} of {len(asked):<2}  {gradients:<10}{used}{some}".rstrip()


def _why(group: list[Verdict]) -> list[str]:
    """The first case that failed for each reason, and the convention that explains them."""
    failed = [v for v in group if v.status == "failed"]
    if not failed:
        return []
    first = failed[0]
    lines = ["", f"{first.case.name}: {_question(first)}"]
    lines += ["  " + line for line in first.note.splitlines()]
    if meaning := explained(group):
        lines.append(f"  => {meaning}")
    others = {v.note: v.case.name for v in failed[1:] if v.answer is None and v.note != first.note}
    lines += [f"{name}: {note}" for note, name in others.items()]
    if len(failed) > 1:
        lines.append(f"  also: {', '.join(v.case.name for v in failed[1:])}")
    return lines


def _question(verdict: Verdict) -> str:
    """What was asked, in one line: the shapes and the options that are not long."""
    case = verdict.case
    shapes = [f"{name} {x.shape}" for name, x in case.arrays.items()]
    shown = ", ".join(shapes if len(shapes) <= 6 else [*shapes[:4], f"and {len(shapes) - 4} more"])
    options = {k: v for k, v in case.options.items() if k != "config"}
    return f"{shown}; {options}" if options else shown


def explained(group: list[Verdict]) -> str | None:
    """The convention under which this operation is right, if there is one."""
    answered = [v for v in group if v.answer is not None]
    if not any(v.status == "failed" for v in answered):
        return None
    return explain([v.case for v in answered], [v.answer or {} for v in answered])
