"""Is an answer right?  What is asked of every answer, whoever gives it.

the names        every output is there; no gradient at all, or all of them; nothing else
shape and dtype  those of the expected array
the numbers      within the bound, everywhere (compare.py)
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npformer import compare
from npformer.testing.cases import Case, is_float

Array = np.ndarray


@dataclass
class Verdict:
    """What came of one case."""

    case: Case
    status: str  # "ok", "failed", or "skipped" where the implementation does not have it
    note: str = ""  # why it failed or was skipped
    rows: list[compare.Row] = field(default_factory=list)  # one for each tensor, if there were any
    answer: dict[str, Array] | None = None  # None where there was none to compare

    @property
    def has_gradients(self) -> bool:
        return any(row.name.startswith("d.") for row in self.rows)

    @property
    def worst(self) -> compare.Row | None:
        """The tensor that used most of its bound."""
        return max(self.rows, key=lambda row: row.tolerances, default=None)

    def as_json(self) -> dict[str, Any]:
        case = self.case
        return {
            "case": case.name,
            "level": case.level,
            "op": case.op,
            "options": case.options,
            "shapes": {name: list(x.shape) for name, x in case.arrays.items()},
            "status": self.status,
            "note": self.note,
            "tensors": {
                row.name: {
                    "ok": row.ok,
                    "max_error": _finite(row.max_error),
                    "fraction_of_bound": _finite(row.tolerances),
                }
                for row in self.rows
            },
        }


def _finite(x: float) -> float | str:
    return float(x) if np.isfinite(x) else str(x)  # JSON has neither NaN nor infinity


def judge(case: Case, answer: dict[str, Array]) -> Verdict:
    """Compare an answer with what is expected; gradients only if there are any."""
    expected = case.expected
    if not any(name.startswith("d.") for name in answer):
        expected = {k: x for k, x in expected.items() if not k.startswith("d.")}
    rows = [
        _without_dtype(row, case) for row in compare.compare_tensors(answer, expected, case.bounds)
    ]
    problems = _wrong_names(answer, expected)
    wrong = {k: _wrong_dtype(k, answer[k], expected[k], case) for k in expected if k in answer}
    rows = [
        row._replace(note="\n".join(filter(None, (wrong.get(row.name), row.note)))) for row in rows
    ]
    if not problems and all(row.ok for row in rows):
        return Verdict(case, "ok", rows=rows, answer=answer)
    out = [row for row in rows if not row.ok]
    if len(rows) > 8:  # a model, a block: where in the chain does it begin?
        note = compare.table(rows)
    else:
        note = "\n".join(
            row.note if row.name in row.note else f"{row.name}: {row.note}" for row in out
        )
    return Verdict(case, "failed", "\n".join([*problems, note]), rows, answer)


def _without_dtype(row: compare.Row, case: Case) -> compare.Row:
    """In float32, that expected is float64 is as it should be: no hint."""
    hint = f"\n  hint: the dtypes differ: actual is {case.dtype}, expected float64"
    return row._replace(note=row.note.replace(hint, "")) if case.dtype == "float32" else row


def _wrong_names(answer: dict[str, Array], expected: dict[str, Array]) -> list[str]:
    """Outputs and gradients, in number and by name."""
    problems = []
    for kind in ("output", "gradient"):
        given, wanted = (
            {k for k in x if k.startswith("d.") == (kind == "gradient")} for x in (answer, expected)
        )
        if given != wanted:
            lists = [
                f"{word} {', '.join(sorted(names)[:6])}"
                for word, names in (("missing", wanted - given), ("unknown", given - wanted))
                if names
            ]
            problems.append(f"{len(given)} {kind}s, expected {len(wanted)}: {'; '.join(lists)}")
    return problems


def _wrong_dtype(name: str, actual: Array, expected: Array, case: Case) -> str:
    if is_float(expected):
        return "" if actual.dtype == case.dtype else f"{name} is {actual.dtype}, not {case.dtype}"
    kind = np.integer if np.issubdtype(expected.dtype, np.integer) else expected.dtype
    return "" if np.issubdtype(actual.dtype, kind) else f"{name} is {actual.dtype}, not integers"


def changed(case: Case, first: dict[str, Array], second: dict[str, Array]) -> str:
    """Which tensor two calls with equal inputs disagree about by more than the bound, if any."""
    if first.keys() != second.keys():
        return "two calls with the same inputs return different names"
    for name in first:
        a, b = first[name], second[name]
        if a.shape != b.shape:
            return f"{name} has another shape in a second call with the same inputs"
        if compare.report(name, b, a, case.bounds.get(name, 0.0)):
            return f"not deterministic: {name} differs between two calls with the same inputs"
    return ""
