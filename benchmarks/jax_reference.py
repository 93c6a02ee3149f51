"""The same step in JAX, one jit-compiled function from weights and moments to the next ones."""

import functools
import math
import os
from typing import Any

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.contenders import MAX_NORM, RATE, Array, Problem, Step
from benchmarks.harness import BenchmarkError, numpy_threads
from npformer.positional import sinusoidal_table

Weights = dict[str, Any]


@functools.cache
def jax_threads() -> int:
    """XLA has no setting for it: it makes a thread for each core it may use when it starts.

    So it is started while the process may use as many cores as NumPy's BLAS has threads.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise BenchmarkError("JAX can be held to a number of threads on Linux only")
    allowed = os.sched_getaffinity(0)
    cores = sorted(allowed)[: numpy_threads()]
    os.sched_setaffinity(0, cores)
    jax.devices()
    os.sched_setaffinity(0, allowed)
    return len(cores)


class Keys:
    """A new random key for each dropout."""

    def __init__(self, key: Any):
        self.key = key

    def dropout(self, x: Any, p: float) -> Any:
        if p == 0:
            return x
        self.key, key = jax.random.split(self.key)
        return jnp.where(jax.random.bernoulli(key, 1 - p, x.shape), x / (1 - p), 0)


def loss_of(weights: Weights, problem: Problem, dropout: float, key: Any) -> Any:
    size, drop = problem.size, functools.partial(Keys(key).dropout, p=dropout)
    table = sinusoidal_table(size.length, size.d_model).astype(np.float32)
    causal = np.tri(size.length, dtype=bool)

    def linear(name: str, x: Any) -> Any:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        rstd = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + problem.config.eps)
        return centred * rstd * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(name: str, query: Any, memory: Any, mask: Array | None) -> Any:
        B, T, C = query.shape
        inputs = {"q": query, "k": memory, "v": memory}
        q, k, v = (
            linear(f"{name}.{letter}_proj", x).reshape(B, T, size.n_heads, -1).swapaxes(1, 2)
            for letter, x in inputs.items()
        )
        scores = q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5
        scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
        y = drop(jax.nn.softmax(scores)) @ v
        return linear(f"{name}.out_proj", y.swapaxes(1, 2).reshape(B, T, C))

    def feed_forward(name: str, x: Any) -> Any:
        return linear(f"{name}.linear2", drop(jax.nn.relu(linear(f"{name}.linear1", x))))

    def embed(side: str, ids: Array) -> Any:
        return drop(weights[f"{side}_embedding.weight"][ids] * math.sqrt(size.d_model) + table)

    x = embed("src", problem.src)
    for i in range(size.n_layers):
        layer = f"encoder.layers.{i}"
        x = norm(f"{layer}.norm1", x + drop(attend(f"{layer}.self_attn", x, x, None)))
        x = norm(f"{layer}.norm2", x + drop(feed_forward(f"{layer}.feed_forward", x)))
    memory = norm("encoder.norm", x)
    y = embed("tgt", problem.tgt_in)
    for i in range(size.n_layers):
        layer = f"decoder.layers.{i}"
        y = norm(f"{layer}.norm1", y + drop(attend(f"{layer}.self_attn", y, y, causal)))
        y = norm(f"{layer}.norm2", y + drop(attend(f"{layer}.cross_attn", y, memory, None)))
        y = norm(f"{layer}.norm3", y + drop(feed_forward(f"{layer}.feed_forward", y)))
    log_p = jax.nn.log_softmax(linear("head", norm("decoder.norm", y)))
    return -jnp.take_along_axis(log_p, problem.tgt_out[..., None], axis=-1).mean()


def adam(weights: Weights, grads: Weights, m: Weights, v: Weights, t: Any, clip: bool) -> Any:
    b1, b2, eps = 0.9, 0.999, 1e-8
    tree_map = jax.tree_util.tree_map
    if clip:
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in grads.values()))
        factor = jnp.minimum(1, MAX_NORM / (norm + 1e-6))
        grads = tree_map(lambda g: g * factor, grads)
    m = tree_map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
    v = tree_map(lambda v, g: b2 * v + (1 - b2) * g * g, v, grads)
    c1, c2 = 1 - b1**t, 1 - b2**t
    step = tree_map(lambda m, v: RATE * (m / c1) / (jnp.sqrt(v / c2) + eps), m, v)
    return tree_map(jnp.subtract, weights, step), m, v


class JaxStep(Step):
    def __init__(self, problem: Problem):
        super().__init__(problem)
        jax_threads()  # starts XLA
        self.weights = {name: jnp.asarray(w) for name, w in problem.weights.items()}
        self.m = {name: jnp.zeros_like(w) for name, w in self.weights.items()}
        self.v = {name: jnp.zeros_like(w) for name, w in self.weights.items()}
        self.t, self.key = 0, jax.random.key(1)

        @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(weights: Weights, m: Weights, v: Weights, t: Any, key: Any) -> Any:
            grads = jax.grad(loss_of)(weights, problem, problem.dropout, key)
            return adam(weights, grads, m, v, t, problem.clip)

        self.step = step

    def __call__(self) -> None:
        self.t += 1
        self.key, key = jax.random.split(self.key)
        new = self.step(self.weights, self.m, self.v, float(self.t), key)
        self.weights, self.m, self.v = jax.block_until_ready(new)

    def gradients(self) -> tuple[float, dict[str, Array]]:
        loss_and_gradients = jax.jit(
            jax.value_and_grad(lambda w: loss_of(w, self.problem, 0.0, self.key))
        )
        loss, grads = loss_and_gradients(self.weights)
        # The pad row's gradient is never asked for here: batches have no padding.
        return float(loss), {name: np.asarray(g) for name, g in grads.items()}
