"""Parameters, and the tree of modules that owns them: the little of torch.nn that is needed.

A module has the contract of an op: `y, backward = module(x)`, and `dx = backward(dy)`.  Its
parameters are not among the arguments, so their gradients are not among the results: a leaf module
adds them to `parameter.grad`.  Everything above the leaves is wiring, and nothing is kept on
`self`: two forwards may precede the first backward, and every backward knows its own forward.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import numpy as np

from npformer.ops import Array, Forward


class Parameter:
    """A learned array and the gradient accumulated for it: torch's p.data and p.grad.

    Both are only ever written *into* (`p.data[...] =`, `p.grad +=`), never replaced: an optimizer
    may have made them views of one long buffer.
    """

    def __init__(self, data: Array):
        self.data = data
        self.grad = np.zeros(data.shape, data.dtype)

    def __repr__(self) -> str:
        return f"Parameter{self.data.shape}, {self.data.dtype}"


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
        """Yield ("self_attn.q_proj.weight", parameter), ...: the keys of the torch twin."""
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value.named_parameters(f"{prefix}{name}.")
            elif isinstance(value, list):
                for i, layer in enumerate(value):
                    yield from layer.named_parameters(f"{prefix}{name}.{i}.")

    def parameters(self) -> list[Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad[...] = 0

    def view(self) -> Self:
        """This module once more: the same weights, but gradients of its own, for another thread."""

        def view(value: Any) -> Any:
            if isinstance(value, Parameter):
                return Parameter(value.data)
            if isinstance(value, Module):
                return value.view()
            return [view(item) for item in value] if isinstance(value, list) else value

        other = copy.copy(self)
        vars(other).update({name: view(value) for name, value in vars(self).items()})
        return other

    def state_dict(self) -> dict[str, Array]:
        """A copy of every parameter, by name."""
        return {name: parameter.data.copy() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy `state` into the parameters; all or nothing.

        Raises ValueError if a name is missing or unknown, or a shape differs; values are
        converted to the dtype of the parameters.
        """
        from npformer.checkpoint import check_state  # not needed to import, only to load

        parameters = dict(self.named_parameters())
        check_state({name: p.data.shape for name, p in parameters.items()}, state)
        for name, parameter in parameters.items():
            parameter.data[...] = state[name]


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
