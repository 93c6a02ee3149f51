"""Is a module what every module promises to be, and is it the same function as its torch twin?

An `Example` is one module, its twin and the inputs of both; four questions are asked of it:

    check_contract    backward may be called twice, two forwards may precede it, nothing is written
    check_gradient    backward is the derivative, by central differences
    check_twin        float64: value and every gradient are those of the twin
    check_peer        float32: no further from the float64 result than the twin is

Everything is compared by name: the arguments of `forward`, then the parameters.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npformer import compare
from npformer.module import Module, no_grad
from npformer.testing.gradcheck import as_op, gradient_check

Array = np.ndarray
Tensors = dict[str, Array]
N_NUDGED = 4  # one alone may happen to move nothing
OUTPUT, GRADIENT = 1e-12, 1e-10  # float64: of the largest output, of the largest gradient


@dataclass(frozen=True)
class Example:
    """One module, its twin, and what both are called with."""

    make: Callable[[Any], Module]  # of a dtype; the same numbers each time
    make_twin: Callable[[], Any]  # the torch.nn.Module; its parameters are overwritten
    inputs: tuple[Array, ...]  # ids, and float64 arrays that get a gradient
    options: Mapping[str, Any] = field(default_factory=dict)  # masks, an offset; no gradient
    n_summed: int = 1  # the lengths of the sums on the way through the module, added up

    @property
    def name(self) -> str:
        return type(self.make(np.float64)).__name__


def randomise(module: Module, seed: int) -> Module:
    """Biases not 0, LayerNorm weights not 1: one that was forgotten would not show otherwise."""
    rng = np.random.default_rng(seed)
    for parameter in module.parameters():
        if parameter.data.ndim == 1:
            parameter.data += 0.3 * rng.standard_normal(parameter.data.shape)
    return module


# --- The contract -----------------------------------------------------------------------------


def check_contract(example: Example, dtype: Any) -> None:
    """Raise AssertionError (or ValueError, from a write to a locked array) if it is broken."""
    module, name = example.make(dtype), example.name
    inputs = tuple(_locked(_cast(x, dtype)) for x in example.inputs)
    others = tuple(x / 2 if _is_float(x) else np.zeros_like(x) for x in inputs)
    for parameter in module.parameters():
        parameter.data.flags.writeable = False
    kept = _everything_kept(module)

    y, backward = module(*inputs, **example.options)
    dy = _random_dy(y)
    module(*others, **example.options)  # another forward, on other numbers, before any backward
    _locked(y)
    dxs = as_tuple(backward(dy))
    first = [parameter.grad.copy() for parameter in module.parameters()]

    floats = [x for x in inputs if _is_float(x)]
    assert y.dtype == dtype, f"{name}: the output is {y.dtype}"
    assert [(dx.shape, dx.dtype) for dx in dxs] == [(x.shape, x.dtype) for x in floats], name
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad.dtype == dtype, f"{name}: {parameter_name}"

    for dx in dxs:
        _locked(dx)
    for dx, again in zip(dxs, as_tuple(backward(dy)), strict=True):
        np.testing.assert_array_equal(dx, again, err_msg=f"{name}: the second backward")
    for (parameter_name, p), g in zip(module.named_parameters(), first, strict=True):
        # Backward adds: 2 g, but for the rounding of a + b + a + b where a weight is used twice.
        atol = np.sqrt(compare.eps(dtype)) * abs(g).max(initial=0)
        message = f"{name}: {parameter_name} after two backwards"
        np.testing.assert_allclose(p.grad, g + g, rtol=0, atol=atol, err_msg=message)
    module.zero_grad()
    backward(dy)
    for (parameter_name, p), g in zip(module.named_parameters(), first, strict=True):
        np.testing.assert_array_equal(p.grad, g, err_msg=f"{name}: {parameter_name}, once more")

    alone = example.make(dtype)  # one forward and one backward, with nothing in between
    y_alone, backward_alone = alone(*inputs, **example.options)
    np.testing.assert_array_equal(y, y_alone, err_msg=name)
    for dx, expected in zip(dxs, as_tuple(backward_alone(dy)), strict=True):
        np.testing.assert_array_equal(dx, expected, err_msg=f"{name}: after another forward")
    for (parameter_name, p), g in zip(alone.named_parameters(), first, strict=True):
        np.testing.assert_array_equal(p.grad, g, err_msg=f"{name}: {parameter_name}")

    with no_grad():
        y_alone, no_backward = module(*inputs, **example.options)
    np.testing.assert_array_equal(y, y_alone, err_msg=f"{name} under no_grad")
    assert _refuses(no_backward, dy), f"{name}: backward after no_grad() did not refuse"
    assert _everything_kept(module) == kept, f"{name}: something was kept on self"


def _refuses(backward: Callable, dy: Array) -> bool:
    try:
        backward(dy)
    except RuntimeError as error:
        return "no_grad" in str(error)
    return False


def _everything_kept(module: Module, path: str = "") -> dict[str, int]:
    """The identity of everything that hangs on a module and on its parts."""
    found = {}
    for name, value in vars(module).items():
        found[path + name] = id(value)
        for i, part in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(part, Module):
                found |= _everything_kept(part, f"{path}{name}.{i}.")
    return found


# --- The derivative ---------------------------------------------------------------------------


def check_gradient(example: Example) -> None:
    module = example.make(np.float64)
    data = [parameter.data for parameter in module.parameters()]
    op = as_op(module, **example.options)
    gradient_check(example.name, op, *example.inputs, *data)


# --- The twin ---------------------------------------------------------------------------------


def check_twin(example: Example) -> None:
    ours = numpy_step(example, np.float64)
    assert_same(example.name, ours, torch_step(example, np.float64))


def check_peer(example: Example) -> None:
    oracle = numpy_step(example, np.float32, np.float64)
    rng = np.random.default_rng(0)
    nudged = stacked([numpy_step(example, np.float32, np.float64, rng) for _ in range(N_NUDGED)])
    ours, peer = numpy_step(example, np.float32), torch_step(example, np.float32)
    assert_as_exact_as_a_peer(example.name, ours, peer, oracle, nudged, example.n_summed)


def stacked(steps: list[Tensors]) -> Tensors:
    """Several results as one, each tensor with a leading axis."""
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


def assert_same(
    name: str, actual: Tensors, expected: Tensors, outputs: tuple[str, ...] = ("y",)
) -> None:
    """float64: each output to OUTPUT, every gradient to GRADIENT of the largest of them all."""
    __tracebackhide__ = True
    largest = {key: float(np.abs(x).max(initial=0)) for key, x in expected.items()}
    scale = max((x for key, x in largest.items() if key not in outputs), default=0.0)
    bounds = {
        key: OUTPUT * largest[key] if key in outputs else GRADIENT * scale for key in expected
    }
    demand(name, compare.compare_tensors(actual, expected, bounds))


def assert_as_exact_as_a_peer(
    name: str,
    actual: Tensors,
    peer: Tensors,
    oracle: Tensors,
    nudged: Tensors,
    n: int,
    outputs: tuple[str, ...] = ("y",),
) -> None:
    """float32: `compare.peer_bound` for each output and for every gradient."""
    __tracebackhide__ = True
    bounds = compare.peer_bounds(peer, oracle, nudged, n, outputs)
    demand(name, compare.compare_tensors(actual, oracle, bounds))


def demand(name: str, rows: list[compare.Row]) -> None:
    """Raise AssertionError with the whole table, unless every row is in bound."""
    __tracebackhide__ = True
    if not all(row.ok for row in rows):
        raise AssertionError(f"{name}\n{compare.table(rows)}")


def numpy_step(
    example: Example, dtype: Any, compute: Any = None, nudges: np.random.Generator | None = None
) -> Tensors:
    """Value and gradients by name.

    compute    the numbers of `dtype`, but calculated with so
    nudges     first move every input and weight by a rounding (see `compare.nudge`)
    """
    module = example.make(compute or dtype)
    module.load_state_dict(example.make(dtype).state_dict())
    inputs = [_cast(_cast(x, dtype), compute or dtype) for x in example.inputs]
    if nudges is not None:
        inputs = [compare.nudge(x, nudges) if _is_float(x) else x for x in inputs]
        for parameter in module.parameters():
            parameter.data[...] = compare.nudge(parameter.data, nudges)
    y, backward = module(*inputs, **example.options)
    dy = np.repeat(_cast(_cast(_random_dy(y), dtype), y.dtype), 2, axis=-1)[..., ::2]
    dxs = as_tuple(backward(dy))  # not contiguous: a backward takes any strides
    tensors = {"y": y} | dict(zip(_float_arguments(example), dxs, strict=True))
    return tensors | {name: p.grad for name, p in module.named_parameters()}


def torch_step(example: Example, dtype: Any) -> Tensors:
    """The same from the twin, with autograd's gradients."""
    import torch

    module = example.make(dtype)
    twin = example.make_twin().to(getattr(torch, np.dtype(dtype).name))
    state = {name: torch.from_numpy(x) for name, x in module.state_dict().items()}
    twin.load_state_dict(state)
    inputs = [torch.tensor(_cast(x, dtype).copy()) for x in example.inputs]
    floats = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    y = twin(*inputs, **{name: to_tensor(x) for name, x in example.options.items()})
    parameters = dict(twin.named_parameters())
    gradients = torch.autograd.grad(
        y,
        [*floats, *parameters.values()],
        torch.tensor(_cast(_random_dy(y.detach().numpy()), dtype)),
        materialize_grads=True,
    )
    names = [*_float_arguments(example), *parameters]
    found = dict(zip(names, gradients, strict=True))
    return {"y": y.detach().numpy()} | {name: dx.numpy() for name, dx in found.items()}


def to_tensor(x: Any) -> Any:
    """A copy as a tensor, of an array; anything else as it is."""
    import torch

    return torch.tensor(x.copy()) if isinstance(x, np.ndarray) else x


def as_tuple(gradients: Any) -> tuple[Array, ...]:
    if gradients is None:
        return ()
    return gradients if isinstance(gradients, tuple) else (gradients,)


def _float_arguments(example: Example) -> list[str]:
    names = list(inspect.signature(example.make(np.float64).forward).parameters)
    return [name for name, x in zip(names, example.inputs, strict=False) if _is_float(x)]


def _random_dy(y: Array) -> Array:
    return _locked(np.asarray(np.random.default_rng(y.size).standard_normal(y.shape), y.dtype))


def _cast(x: Array, dtype: Any) -> Array:
    return x.astype(dtype) if _is_float(x) and x.dtype != dtype else x


def _is_float(x: Array) -> bool:
    return np.issubdtype(x.dtype, np.floating)


def _locked(x: Array) -> Array:
    x.flags.writeable = False
    return x
