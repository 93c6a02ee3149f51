"""What npformer says: every operation of the kit, by name, as an adapter of npformer itself.

    reference("layer_norm", {"x": x, "weight": w, "bias": b, "dy": dy}, {"eps": 1e-5})
        -> {"y": y, "d.x": dx, "d.weight": dweight, "d.bias": dbias}

An adapter for any other implementation is a function like this one (docs/testing-kit.md lists the
operations with their arrays and options).  Gradients come in the order in which backward makes
them, which for a model is last layer first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from npformer import masks, ops, positional
from npformer.attention import MultiHeadAttention
from npformer.config import TransformerConfig
from npformer.decoder import DecoderLayer
from npformer.encoder import EncoderLayer
from npformer.feedforward import FeedForward
from npformer.module import Module, Parameter
from npformer.transformer import Transformer

Array = np.ndarray
Arrays = dict[str, Array]
Options = dict[str, Any]
MODEL_INPUTS = ("src", "tgt", "targets", "src_mask", "tgt_mask")


def reference(op: str, arrays: Arrays, options: Options) -> Arrays:
    """The outputs by name, and the gradient of every floating-point array x under `d.x`."""
    return OPERATIONS[op](arrays, options)


# --- Ops --------------------------------------------------------------------------------------


def _run(function: Callable, arrays: Arrays, names: str) -> Arrays:
    """y, and with a dy the gradient of each of the named arrays that is there."""
    given = [name for name in names.split() if name in arrays]
    y, backward = function(*(arrays[name] for name in given))
    if "dy" not in arrays:
        return {"y": np.asarray(y)}
    gradients = backward(arrays["dy"])
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    named = {f"d.{name}": g for name, g in zip(given, gradients, strict=True)}
    return {"y": np.asarray(y)} | named


def _embedding(a: Arrays, o: Options) -> Arrays:
    return _run(lambda w: ops.embedding(a["ids"], w, o["padding_idx"]), a, "weight")


def _masked_fill(a: Arrays, o: Options) -> Arrays:
    return _run(lambda x: ops.masked_fill(x, a["mask"], o["value"]), a, "x")


def _attention_weights(a: Arrays, o: Options) -> Arrays:
    return _run(lambda q, k: ops.attention_weights(q, k, a.get("mask")), a, "q k")


def _attention(a: Arrays, o: Options) -> Arrays:
    def attention(q, k, v):
        with dropping(a["keep"]) as rng:
            return ops.attention(q, k, v, a.get("mask"), o["p"], rng)

    return _run(attention, a, "q k v")


def _causal_attention(a: Arrays, o: Options) -> Arrays:
    """The mask is not given: a key may be seen if its position <= the query's + offset."""
    mask = masks.causal_mask(a["q"].shape[-2], a["k"].shape[-2], o["offset"])
    return _run(lambda q, k, v: ops.attention(q, k, v, mask), a, "q k v")


def _layer_norm(a: Arrays, o: Options) -> Arrays:
    return _run(lambda x, w, b: ops.layer_norm(x, w, b, o["eps"]), a, "x weight bias")


def _dropout(a: Arrays, o: Options) -> Arrays:
    def dropout(x):
        with dropping(a["keep"]) as rng:
            return ops.dropout(x, o["p"], rng)

    return _run(dropout, a, "x")


@contextmanager
def dropping(keep: Array) -> Iterator[np.random.Generator]:
    """Dropout inside keeps the entries where `keep` is True; it is handed out once."""
    original = ops.dropout_mask
    ops.dropout_mask = lambda shape, p, rng: keep
    try:
        yield np.random.default_rng(0)  # never asked: it only turns dropout on
    finally:
        ops.dropout_mask = original


def _cross_entropy(a: Arrays, o: Options) -> Arrays:
    names = ("ignore_index", "label_smoothing", "n_targets")
    options = {name: o[name] for name in names}
    return _run(lambda x: ops.cross_entropy(x, a["targets"], **options), a, "logits")


# --- Layers and blocks ------------------------------------------------------------------------


def _run_module(module: Module, a: Arrays, names: str, others: str = "") -> Arrays:
    """y, the gradients of the named inputs, then those of the parameters, last layer first."""
    given = names.split()
    order = _load(module, a)
    y, backward = module(*(a[name] for name in given), *(a.get(name) for name in others.split()))
    gradients = backward(a["dy"])
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    found = {"y": y} | _gradients(module, order)
    return found | {f"d.{name}": g for name, g in zip(given, gradients, strict=True)}


def _load(module: Module, a: Arrays) -> list[Parameter]:
    """Put the arrays into the parameters; the list fills with these as backward reaches them."""
    order: list[Parameter] = []

    class Noting(Parameter):
        """Backward reads `grad`, to add to it."""

        def __getattribute__(self, name: str) -> Any:
            if name == "grad":
                order.append(self)
            return super().__getattribute__(name)

    for name, parameter in module.named_parameters():
        parameter.data[...] = a[name]
        parameter.__class__ = Noting
    return order


def _gradients(module: Module, order: list[Parameter]) -> Arrays:
    """By name, in the order in which they were finished: a tied weight is so at its last use."""
    finished = {id(parameter): i for i, parameter in enumerate(order)}
    named = sorted(module.named_parameters(), key=lambda pair: finished.get(id(pair[1]), -1))
    return {f"d.{name}": parameter.grad for name, parameter in named}


