"""The numbers that people pass as options: of the right kind and in range, or refused in one line.

    dropout = probability("dropout", dropout)

NumPy's scalars are numbers, and come out as Python's: np.float64(0.1) would turn the float32 array
that it multiplies into float64.  A fraction is no integer, True is no number, and NaN is in no
range.  Both twins ask here, so that both refuse the same.  Standard library only.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Raises ValueError for what is no integer, 5.0 among it, or not in `least` to `most`."""
    value = _plain(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return value


def real(name: str, value: Any) -> float:
    """Any number, NaN and infinity among them."""
    value = _plain(value)
    if not isinstance(value, float | int | Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:  # more than 308 digits
        return math.inf if value == abs(value) else -math.inf


def number(name: str, value: Any) -> float:
    """Neither NaN nor infinite."""
    if not math.isfinite(found := real(name, value)):
        raise ValueError(f"{name} must be finite, got {found}")
    return found


def positive(name: str, value: Any) -> float:
    found = real(name, value)
    if not 0 < found < math.inf:
        raise ValueError(f"{name} must be positive, got {found}")
    return found


def not_negative(name: str, value: Any) -> float:
    found = value if type(value) is float else real(name, value)
    if not 0 <= found < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {found}")
    return found


def limit(name: str, value: Any) -> float:
    """At least 0; infinite, it is none."""
    found = real(name, value)
    if not found >= 0:
        raise ValueError(f"{name} must be at least 0, got {found}")
    return found


def probability(name: str, value: Any) -> float:
    found = value if type(value) is float else real(name, value)
    if not 0 <= found <= 1:
        raise ValueError(f"{name} is a probability, got {found}")
    return found


def pair_of_betas(value: Any) -> tuple[float, float]:
    """Of Adam: how much of its two running means is kept, each in [0, 1)."""
    try:
        beta1, beta2 = (real("beta", beta) for beta in value)
    except (TypeError, ValueError):  # not two, or not numbers
        beta1 = beta2 = math.nan
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be two numbers in [0, 1), got {shown(value)}")
    return beta1, beta2


def flag(name: str, value: Any) -> bool:
    value = _plain(value)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    return value


def choice(name: str, value: Any, among: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {shown(value)}")
    if value not in among:
        listed = f"{', '.join(among[:-1])} or {among[-1]}"
        raise ValueError(f"{name} must be {listed}, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """In a message: not all of it where it is long, as an integer of 400 digits is."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "an endless integer"
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _plain(value: Any) -> Any:
    """A scalar of NumPy or of torch, or an array of no axes, as Python's number."""
    if type(value) is int:  # also the symbol that stands for one while torch compiles
        return value
    return value.item() if getattr(value, "ndim", None) == 0 else value
