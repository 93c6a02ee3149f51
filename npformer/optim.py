"""SGD, Adam and AdamW with torch's defaults and torch's order of operations   (twin: torch.optim).

    optimizer = Adam(model.parameters(), cosine(1e-3, warmup=100, total=5000))
    ...
    optimizer.zero_grad()
    backward(...)
    clip_grad_norm(optimizer.parameters, 1.0)
    optimizer.step()

An optimizer packs its parameters into one long buffer and makes every `data` and `grad` a view of
it.  A step is then a handful of array operations on slices that fit the cache, whether the model
has ten parameters or a thousand.  A `data` or `grad` that was replaced since is packed anew, at the
next step or zero_grad: what a parameter has is what counts.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

import numpy as np
from numpy.lib.array_utils import byte_bounds

from npformer.module import Parameter
from npformer.ops import Array
from npformer.options import integer, limit, not_negative, pair_of_betas
from npformer.schedules import Schedule, constant, cosine, inverse_sqrt, noam

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "clip_grad_norm",
    "constant",
    "cosine",
    "inverse_sqrt",
    "noam",
]

CHUNK = 1 << 16  # elements: a chunk of each array of a step fits the second-level cache together


class Optimizer:
    """`step()` moves every parameter along its gradient, by the rate of the schedule.

    `rate` is a number or a function of the step, which counts from 1.
    """

    buffers: tuple[str, ...] = ()  # what a subclass remembers of each element, by name
    update: Callable[..., None]  # (data, grad, rate, **buffers): all (n,); writes all but grad

    def __init__(self, parameters: Iterable[Parameter], rate: float | Schedule):
        self.rate = rate if callable(rate) else constant(rate)
        self.steps = 0
        self.parameters = list(parameters)
        self.data, self.grad = pack(self.parameters)
        self.views = [(p.data, p.grad) for p in self.parameters]
        self.state = {name: np.zeros_like(self.data) for name in self.buffers}

    def step(self) -> None:
        self.pack_again()
        rate = not_negative("rate", self.rate(self.steps + 1))
        self.steps += 1
        for i in range(0, len(self.data), CHUNK):
            part = slice(i, i + CHUNK)
            state = {name: array[part] for name, array in self.state.items()}
            self.update(self.data[part], self.grad[part], rate, **state)

    def zero_grad(self) -> None:
        """As module.zero_grad(), but in one go over the packed gradients."""
        self.pack_again()
        self.grad[...] = 0

    def pack_again(self) -> None:
        """Where a parameter has other arrays than our views: its own, or another optimizer's."""
        for p, (data, grad) in zip(self.parameters, self.views, strict=True):
            if p.data is not data or p.grad is not grad:
                self.data, self.grad = pack(self.parameters)
                self.views = [(p.data, p.grad) for p in self.parameters]
                return

    def __setstate__(self, state: dict) -> None:
        """After copy.deepcopy or pickle, which tear the views from their buffer."""
        vars(self).update(state)
        self.data, self.grad = pack(self.parameters)
        self.views = [(p.data, p.grad) for p in self.parameters]

    def state_dict(self) -> dict[str, Array]:
        return {"steps": np.array(self.steps), **{k: x.copy() for k, x in self.state.items()}}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """All or nothing.  Raises ValueError where the state is not this optimizer's."""
        expected = {"steps": (), **{name: x.shape for name, x in self.state.items()}}
        if {name: np.shape(x) for name, x in state.items()} != expected:
            raise ValueError("the optimizer state belongs to another optimizer or another model")
        steps = integer("the optimizer state's steps", state["steps"], 0)
        arrays = {name: np.asarray(state[name]) for name in self.state}
        for name, x in arrays.items():
            if not np.can_cast(x.dtype, self.data.dtype, "same_kind"):
                raise ValueError(f"the optimizer state's {name} is {x.dtype}")
        self.steps = steps
        for name, array in self.state.items():
            array[...] = arrays[name]


