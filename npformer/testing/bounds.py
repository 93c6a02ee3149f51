"""Are the bounds right?  Ours against torch's on many examples: how much of each bound was used.

Hypothesis climbs towards the examples that use most of a bound (`hypothesis.target`).  More than 1
is a false alarm: then the derivation, in op_cases.py, forgot something.  Far less than 1 says that
errors rarely add up as badly as they might; it also is how small a mistake may be and stay unseen.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings, target
from hypothesis import seed as seeded
from hypothesis import strategies as st

from npformer.options import integer
from npformer.testing.op_cases import (
    OP_CASES,
    OpCase,
    in_float64,
    torch_value_and_gradients,
)
from npformer.testing.strategies import random_like, seeds

Array = np.ndarray


class Used(NamedTuple):
    """The largest share of a bound that any example used, by tensor."""

    op: str
    dtype: str
    n_examples: int
    shares: dict[str, float]  # "y", "d.x", ...

    @property
    def ok(self) -> bool:
        return max(self.shares.values()) <= 1


def measure(
    n: int, seed: int = 0, dtypes: tuple[str, ...] = ("float32", "float64"), only: tuple = ()
) -> Iterator[Used]:
    """`n` examples of every op, or of those named in `only`, in each dtype."""
    n, seed = integer("examples", n, 1), integer("seed", seed, 0)
    for case in OP_CASES:
        if not only or case.name.split()[0] in only:
            for dtype in dtypes:
                yield _measure(case, np.dtype(dtype), n, seed)


def _measure(case: OpCase, dtype: Any, n: int, seed: int) -> Used:
    shares: dict[str, float] = {}
    n_examples = 0

    @seeded(seed)
    @settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.target],
        suppress_health_check=[*HealthCheck],  # type: ignore[list-item]
    )
    @given(st.data())
    def climb(data):
        nonlocal n_examples
        found = _shares(case, data.draw(case.examples(dtype)), data.draw(seeds), dtype)
        n_examples += 1
        for name, share in found.items():
            shares[name] = max(shares.get(name, 0.0), share)
        target(max(min(share, 1e6) for share in found.values()))

    climb()
    return Used(case.name, dtype.name, n_examples, shares)


def _shares(case: OpCase, example: Any, seed: int, dtype: Any) -> dict[str, float]:
    """The largest error of each tensor, in units of its bound."""
    y, backward = case.op(*example.arrays, **example.options)
    dy = random_like(np.shape(y), dtype, seed)
    gradients = backward(dy)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    expected_y, expected = torch_value_and_gradients(case, example, dy)
    bounds = case.bounds(in_float64(example), dy.astype(np.float64), dtype)
    shares = {"y": _share(y, expected_y, bounds.value)}
    names = _names(case.op)
    for name, dx, e, bound in zip(names, gradients, expected, bounds.gradients, strict=False):
        shares[f"d.{name}"] = _share(dx, e, bound)
    return shares


def _names(op: Callable) -> list[str]:
    import inspect

    return list(inspect.signature(op).parameters)


def _share(actual: Array, expected: Array, bound: Any) -> float:
    error = np.abs(np.subtract(actual, expected, dtype=np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(error == 0, 0.0, error / np.asarray(bound, np.float64))
    return float(np.nan_to_num(share, nan=np.inf).max(initial=0))


def table(found: list[Used]) -> str:
    lines = [f"{'op':<22}{'dtype':<9}{'examples':>9}  most of a bound used"]
    for used in found:
        shares = "  ".join(f"{name} {share:.2f}" for name, share in used.shares.items())
        lines.append(f"{used.op:<22}{used.dtype:<9}{used.n_examples:>9}  {shares}")
    n, alarms = sum(used.n_examples for used in found), sum(not used.ok for used in found)
    lines += ["", f"{n} examples, {alarms or 'no'} false alarm{'s' if alarms > 1 else ''}"]
    return "\n".join(lines)
