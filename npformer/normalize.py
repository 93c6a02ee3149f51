"""LayerNorm's relatives: one normalisation, over other axes, each with its chain rule.

All of them centre some numbers, divide by their standard deviation, and give every channel a
weight and a bias of its own.  They differ in which numbers share a mean and a variance:

    ops.layer_norm   x (..., C)      those of one row
    rms_norm         x (..., C)      those of one row, and no mean is taken away
    batch_norm       x (B, C, ...)   those of one channel, in the whole batch
    instance_norm    x (B, C, ...)   those of one channel of one sample
    group_norm       x (B, C, ...)   those of C / G channels of one sample

The Transformer uses none but ops.layer_norm: `normalize` over the last axis, times weight, plus
bias, written out for speed.  What is here is here to be compared with it.

Convention, promises and letters are those of ops.py; G is the number of groups, and the `...`
behind a channel are places: none, the positions of a sequence, or height and width of an image.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import DTypeLike

from npformer.ops import Array, Forward, _check_floats, unbroadcast
from npformer.options import integer, not_negative, probability


def normalize(
    x: Array, axes: int | tuple[int, ...], eps: float = 1e-5, centre: bool = True
) -> Forward:
    """y = (x - mean) / √(var + eps), with the mean and the biased variance over `axes`.

    x (...)   ->   y (...)          centre=False takes no mean away: y = x / √(mean(x²) + eps)
    """
    axes, eps = _check_axes(x, axes), not_negative("eps", eps)
    y = x - x.mean(axis=axes, keepdims=True) if centre else x
    variance = np.square(y).mean(axis=axes, keepdims=True)  # centred first: nothing cancels
    rstd = (variance + eps) ** -0.5
    y = y * rstd

    def backward(dy):
        # x reaches y by three paths: directly, through the variance and through the mean.  The
        # mean inside the variance is no fourth one: deviations from a mean sum to 0.
        dx = dy - y * (dy * y).mean(axis=axes, keepdims=True)
        if centre:
            dx -= dy.mean(axis=axes, keepdims=True)
        dx *= rstd
        return dx

    return y, backward


def scale_and_shift(normalized: Forward, weight: Array, bias: Array) -> Forward:
    """y = weight * xhat + bias by channel, and backward through the op that made xhat as well.

    xhat (B, C, ...)   weight, bias (C,)   ->   y (B, C, ...)
    """
    xhat, backward_normalize = normalized
    shape = _per_channel(xhat)
    w = weight.reshape(shape)
    y = w * xhat
    y += bias.reshape(shape)

    def backward(dy):
        dweight, dbias = unbroadcast(dy * xhat, w.shape), unbroadcast(dy, w.shape)  # (C, 1, ...)
        return backward_normalize(dy * w), dweight.reshape(-1), dbias.reshape(-1)

    return y, backward


def _per_channel(x: Array) -> tuple[int, ...]:
    """The shape in which a (C,) stands below axis 1 of x (B, C, ...): (C, 1, ...)."""
    return (x.shape[1], *[1] * (x.ndim - 2))


# --- Over the batch ---------------------------------------------------------------------------


@dataclass
class Running:
    """What batch_norm remembers of its training, to normalise by later.   mean, variance (C,)"""

    mean: Array
    variance: Array

    @classmethod
    def start(cls, n_channels: int, dtype: DTypeLike = np.float32) -> "Running":
        return cls(np.zeros(n_channels, dtype), np.ones(n_channels, dtype))

    def step(self, x: Array, momentum: float) -> None:
        """The share `momentum` of the way to the statistics of this batch.   x (B, C, ...)"""
        axes = (0, *range(2, x.ndim))
        variance = x.var(axis=axes, ddof=1)  # unbiased, as torch keeps it; `normalize`'s is biased
        self.mean = (1 - momentum) * self.mean + momentum * x.mean(axis=axes)
        self.variance = (1 - momentum) * self.variance + momentum * variance

    def normalize(self, x: Array, eps: float) -> Forward:
        """y = (x - mean) / √(var + eps), by what is remembered.   x, y (B, C, ...)"""
        shape = _per_channel(x)
        rstd = (self.variance.reshape(shape) + eps) ** -0.5
        y = (x - self.mean.reshape(shape)) * rstd

        def backward(dy):
            return dy * rstd  # of the three paths the direct one: the statistics are constants

        return y, backward


def batch_norm(
    x: Array,
    weight: Array,
    bias: Array,
    running: Running | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Forward:
    """Each channel over the batch and its places   [Ioffe and Szegedy 2015, algorithm 1].

    x (B, C, ...)   weight, bias (C,)   ->   y (B, C, ...)

    In training by the statistics of this batch, towards which `running` then takes a step: its
    two arrays are replaced, not written to.  Otherwise by `running`.
    """
    _check_channels("batch_norm", x, weight, bias, running)
    momentum, eps = probability("momentum", momentum), not_negative("eps", eps)
    if not training:
        if running is None:
            raise ValueError("batch_norm: training=False needs running statistics, got None")
        return scale_and_shift(running.normalize(x, eps), weight, bias)
    axes = (0, *range(2, x.ndim))
    _check_several("batch_norm", x, axes)
    if running is not None:
        running.step(x, momentum)
    return scale_and_shift(normalize(x, axes, eps), weight, bias)


# --- Within a sample --------------------------------------------------------------------------


def instance_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Forward:
    """Each channel of each sample over its places   [Ulyanov et al. 2016].

    x (B, C, ...)   weight, bias (C,)   ->   y (B, C, ...)
    """
    _check_channels("instance_norm", x, weight, bias)
    axes = tuple(range(2, x.ndim))
    _check_several("instance_norm", x, axes)
    return scale_and_shift(normalize(x, axes, eps), weight, bias)


def group_norm(x: Array, n_groups: int, weight: Array, bias: Array, eps: float = 1e-5) -> Forward:
    """C / G neighbouring channels of each sample, with all their places   [Wu and He 2018].

    x (B, C, ...)   weight, bias (C,)   ->   y (B, C, ...)

    C groups are instance_norm; one group takes a whole sample at once.
    """
    _check_channels("group_norm", x, weight, bias)
    shape, (B, C, *places) = x.shape, x.shape
    if integer("group_norm: n_groups", n_groups) < 1 or C % n_groups:
        raise ValueError(f"group_norm: n_groups must divide C = {C}, got {n_groups}")
    grouped = (B, n_groups, C // n_groups, *places)
    xhat, backward_groups = normalize(x.reshape(grouped), tuple(range(2, len(grouped))), eps)

    def backward_normalize(dxhat):
        return backward_groups(dxhat.reshape(grouped)).reshape(shape)

    return scale_and_shift((xhat.reshape(shape), backward_normalize), weight, bias)


def rms_norm(x: Array, weight: Array, eps: float = 1e-5) -> Forward:
    """y = weight * x / √(mean(x²) + eps) over the last axis   [Zhang and Sennrich 2019].

    x (..., C)   weight (C,)   ->   y (..., C)          torch's eps, unless given, is the dtype's
    """
    _check_floats("rms_norm", x=x, weight=weight)
    if x.ndim == 0 or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"rms_norm: x must be (..., C) and weight (C,), got shapes {x.shape} and {weight.shape}"
        )
    xhat, backward_normalize = normalize(x, -1, eps, centre=False)
    y = xhat * weight

    def backward(dy):
        return backward_normalize(dy * weight), unbroadcast(dy * xhat, weight.shape)

    return y, backward


# --- At the entrance --------------------------------------------------------------------------


def _check_axes(x: Array, axes: int | tuple[int, ...]) -> tuple[int, ...]:
    """They are there, each of them once, and hold something."""
    _check_floats("normalize", x=x)
    found = normalize_axis_tuple(axes, x.ndim, "normalize")
    if not found or 0 in [x.shape[axis] for axis in found]:
        raise ValueError(f"normalize: nothing to normalise over axes {axes} of shape {x.shape}")
    return found


def _check_channels(
    op: str, x: Array, weight: Array, bias: Array, running: Running | None = None
) -> None:
    kept = {"weight": weight, "bias": bias}
    if running is not None:
        kept |= {"running mean": running.mean, "running variance": running.variance}
    _check_floats(op, x=x, **kept)
    if x.ndim < 2 or {array.shape for array in kept.values()} != {x.shape[1:2]}:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in kept.items())
        raise ValueError(
            f"{op}: x must be (B, C, ...) and the rest (C,), got x {x.shape}, {shapes}"
        )


def _check_several(op: str, x: Array, axes: tuple[int, ...]) -> None:
    n = math.prod(x.shape[axis] for axis in axes)
    if n < 2:
        raise ValueError(f"{op}: a variance takes 2 numbers or more, x {x.shape} has {n} for each")