def pack(parameters: list[Parameter]) -> tuple[Array, Array]:
    """Move all data into one buffer and all gradients into another, each parameter a view of them.

    Parameters that are packed already, in this order, stay where they are.
    """
    if not parameters:
        raise ValueError("an optimizer needs at least one parameter")
    for p in parameters:
        if not isinstance(p, Parameter):
            kind = f"{type(p).__module__}.{type(p).__name__}"
            raise TypeError(f"an optimizer takes Parameters, model.parameters(), got {kind}")
    if len({id(p) for p in parameters}) < len(parameters):
        raise ValueError("an optimizer moves each parameter once, and one is given twice")
    if len(dtypes := {p.data.dtype.name for p in parameters}) > 1:
        raise TypeError(f"parameters of mixed dtypes ({', '.join(sorted(dtypes))})")
    ends = sorted(byte_bounds(p.data) for p in parameters if p.data.size)
    if any(start < end for (_, end), (start, _) in pairwise(ends)):
        raise ValueError(
            "two parameters share an array; to tie them, use one Parameter in both places"
        )
    datas, grads = [p.data for p in parameters], [p.grad for p in parameters]
    data, grad = datas[0].base, grads[0].base
    if data is not None and grad is not None and _fill(datas, data) and _fill(grads, grad):
        return data, grad
    data, grad = (np.concatenate([x.reshape(-1) for x in arrays]) for arrays in (datas, grads))
    start = 0
    for p in parameters:
        part, shape = slice(start, start + p.data.size), p.data.shape
        p.bind(data[part].reshape(shape), grad[part].reshape(shape))
        start = part.stop
    return data, grad


def _fill(arrays: list[Array], buffer: Array) -> bool:
    """They are views of the buffer, one behind the other, and all of it."""
    if buffer.shape != (sum(x.size for x in arrays),):
        return False
    end = buffer.ctypes.data
    for x in arrays:
        if x.base is not buffer or x.ctypes.data != end:
            return False
        end += x.nbytes
    return True


class SGD(Optimizer):
    """data -= rate · v,  v = momentum · v + grad   (weight decay: grad += decay · data, first)."""

    buffers = ("velocity",)

    def __init__(
        self,
        parameters: Iterable[Parameter],
        rate: float | Schedule = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, rate)
        self.momentum = not_negative("momentum", momentum)
        self.weight_decay = not_negative("weight_decay", weight_decay)

    def update(self, data, grad, rate, velocity):
        if self.weight_decay:
            grad = grad + self.weight_decay * data
        velocity *= self.momentum
        velocity += grad
        data -= rate * velocity


class Adam(Optimizer):
    """data -= rate · m̂ / (√v̂ + eps)   [Kingma and Ba 2015, algorithm 1].

    m and v are running means of the gradient and of its square; both start at 0, and dividing
    by 1 - βᵗ undoes that bias.  `weight_decay` is L2: it is added to the gradient, and so it is
    normalised with it.
    """

    buffers = ("m", "v")
    decoupled = False

    def __init__(
        self,
        parameters: Iterable[Parameter],
        rate: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, rate)
        self.betas, self.eps = pair_of_betas(betas), not_negative("eps", eps)
        self.weight_decay = not_negative("weight_decay", weight_decay)

    def update(self, data, grad, rate, m, v):
        beta1, beta2 = self.betas
        if self.weight_decay and self.decoupled:
            data *= 1 - rate * self.weight_decay
        elif self.weight_decay:
            grad = grad + self.weight_decay * data

        change = grad - m  # m += (1 - β1) (grad - m)
        change *= 1 - beta1
        m += change
        np.multiply(grad, grad, out=change)  # v = β2 v + (1 - β2) grad²
        change *= 1 - beta2
        v *= beta2
        v += change

        step = np.sqrt(v)  # data -= rate m̂ / (√v̂ + eps)
        step /= math.sqrt(1 - beta2**self.steps)
        step += self.eps
        np.divide(m, step, out=step)
        step *= rate / (1 - beta1**self.steps)
        data -= step


class AdamW(Adam):
    """Adam with decoupled weight decay: data shrinks by rate · decay, whatever its gradient is.

    [Loshchilov and Hutter 2019, algorithm 2].  torch's default decay, 0.01.
    """

    decoupled = True

    def __init__(
        self,
        parameters: Iterable[Parameter],
        rate: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(parameters, rate, betas, eps, weight_decay)


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients to a common L2 norm of at most `max_norm`; return the norm before.

    As torch's clip_grad_norm_: the factor is min(1, max_norm / (norm + 1e-6)).
    """
    max_norm = limit("max_norm", max_norm)
    gradients = [p.grad for p in dict.fromkeys(parameters)]  # each once, should one come twice
    norm = math.sqrt(sum(float(np.vdot(grad, grad)) for grad in gradients))
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1:  # NaN as well, which goes to all of them
        for grad in gradients:
            grad *= factor
    return norm
