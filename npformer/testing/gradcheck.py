"""Is `backward` the derivative of the forward?  One random direction tells.

backward(dy) is the transposed Jacobian J times dy.  So for every direction u of the inputs and
every dy of the output

    <dy, J u> = <backward(dy), u>

where J u is a central difference, (f(x + h u) - f(x - h u)) / 2h.  A wrong entry anywhere in
backward(dy) makes the two sides differ, unless it happens to be orthogonal to a random u.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from npformer.module import Module

Array = np.ndarray
LIMIT = 10.0  # times what rounding and the step explain


def gradient_check(name: str, op: Callable, *inputs: Array) -> float:
    """Compare the `backward` of `op` with a central difference at `inputs`, in float64.

    op        op(*inputs) -> y, backward.  It has to draw the same numbers in every call: give it a
              fresh generator each time, as in lambda x: dropout(x, 0.3, np.random.default_rng(1))
    inputs    float64 arrays are moved, and each must get a gradient; all else is passed on as it is

    Returns the error in units of what rounding and the length of the step explain.  Raises
    AssertionError that names the op and each input whose gradient is wrong.  Stay away from kinks:
    at 0, relu has no derivative to compare with.
    """
    moved = [i for i, x in enumerate(inputs) if _is_float(x)]
    for i in moved:
        if inputs[i].dtype != np.float64:
            raise TypeError(
                f"gradient_check: input {i} of {name} is {inputs[i].dtype}; "
                "only float64 leaves enough digits for a difference"
            )
    error, numeric, analytic = _error(name, op, inputs, moved)
    if error < LIMIT:
        return error
    guilty = []
    for i in moved:  # which?  Move one input at a time
        alone, *_ = _error(name, op, inputs, [i])
        if not alone < LIMIT:
            guilty.append(f"{_input_name(op, inputs, i)} {inputs[i].shape} ({alone:.2g})")
    raise AssertionError(
        f"{name}: the difference quotient is {numeric:.9g} but backward says {analytic:.9g}, "
        f"{error:.2g} x what rounding explains; "
        f"wrong for {', '.join(guilty) or 'all inputs together'}"
    )


def _error(name: str, op: Callable, inputs: tuple, moved: list[int]) -> tuple[float, float, float]:
    """The error of the gradients along a random direction of the inputs `moved`."""
    rng = np.random.default_rng(0)
    n = sum(inputs[i].size for i in moved)
    us = {i: rng.standard_normal(inputs[i].shape) / n**0.5 for i in moved}  # together of length ~1
    y, backward = op(*inputs)
    dy = np.asarray(rng.standard_normal(y.shape))  # not ones: rows of softmax have fixed sums
    eps = float(np.finfo(y.dtype).eps)
    h = eps ** (1 / 3)  # balances truncation h² against rounding eps / h

    def moved_by(step: float) -> Array:
        return op(*(x + step * us[i] if i in us else x for i, x in enumerate(inputs)))[0]

    def quotient(step: float) -> float:
        return float(np.vdot(dy, moved_by(step) - moved_by(-step))) / (2 * step)

    numeric, coarser = quotient(h), quotient(2 * h)
    dxs = _as_tuple(backward(dy))  # only now: state kept on a layer would be four calls out of date

    floats = [i for i, x in enumerate(inputs) if _is_float(x)]
    shapes, expected = [np.shape(dx) for dx in dxs], [inputs[i].shape for i in floats]
    if shapes != expected:
        raise AssertionError(f"{name}: gradients of shapes {shapes} for inputs of {expected}")
    analytic = float(sum(np.vdot(dx, us[i]) for i, dx in zip(floats, dxs, strict=True) if i in us))

    # Rounding.  Where y is a sum that cancels, its terms were rounded: eps of x is eps x dx of y.
    magnitude = _product(dy, y) + sum(
        _product(dx, inputs[i]) for i, dx in zip(floats, dxs, strict=True)
    )
    # Truncation.  It is of order h², so twice the step makes it four times as large.
    explained = magnitude * eps / h + abs(coarser - numeric) / 3
    explained += eps * float(np.abs(dy).sum())  # the gradient's own: y may be constant
    return abs(numeric - analytic) / explained, numeric, analytic


def _product(a: Array, b: Array) -> float:
    return float(np.vdot(np.abs(a), np.abs(b)))


def as_op(module: Module, **kwargs: Any) -> Callable:
    """View a module as one op: its inputs are the module's own, followed by its parameters.

        gradient_check("Linear", as_op(linear), x, *(p.data for p in linear.parameters()))

    The parameters come in the order of `module.named_parameters()`, and the module is left as it
    was found.  Ids have no gradient.  An `rng` among the kwargs is copied for each call, so that
    all calls drop the same entries.
    """
    names, parameters = zip(*module.named_parameters(), strict=True)

    def op(*arrays: Array):
        n_own = len(arrays) - len(parameters)
        originals = [p.data for p in parameters]
        for parameter, value in zip(parameters, arrays[n_own:], strict=True):
            parameter.bind(value, parameter.grad)
        try:
            y, backward_module = module(*arrays[:n_own], **copy.deepcopy(kwargs))
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.bind(original, parameter.grad)

        def backward(dy):
            originals = [p.grad for p in parameters]
            for parameter in parameters:
                parameter.bind(parameter.data, np.zeros(parameter.data.shape, dy.dtype))
            try:
                dxs = _as_tuple(backward_module(dy))
                return (*dxs, *(p.grad for p in parameters))
            finally:
                for parameter, original in zip(parameters, originals, strict=True):
                    parameter.bind(parameter.data, original)

        return y, backward

    op.parameter_names = names  # type: ignore[attr-defined]  # for the message of gradient_check
    return op


def _input_name(op: Callable, inputs: tuple, i: int) -> str:
    names = getattr(op, "parameter_names", ())
    if i >= len(inputs) - len(names) and names:
        return names[i - len(inputs)]
    try:
        parameters = list(inspect.signature(op).parameters.values())
    except ValueError:  # a builtin
        return f"input {i}"
    named = i < len(parameters) and parameters[i].kind != inspect.Parameter.VAR_POSITIONAL
    return parameters[i].name if named else f"input {i}"


def _as_tuple(gradients: Any) -> tuple:
    if gradients is None:
        return ()
    return gradients if isinstance(gradients, tuple) else (gradients,)


def _is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating)