def _new(a: Arrays) -> dict[str, Any]:
    return {"rng": np.random.default_rng(0), "dtype": a["dy"].dtype}


def _sinusoidal_positions(a: Arrays, o: Options) -> Arrays:
    n, C = o["offset"] + a["x"].shape[1], a["x"].shape[2]
    module = positional.SinusoidalPositions(n, C)
    return _run(lambda x: module(x, o["offset"]), a, "x")


def _multi_head_attention(a: Arrays, o: Options) -> Arrays:
    module = MultiHeadAttention(a["query"].shape[2], o["n_heads"], **_new(a))
    return _run_module(module, a, "query key value", "mask")


def _feed_forward(a: Arrays, o: Options) -> Arrays:
    F, C = a["linear1.weight"].shape
    return _run_module(FeedForward(C, F, o["activation"], **_new(a)), a, "x")


def _encoder_layer(a: Arrays, o: Options) -> Arrays:
    return _run_module(_layer(EncoderLayer, a, o), a, "x", "mask")


def _decoder_layer(a: Arrays, o: Options) -> Arrays:
    return _run_module(_layer(DecoderLayer, a, o), a, "x memory", "mask memory_mask")


def _layer(Layer: Any, a: Arrays, o: Options) -> Module:
    F, C = a["feed_forward.linear1.weight"].shape
    kind = {name: o[name] for name in ("activation", "norm_first", "eps")}
    return Layer(C, o["n_heads"], F, **kind, **_new(a))


# --- Models and decoding ----------------------------------------------------------------------


def make_model(a: Arrays, o: Options) -> tuple[Transformer, list[Parameter]]:
    """The model of `options["config"]` with its parameters among the arrays."""
    config = TransformerConfig(**o["config"])
    dtype = next(x.dtype for x in a.values() if np.issubdtype(x.dtype, np.floating))
    model = Transformer(config, np.random.default_rng(0), dtype)
    return model, _load(model, a)


def _transformer(a: Arrays, o: Options) -> Arrays:
    model, order = make_model(a, o)
    logits, backward_model = model(a.get("src"), a["tgt"], a.get("src_mask"), a.get("tgt_mask"))
    loss, backward_loss = ops.cross_entropy(
        logits, a["targets"], model.config.tgt_pad_id, o["label_smoothing"]
    )
    backward_model(backward_loss(1.0))
    return {"logits": logits, "loss": np.asarray(loss)} | _gradients(model, order)


def _greedy(a: Arrays, o: Options) -> Arrays:
    """tokens (B, max_len): the answers without sos and eos, filled up with pads.

    By the definition, without a cache: everything is computed again for each token.
    """
    model, _ = make_model(a, o)
    pad, n_samples = model.config.tgt_pad_id, len(a["src"])
    tokens = np.full((n_samples, o["max_len"]), pad)
    running = np.full(n_samples, True)
    for t in range(o["max_len"]):
        sos = np.full((n_samples, 1), o["sos_id"])
        logits = model.infer(a["src"], np.concatenate([sos, tokens[:, :t]], axis=1))[:, -1]
        never = [token for token in (pad, o["sos_id"]) if token != o["eos_id"]]
        logits[:, never] = -np.inf
        chosen = logits.argmax(axis=-1)
        running &= chosen != o["eos_id"]
        tokens[:, t] = np.where(running, chosen, pad)
    return {"tokens": tokens}


OPERATIONS: dict[str, Callable[[Arrays, Options], Arrays]] = {
    "matmul": lambda a, o: _run(ops.matmul, a, "a b"),
    "dot": lambda a, o: _run(ops.dot, a, "a b"),
    "mv": lambda a, o: _run(ops.mv, a, "a b"),
    "mm": lambda a, o: _run(ops.mm, a, "a b"),
    "bmm": lambda a, o: _run(ops.bmm, a, "a b"),
    "linear": lambda a, o: _run(ops.linear, a, "x weight bias"),
    "embedding": _embedding,
    "softmax": lambda a, o: _run(lambda x: ops.softmax(x, a.get("mask")), a, "x"),
    "log_softmax": lambda a, o: _run(ops.log_softmax, a, "x"),
    "masked_fill": _masked_fill,
    "attention_weights": _attention_weights,
    "attention": _attention,
    "layer_norm": _layer_norm,
    "relu": lambda a, o: _run(ops.relu, a, "x"),
    "gelu": lambda a, o: _run(ops.gelu, a, "x"),
    "gelu_tanh": lambda a, o: _run(ops.gelu_tanh, a, "x"),
    "dropout": _dropout,
    "cross_entropy": _cross_entropy,
    "causal_attention": _causal_attention,
    "sinusoidal_positions": _sinusoidal_positions,
    "multi_head_attention": _multi_head_attention,
    "feed_forward": _feed_forward,
    "encoder_layer": _encoder_layer,
    "decoder_layer": _decoder_layer,
    "transformer": _transformer,
    "decoder_only": _transformer,
    "greedy": _greedy,
}


def target() -> Callable[[str, Arrays, Options], Arrays]:
    """npformer itself:  python -m npformer.testing --target npformer.testing.reference:target"""
    return reference
