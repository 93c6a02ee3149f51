"""JAX through the kit: pure functions, and jax.vjp for their gradients."""

from functools import partial

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)  # the cases are float64, unless --dtype float32


def adapter():
    return target


def target(op, arrays, options):
    if op not in OPERATIONS:
        raise NotImplementedError(f"no {op} in JAX")
    return run(OPERATIONS[op], arrays, options)


def run(function, arrays, options):
    """Compiled as a whole: piece by piece, as JAX does by itself, takes three times as long."""
    if "mask" in arrays and not arrays["mask"].any(axis=-1).all():
        raise NotImplementedError("NaN where a row has no entry")
    is_float = {name: x.dtype.kind == "f" and name != "dy" for name, x in arrays.items()}
    floats = {name: x for name, x in arrays.items() if is_float[name]}
    others = {name: x for name, x in arrays.items() if not is_float[name]}
    y, gradients = value_and_gradients(function, tuple(options.items()), floats, others)
    return {"y": y} | {f"d.{name}": dx for name, dx in gradients.items()}


@partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(function, options, floats, others):
    y, vjp = jax.vjp(lambda floats: function(floats | others, dict(options)), floats)
    return y, *vjp(others["dy"])


def linear(a, o):
    y = a["x"] @ a["weight"].T
    return y + a["bias"] if "bias" in a else y


def embedding(a, o):
    weight = a["weight"]
    if o["padding_idx"] is not None:  # jax.nn has no padding_idx
        row = jax.lax.stop_gradient(weight[o["padding_idx"]])
        weight = weight.at[o["padding_idx"]].set(row)
    return weight[a["ids"]]


def softmax(a, o):
    if "mask" not in a:
        return jax.nn.softmax(a["x"])
    return jax.nn.softmax(a["x"], where=jnp.broadcast_to(a["mask"], a["x"].shape))


def layer_norm(a, o):
    """Not jax.nn.standardize, whose variance is mean(x²) - mean(x)²: the kit finds it cancel."""
    x = a["x"]
    xhat = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + o["eps"])
    return xhat * a["weight"] + a["bias"]


def multi_head_attention(a, o):
    """Not jax.nn.dot_product_attention, which calculates its softmax in float32."""

    def heads(x):  # (B, T, C) -> (B, H, T, D)
        return x.reshape(*x.shape[:2], o["n_heads"], -1).transpose(0, 2, 1, 3)

    q, k, v = (
        heads(a[x] @ a[f"{x[0]}_proj.weight"].T + a[f"{x[0]}_proj.bias"])
        for x in ("query", "key", "value")
    )
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = softmax({"x": scores} | {k: x for k, x in a.items() if k == "mask"}, o)
    y = (weights @ v).transpose(0, 2, 1, 3).reshape(a["query"].shape)
    return y @ a["out_proj.weight"].T + a["out_proj.bias"]


OPERATIONS = {
    "matmul": lambda a, o: a["a"] @ a["b"],
    "linear": linear,
    "embedding": embedding,
    "softmax": softmax,
    "log_softmax": lambda a, o: jax.nn.log_softmax(a["x"]),
    "layer_norm": layer_norm,
    "gelu": lambda a, o: jax.nn.gelu(a["x"], approximate=False),
    "gelu_tanh": lambda a, o: jax.nn.gelu(a["x"], approximate=True),
    "multi_head_attention": multi_head_attention,
}


def by_default():
    """jax.nn's own functions as they are called by default: what do they mean?"""
    functions = {
        "gelu": lambda a, o: jax.nn.gelu(a["x"]),
        "layer_norm": lambda a, o: (
            jax.nn.standardize(a["x"], epsilon=o["eps"]) * a["weight"] + a["bias"]
        ),
    }

    def target(op, arrays, options):
        if op not in functions:
            raise NotImplementedError(op)
        return run(functions[op], arrays, options)

    return target
