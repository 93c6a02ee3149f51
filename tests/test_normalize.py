"""BatchNorm, InstanceNorm, GroupNorm and RMSNorm: the contract, the derivative, and torch's."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import npformer.normalize
from npformer import ops
from npformer.normalize import (
    Running,
    batch_norm,
    group_norm,
    instance_norm,
    normalize,
    rms_norm,
)
from npformer.testing import gradient_check
from npformer.testing.conformance import OUTPUT, assert_same
from npformer.testing.strategies import layouts, leading_axes, random_like, seeds, sizes


def layer_norm(x, weight, bias, eps=1e-5):
    """ops.layer_norm as one says it: normalize over the last axis, times weight, plus bias."""
    xhat, backward_normalize = normalize(x, -1, eps)

    def backward(dy):
        dweight, dbias = (ops.unbroadcast(d, weight.shape) for d in (dy * xhat, dy))
        return backward_normalize(dy * weight), dweight, dbias

    return weight * xhat + bias, backward


# --- Each of them -----------------------------------------------------------------------------


@st.composite
def channelled(draw, fewest_places):
    """(B, C, ...), with at least 2 numbers for each mean."""
    B, C, *places = draw(sizes("BCHW", 6))
    return (B + 1, C, *(n + 1 for n in places[: draw(st.integers(fewest_places, 2))]))


@st.composite
def rows(draw):
    return (*draw(leading_axes()), *draw(sizes("C")))


class Norm(NamedTuple):
    """One norm and what torch calls it: both of x, weight, bias if there is one, and eps."""

    ours: Callable[..., ops.Forward]
    torch: Callable[..., torch.Tensor]
    shapes: st.SearchStrategy  # of x
    channels: int = 1  # its axis of them
    parameters: tuple[str, ...] = ("weight", "bias")


def remembered(x):
    """A running mean and variance for x (B, C, ...)."""
    channel = np.arange(x.shape[1], dtype=x.dtype)
    return Running(np.cos(channel), 1 + channel)


def torch_inference(x, weight, bias, eps):
    kept = remembered(x.detach().numpy())
    mean, variance = torch.from_numpy(kept.mean), torch.from_numpy(kept.variance)
    return F.batch_norm(x, mean, variance, weight, bias, eps=eps)


def n_groups(w):
    return next(n for n in (3, 2, 1) if len(w) % n == 0)


NORMS = {
    "batch_norm": Norm(
        batch_norm,
        lambda x, w, b, eps: F.batch_norm(x, None, None, w, b, training=True, eps=eps),
        channelled(0),
    ),
    "batch_norm, not training": Norm(
        lambda x, w, b, **eps: batch_norm(x, w, b, remembered(x), training=False, **eps),
        torch_inference,
        channelled(0),
    ),
    "instance_norm": Norm(
        instance_norm,
        lambda x, w, b, eps: F.instance_norm(x, weight=w, bias=b, eps=eps),
        channelled(1),
    ),
    "group_norm": Norm(
        lambda x, w, b, **eps: group_norm(x, n_groups(w), w, b, **eps),
        lambda x, w, b, eps: F.group_norm(x, n_groups(w), w, b, eps),
        channelled(0),
    ),
    "layer_norm": Norm(
        layer_norm, lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps), rows(), -1
    ),
    "rms_norm": Norm(
        rms_norm, lambda x, w, eps: F.rms_norm(x, w.shape, w, eps), rows(), -1, ("weight",)
    ),
}
each_norm = pytest.mark.parametrize("name", NORMS)
epsilons = st.sampled_from([1e-5, 1e-3, 0.1])


@st.composite
def examples(draw, name):
    """x, weight and bias: read-only, any layout, and x with an offset or a channel of ties."""
    norm = NORMS[name]
    x = np.array(random_like(draw(norm.shapes), np.float64, draw(seeds)))
    x += draw(st.sampled_from([0, 0, 1]))
    if draw(st.booleans()):
        x.swapaxes(0, norm.channels)[-1] = 1
    C = x.shape[norm.channels]
    more = [1 + 0.3 * random_like((C,), np.float64, draw(seeds)) for _ in norm.parameters]
    return tuple(draw(layouts(array)) for array in (x, *more))


def named(name, y, gradients):
    return {"y": y} | dict(zip(("x", *NORMS[name].parameters), gradients, strict=True))


@each_norm
@given(data=st.data())
def test_agrees_with_torch(name, data):
    inputs, eps = data.draw(examples(name)), data.draw(epsilons)
    y, backward = NORMS[name].ours(*inputs, eps=eps)
    dy = random_like(y.shape, np.float64, data.draw(seeds))
    tensors = [torch.tensor(array.copy(), requires_grad=True) for array in inputs]
    expected = NORMS[name].torch(*tensors, eps=eps)
    gradients = torch.autograd.grad(expected, tensors, torch.from_numpy(dy.copy()))
    assert_same(
        name,
        named(name, y, backward(dy)),
        named(name, expected.detach().numpy(), [dx.numpy() for dx in gradients]),
    )


@each_norm
@given(data=st.data())
def test_gradient_is_the_derivative(name, data):
    inputs, eps = data.draw(examples(name)), data.draw(epsilons)
    gradient_check(name, lambda *arrays: NORMS[name].ours(*arrays, eps=eps), *inputs)


@each_norm
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
def test_contract(name, dtype, data):
    """Shapes and dtypes are kept, and nothing is written to: inputs and results are read-only."""
    inputs = tuple(locked(array.astype(dtype)) for array in data.draw(examples(name)))
    y, backward = NORMS[name].ours(*inputs, eps=1e-5)
    dy = random_like(y.shape, dtype, data.draw(seeds))
    NORMS[name].ours(*(array / 2 for array in inputs), eps=1e-5)
    assert (locked(y).shape, y.dtype) == (inputs[0].shape, dtype)
    gradients = [locked(dx) for dx in backward(dy)]
    assert [(dx.shape, dx.dtype) for dx in gradients] == [(a.shape, dtype) for a in inputs]
    for dx, again in zip(gradients, backward(dy), strict=True):
        np.testing.assert_array_equal(dx, again)


def locked(array):
    array.flags.writeable = False
    return array


@given(examples("layer_norm"), epsilons, seeds)
def test_layer_norm_is_normalize_over_the_last_axis(inputs, eps, seed):
    y, backward = layer_norm(*inputs, eps=eps)
    expected, backward_expected = ops.layer_norm(*inputs, eps=eps)
    dy = random_like(y.shape, np.float64, seed)
    found = named("layer_norm", y, backward(dy))
    assert_same("layer_norm", found, named("layer_norm", expected, backward_expected(dy)))


@each_norm
def test_eps_is_1e_5_unless_said_otherwise(name):
    norm = NORMS[name]
    x = random_like((2, 6, 3), np.float64, 0) / 100  # a variance that eps counts beside
    more = [np.ones(x.shape[norm.channels])] * len(norm.parameters)
    np.testing.assert_array_equal(norm.ours(x, *more)[0], norm.ours(x, *more, eps=1e-5)[0])
    assert (norm.ours(x, *more)[0] != norm.ours(x, *more, eps=1e-4)[0]).any()


@given(channelled(1), seeds)
def test_one_group_takes_a_sample_and_c_groups_a_channel(shape, seed):
    x, (_, C, *_) = random_like(shape, np.float64, seed), shape
    ones, zeros = np.ones(C), np.zeros(C)
    whole, _ = normalize(x, tuple(range(1, x.ndim)))
    each, _ = instance_norm(x, ones, zeros)
    np.testing.assert_allclose(group_norm(x, 1, ones, zeros)[0], whole, rtol=0, atol=OUTPUT)
    np.testing.assert_allclose(group_norm(x, C, ones, zeros)[0], each, rtol=0, atol=OUTPUT)


# --- A gradient that forgets a path is noticed ------------------------------------------------

FORGOTTEN = {
    "the mean": ("            dx -= dy.mean(axis=axes, keepdims=True)\n", "            pass\n"),
    "the variance": (" - y * (dy * y).mean(axis=axes, keepdims=True)", " + 0"),
    "rstd": ("        dx *= rstd\n", ""),
}


@pytest.mark.parametrize("path", FORGOTTEN)
def test_a_forgotten_path_is_noticed(path):
    source, (line, instead) = inspect.getsource(normalize), FORGOTTEN[path]
    assert source.count(line) == 1
    namespace = dict(vars(npformer.normalize))
    exec(source.replace(line, instead), namespace)
    wrong = namespace["normalize"]
    x, dy = (random_like((4, 5), np.float64, seed) for seed in (0, 1))
    with pytest.raises(AssertionError, match=r"wrong for x \(4, 5\)"):
        gradient_check("normalize", lambda x: wrong(x, 0), x)
    tensor = torch.tensor(x.copy(), requires_grad=True)
    expected = F.batch_norm(tensor, None, None, training=True)
    (dx,) = torch.autograd.grad(expected, tensor, torch.tensor(dy.copy()))
    y, backward = wrong(x, 0)
    assert_same("normalize", {"y": y}, {"y": expected.detach().numpy()})
    with pytest.raises(AssertionError, match="> x"):
        assert_same("normalize", {"x": backward(dy)}, {"x": dx.numpy()})


# --- Running statistics -----------------------------------------------------------------------


@given(channelled(0), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(1, 4), seeds)
def test_running_statistics_are_those_of_torch(shape, momentum, n_steps, seed):
    B, C, *places = shape
    twin = torch.nn.BatchNorm1d(C, momentum=momentum, dtype=torch.float64)
    running, weight, bias = Running.start(C, np.float64), np.ones(C), np.zeros(C)
    shape = (B, C, math.prod(places)) if places else (B, C)  # BatchNorm1d knows one axis of places
    for i in range(n_steps + 1):
        x = (1 + i) * random_like(shape, np.float64, seed + i) + i
        training = i < n_steps
        y, _ = batch_norm(x, weight, bias, running, training, momentum)
        expected = twin.train(training)(torch.from_numpy(x)).detach().numpy()
        state = twin.state_dict()
        assert_same(
            f"step {i}",
            {"y": y, "mean": running.mean, "variance": running.variance},
            {
                "y": expected,
                "mean": state["running_mean"].numpy(),
                "variance": state["running_var"].numpy(),
            },
            outputs=("y", "mean", "variance"),
        )


def test_a_step_replaces_the_statistics_and_leaves_the_old_ones():
    x, ones = random_like((4, 3), np.float32, 0), np.ones(3, np.float32)
    running = Running.start(3)
    mean, variance = locked(running.mean), locked(running.variance)
    y, _ = batch_norm(x, ones, 0 * ones, running)
    assert running.mean.dtype == running.variance.dtype == np.float32
    assert running.mean.any()
    np.testing.assert_array_equal(mean, 0 * ones)
    np.testing.assert_array_equal(variance, ones)
    np.testing.assert_allclose(running.mean, 0.1 * x.mean(axis=0), rtol=1e-6)  # momentum 0.1
    kept = running.mean
    batch_norm(x, ones, 0 * ones, running, training=False)
    assert running.mean is kept
    np.testing.assert_array_equal(batch_norm(x, ones, 0 * ones)[0], y)  # none need be given


def test_in_inference_a_sample_is_alone():
    x, ones, running = random_like((4, 3), np.float64, 0), np.ones(3), Running.start(3, np.float64)
    together, _ = batch_norm(x, ones, 0 * ones, running, training=False)
    alone, _ = batch_norm(x[:1], ones, 0 * ones, running, training=False)
    np.testing.assert_array_equal(together[:1], alone)


# --- What is refused --------------------------------------------------------------------------

x, w, small = np.ones((2, 4, 3)), np.ones(4), np.ones(3)
running, a_list = Running.start(4, np.float64), cast(Any, [1.0])
REFUSED = {
    "a list": (lambda: normalize(a_list, 0), TypeError, "normalize: x must be a NumPy array"),
    "integers": (lambda: normalize(x.astype(int), 0), TypeError, "x must be float32 or float64"),
    "an axis that is not there": (
        lambda: normalize(x, 3),
        ValueError,
        "normalize: axis 3 is out of bounds for array of dimension 3",
    ),
    "an axis twice": (lambda: normalize(x, (1, -2)), ValueError, "repeated axis in `normalize`"),
    "no axes": (lambda: normalize(x, ()), ValueError, r"nothing to normalise over axes \(\)"),
    "an empty axis": (
        lambda: normalize(x[:0], 0),
        ValueError,
        r"nothing to normalise over axes 0 of shape \(0, 4, 3\)",
    ),
    "mixed dtypes": (
        lambda: batch_norm(x, w.astype(np.float32), w),
        TypeError,
        r"batch_norm: mixed dtypes \(x is float64, weight is float32, bias is float64\)",
    ),
    "other channels": (
        lambda: instance_norm(x, small, small),
        ValueError,
        r"instance_norm: x must be \(B, C, \.\.\.\) and the rest \(C,\), got x \(2, 4, 3\), "
        r"weight \(3,\), bias \(3,\)",
    ),
    "no channels": (lambda: group_norm(w, 2, w, w), ValueError, r"got x \(4,\), weight \(4,\)"),
    "other bias": (lambda: batch_norm(x, w, small), ValueError, r"weight \(4,\), bias \(3,\)"),
    "running of other channels": (
        lambda: batch_norm(x, w, w, Running.start(3, np.float64)),
        ValueError,
        r"bias \(4,\), running mean \(3,\), running variance \(3,\)",
    ),
    "running of another dtype": (
        lambda: batch_norm(x, w, w, Running.start(4)),
        TypeError,
        r"batch_norm: mixed dtypes .*running mean is float32",
    ),
    "no running": (
        lambda: batch_norm(x, w, w, training=False),
        ValueError,
        "batch_norm: training=False needs running statistics, got None",
    ),
    "a batch of one": (
        lambda: batch_norm(x[:1, :, 0], w, w, running),
        ValueError,
        r"batch_norm: a variance takes 2 numbers or more, x \(1, 4\) has 1 for each",
    ),
    "an instance without places": (
        lambda: instance_norm(x[:, :, 0], w, w),
        ValueError,
        r"instance_norm: a variance takes 2 numbers or more, x \(2, 4\) has 1 for each",
    ),
    "groups that do not fit": (
        lambda: group_norm(x, 3, w, w),
        ValueError,
        "group_norm: n_groups must divide C = 4, got 3",
    ),
    "no groups": (lambda: group_norm(x, 0, w, w), ValueError, "n_groups must divide C = 4, got 0"),
    "rms_norm of other channels": (
        lambda: rms_norm(x, w),
        ValueError,
        r"rms_norm: x must be \(\.\.\., C\) and weight \(C,\), got shapes \(2, 4, 3\) and \(4,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
    np.testing.assert_array_equal(running.mean, np.zeros(4))  # nor has a step been taken
