"""The learning rate of each step, as plain functions; both twins use them.  Standard library only.

    rate = cosine(1e-3, warmup=400, total=10_000)
    rate(1), rate(2), ...           # steps count from 1, so no step has rate 0 by accident

Rates are in units of the parameter per unit of (normalised) gradient, as the optimizers take them.
"""

import math
from collections.abc import Callable

from npformer.options import integer, not_negative

Schedule = Callable[[int], float]


def constant(rate: float) -> Schedule:
    """The same rate at every step."""
    rate = not_negative("rate", rate)
    return lambda step: rate


def noam(d_model: int, warmup: int, factor: float = 1.0) -> Schedule:
    """factor · C^-½ · min(step^-½, step · warmup^-3/2)   [Vaswani et al. 2017, eq. 3]."""
    d_model, warmup = integer("d_model", d_model, 1), integer("warmup", warmup, 1)
    factor = not_negative("factor", factor)
    return lambda step: factor * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


def inverse_sqrt(peak: float, warmup: int) -> Schedule:
    """Up to `peak` in a straight line over `warmup` steps, then down with 1 / √step.

    noam with its peak named instead of derived from the model width.
    """
    peak, warmup = not_negative("peak", peak), integer("warmup", warmup, 1)
    return lambda step: peak * min(step / warmup, math.sqrt(warmup / step))


def cosine(peak: float, warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """Up to `peak` over `warmup` steps, then down half a cosine, to `floor` just after `total`.

    [Loshchilov and Hutter 2017, eq. 5, one period].  Steps after `total` stay at `floor`.
    """
    peak, floor = not_negative("peak", peak), not_negative("floor", floor)
    warmup, total = integer("warmup", warmup, 1), integer("total", total, 1)

    def rate(step: int) -> float:
        if step <= warmup:
            return peak * step / warmup
        progress = min((step - warmup) / (total + 1 - warmup), 1.0) if total >= warmup else 1.0
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return rate
