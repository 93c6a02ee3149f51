"""Parameters, and the tree of modules that owns them: the little of torch.nn that is needed.

A module has the contract of an op: `y, backward = module(x)`, and `dx = backward(dy)`.  Its
parameters are not among the arguments, so their gradients are not among the results: a leaf module
adds them to `parameter.grad`.  Everything above the leaves is wiring, and nothing is kept on
`self`: two forwards may precede the first backward, and every backward knows its own forward.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import numpy as np

from npformer.ops import Array, Forward


class Parameter:
    """A learned array and the gradient accumulated for it: torch's p.data and p.grad.

    Both may be written into (`p.grad += x`) or replaced (`p.grad = x`).  What replaces them is
    copied, so that no array has two owners; it has the same shape, and a gradient is converted to
    the dtype of its data.  An optimizer makes both views of one long buffer: take them from the
    parameter each time.
    """

    data: Array
    grad: Array

    def __init__(self, data: Array):
        if not isinstance(data, np.ndarray) or not np.issubdtype(data.dtype, np.floating):
            kind = data.dtype if isinstance(data, np.ndarray) else type(data).__name__
            raise TypeError(f"Parameter: data must be an array of floats, got {kind}")
        self.bind(np.asarray(data), np.zeros(data.shape, data.dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad"):
            if value is self.__dict__[name]:  # `p.grad += x` ends in `p.grad = p.grad`
                return
            _check_replacement(name, value, self.data)
            value = np.array(value, self.data.dtype)  # a copy, and no np.matrix
        super().__setattr__(name, value)

    def bind(self, data: Array, grad: Array) -> None:
        """Have these arrays themselves, not copies: for an optimizer, whose views they are."""
        self.__dict__.update(data=data, grad=grad)

    def view(self) -> "Parameter":
        """The same data, whatever array that will be, and a gradient of its own."""
        return _View(self)

    def __repr__(self) -> str:
        return f"Parameter{self.data.shape}, {self.data.dtype}"


class _View(Parameter):
    """Another parameter's data.  An optimizer may pack that one later, so the array is not kept."""

    of: Parameter

    def __init__(self, of: Parameter):
        self.__dict__.update(of=of, grad=np.zeros(of.data.shape, of.data.dtype))

    def __getattr__(self, name: str) -> Any:
        if name != "data":
            raise AttributeError(name)
        return self.__dict__["of"].data

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            self.of.data = value
        else:
            super().__setattr__(name, value)


def _check_replacement(name: str, value: Any, data: Array) -> None:
    if not isinstance(value, np.ndarray) or value.shape != data.shape:
        got = f"shape {value.shape}" if isinstance(value, np.ndarray) else repr(value)
        raise ValueError(
            f"Parameter.{name} must be an array of shape {data.shape}, got {got}; "
            f"p.{name}[...] = x fills it, and zero_grad() is how a gradient is forgotten"
        )
    if not np.can_cast(value.dtype, data.dtype, "same_kind"):
        raise TypeError(f"Parameter.{name} is {data.dtype}, got {value.dtype}")
    if name == "data" and value.dtype != data.dtype:
        raise TypeError(
            f"Parameter.data is {data.dtype}, got {value.dtype}: "
            "p.data[...] = x converts x, a model of another dtype is made with dtype="
        )


class Module:
    """A tree of Parameters and Modules.

    In a subclass, `forward` calls its parts going down and keeps their backward_a, backward_b, ...;
    the `backward` below it calls these in the opposite order.  A residual is `dy +`, and a value
    that was used twice is a `+`.
    """

    # (y, backward) in a subclass; the arguments are its own
    forward: Callable[..., Forward]

    def __call__(self, *args: Any, **kwargs: Any) -> Forward:
        y, backward = self.forward(*args, **kwargs)
        return y, (backward if _recording.get() else _no_backward)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Yield ("self_attn.q_proj.weight", parameter), ...: the keys of the torch twin.

        Parts may stand in lists, tuples and dicts: "layers.0.weight", "heads.sum.weight".  A
        parameter that is used in two places comes once, under its first name.
        """
        seen = set()
        for name, parameter in self._names(prefix):
            if parameter not in seen:
                seen.add(parameter)
                yield name, parameter

    def _names(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """As named_parameters, but by every name that a parameter has."""
        for name, part in self.named_parts():
            if isinstance(part, Parameter):
                yield prefix + name, part
            else:
                yield from part._names(f"{prefix}{name}.")

    def named_parts(self) -> "Iterator[tuple[str, Parameter | Module]]":
        """What hangs on this module itself: ("norm1", module), ("layers.0", module), ..."""
        for name, value in vars(self).items():
            yield from _parts(value, name)

    def parameters(self) -> list[Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad[...] = 0

    def view(self) -> Self:
        """This module once more: the same weights, but gradients of its own, for another thread."""
        self.parameters()  # raises for parts that have no name
        return _again(self, {})

    def state_dict(self) -> dict[str, Array]:
        """A copy of every parameter, by name: by each of its names, as torch has it."""
        return {name: parameter.data.copy() for name, parameter in self._names()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy `state` into the parameters; all or nothing.

        Raises ValueError if a name is missing or unknown, a shape differs or a value is no real
        number; values are converted to the dtype of the parameters.
        """
        from npformer.checkpoint import fitting  # not needed to import, only to load

        parameters = dict(self._names())
        arrays = fitting({name: p.data for name, p in parameters.items()}, state)
        for name, parameter in parameters.items():
            parameter.data[...] = arrays[name]


NAMELESS = set | frozenset | deque | ValuesView  # no place for Parameters and Modules


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The Parameters and Modules in an attribute and in its lists, tuples and dicts."""
    if isinstance(value, Parameter | Module):
        yield name, value
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _parts(item, f"{name}.{i}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            for full_name, part in _parts(item, f"{name}.{key}"):
                if not isinstance(key, str) or "." in key:
                    raise ValueError(f"{name}: the key {key!r} must be a string without a dot")
                yield full_name, part
    elif isinstance(value, NAMELESS) and any(True for _ in _parts([*value], name)):
        kind = type(value).__name__
        raise ValueError(f"{name}: parts in a {kind} have no names; use a list or a dict")


def _again(value: Any, made: dict[int, Any]) -> Any:
    """A copy with views for parameters; what is used in two places stays one, by `made`."""
    if isinstance(value, Parameter):
        return made.setdefault(id(value), value.view())
    if isinstance(value, Module) and id(value) not in made:
        made[id(value)] = other = copy.copy(value)
        vars(other).update({name: _again(part, made) for name, part in vars(value).items()})
    if isinstance(value, Module):
        return made[id(value)]
    if not any(True for _ in _parts(value, "")):
        return value
    if isinstance(value, Mapping):
        return {key: _again(item, made) for key, item in value.items()}
    make = list if isinstance(value, list) else getattr(value, "_make", tuple)  # or a named tuple
    return make(_again(item, made) for item in value)


_recording = ContextVar("recording", default=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Inference: each module forgets its backward on return, so activations die layer by layer."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def _no_backward(*_):
    raise RuntimeError("this forward pass ran under no_grad(): there is no way back through it")
