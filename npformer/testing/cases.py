"""The cases of the kit: what an implementation is asked, what is right, and how far it may be off.

    level      operations
    op         the 18 ops; numbers drawn by the strategies of op_cases.py, bounds derived there
    layer      linear, embedding, layer_norm on ordinary numbers; multi-head attention,
               feed-forward, positions, causal masks
    block      encoder_layer, decoder_layer
    model      transformer, decoder_only: logits, loss, the gradient of every parameter
    decoding   greedy: the tokens

Everything follows from a seed.  Layers and above: sizes that all differ, weights as they are after
training (no bias is 0, no gamma 1), masks with rows that have nothing to attend to; of every two
cases the first is the tame one, with ordinary padding and no mask besides.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from npformer import compare, ops
from npformer.attention import MultiHeadAttention
from npformer.config import TransformerConfig
from npformer.decoder import DecoderLayer
from npformer.encoder import EncoderLayer
from npformer.feedforward import FeedForward
from npformer.module import Module
from npformer.options import integer
from npformer.testing.conformance import GRADIENT, N_NUDGED, OUTPUT, randomise, stacked
from npformer.testing.op_cases import OP_CASES, OpCase, in_float64
from npformer.testing.reference import OPERATIONS, reference
from npformer.testing.strategies import random_like
from npformer.transformer import Transformer

Array = np.ndarray
Arrays = dict[str, Array]
LEVELS = ("op", "layer", "block", "model", "decoding")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Case:
    """One question.  All that an implementation sees of it is op, arrays and options."""

    name: str  # "op.layer_norm-3"
    level: str
    op: str
    dtype: str  # of the floating-point arrays, and of the answer: float32 or float64
    arrays: Arrays
    options: dict[str, Any]
    expected: Arrays  # outputs, then gradients under d.<name>; computed in float64
    bounds: dict[str, Any]  # absolute errors, a number or an array, for each expected one


def make_cases(
    levels: tuple[str, ...] = LEVELS,
    n: int = 20,
    seed: int = 0,
    dtype: str = "float64",
    fixed: dict[str, Any] | None = None,
    only: tuple[str, ...] = (),
) -> list[Case]:
    """`n` cases of every operation at these levels.

    fixed    fields of TransformerConfig that are not drawn: {"norm_first": False}
    only     these operations, if any are named
    """
    n, seed = integer("examples", n, 1), integer("seed", seed, 0)
    make = {"op": op_cases, "layer": layers, "block": blocks, "model": models, "decoding": decoding}
    asked = only or tuple(OPERATIONS)
    return [
        case
        for level in levels
        for case in make[level](n, seed, np.dtype(dtype), fixed or {}, asked)
    ]


def parse_fixed(texts: list[str]) -> dict[str, Any]:
    """{"norm_first": False} of ["norm_first=false"].  Raises ValueError."""
    known = {field.name for field in fields(TransformerConfig)}
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known or not value:
            raise ValueError(f"--fix {text}: expected NAME=VALUE, a field of TransformerConfig")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name] = value  # a string
    return found


def check_operations(names: list[str]) -> tuple[str, ...]:
    """Raises ValueError for a name that is no operation."""
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f"--only {name}: the operations are {', '.join(OPERATIONS)}")
    return tuple(names)


def drawn(strategy: st.SearchStrategy, n: int, seed: int) -> list:
    """`n` examples of a Hypothesis strategy, the same for the same seed.

    The bytes that the choices are made of are ours: Hypothesis' own generator also looks at which
    modules are loaded, for numbers that may matter to them.
    """
    found: list = []

    @settings(database=None, deadline=None)
    @given(strategy)
    def collect(example):
        found.append(example)

    rng = np.random.default_rng(seed)
    while len(found) < n:
        collect.hypothesis.fuzz_one_input(rng.bytes(8192))  # type: ignore[attr-defined]
    return found


# --- Ops --------------------------------------------------------------------------------------


def op_cases(
    n: int, seed: int, dtype: Any, fixed: dict[str, Any], asked: tuple[str, ...]
) -> Iterator[Case]:
    for op_case in OP_CASES:
        if op_case.name.split()[0] not in asked:
            continue
        name = op_case.name.replace(" ", "_")
        for i, example in enumerate(drawn(op_case.examples(dtype), n, seed)):
            yield op_case_of(f"op.{name}-{i}", op_case, example, seed + i, dtype)


def op_case_of(name: str, op_case: OpCase, example: Any, seed: int, dtype: Any) -> Case:
    """One drawn example of an op as a case: its arrays by name, its dropout mask drawn."""
    op = op_case.name.split()[0]
    names = list(inspect.signature(op_case.op).parameters)
    arrays = dict(zip(names, example.arrays, strict=False))
    y, _ = op_case.op(*example.arrays, **example.options)
    dy = random_like(np.shape(y), dtype, seed)

    options = dict(example.options)
    if op == "layer_norm":
        options["eps"] = 1e-5
    if op == "masked_fill":
        options["value"] = float(dtype.type(options["value"]))  # one that the dtype has
    if "seed" in options:  # no two libraries draw the same entries: these are given
        rng, p = np.random.default_rng(options.pop("seed")), options["p"]
        shape = y.shape if op == "dropout" else (*arrays["q"].shape[:-1], arrays["k"].shape[-2])
        arrays["keep"] = ops.dropout_mask(shape, p, rng) if p else np.full(shape, True)
    for key in ("ids", "targets", "mask"):
        if isinstance(options.get(key), np.ndarray):
            arrays[key] = options.pop(key)
    options.pop("mask", None)
    arrays = plain(arrays | {"dy": dy})

    expected = reference(op, cast(arrays, np.float64), options)
    bounds = op_case.bounds(in_float64(example), dy.astype(np.float64), dtype)
    allowed = dict(zip(expected, (bounds.value, *bounds.gradients), strict=True))
    return Case(name, "op", op, dtype.name, arrays, options, expected, allowed)


def plain(arrays: Arrays) -> Arrays:
    """Contiguous copies, and every id an int64: what any library can take."""
    return {
        name: np.array(x, np.int64 if np.issubdtype(x.dtype, np.integer) else x.dtype, order="C")
        for name, x in arrays.items()
    }


def cast(arrays: Arrays, dtype: Any) -> Arrays:
    return {name: x.astype(dtype) if is_float(x) else x for name, x in arrays.items()}


def is_float(x: Array) -> bool:
    return np.issubdtype(x.dtype, np.floating)


# --- Layers and blocks: of each operation a function (rng, i, fixed) -> arrays, options, n ----


def layers(
    n: int, seed: int, dtype: Any, fixed: dict[str, Any], asked: tuple[str, ...]
) -> Iterator[Case]:
    yield from _of_level("layer", LAYERS, n, seed, dtype, fixed, asked)


def blocks(
    n: int, seed: int, dtype: Any, fixed: dict[str, Any], asked: tuple[str, ...]
) -> Iterator[Case]:
    yield from _of_level("block", BLOCKS, n, seed, dtype, fixed, asked)


def _of_level(level, table, n, seed, dtype, fixed, asked) -> Iterator[Case]:
    for op, make in table.items():
        for i in range(n if op in asked else 0):
            rng = np.random.default_rng([seed, i])
            arrays, options, n_summed = make(rng, i, {"dtype": dtype.name} | fixed)
            yield measured(f"{level}.{op}-{i}", level, op, arrays, options, n_summed, dtype)


def measured(
    name: str, level: str, op: str, arrays: Arrays, options: dict, n_summed: int, dtype: Any
) -> Case:
    """The expected values, and the bounds: a share of the largest, in float32 the rule of peers."""
    arrays = plain(cast(arrays, dtype))
    in_double = cast(arrays, np.float64)
    expected = reference(op, in_double, options)
    gradients = [key for key in expected if key.startswith("d.")]
    outputs = [key for key in expected if key not in gradients]
    if dtype == np.float64:
        top = {key: float(np.abs(x).max(initial=0)) for key, x in expected.items()}
        largest = max((top[key] for key in gradients), default=0.0)
        bounds = {key: OUTPUT * top[key] for key in outputs}
        bounds |= {key: GRADIENT * largest for key in gradients}
    else:
        rng = np.random.default_rng(0)
        peer = reference(op, arrays, options)
        nudged = stacked([reference(op, _nudged(in_double, rng), options) for _ in range(N_NUDGED)])
        bounds = compare.peer_bounds(peer, expected, nudged, n_summed, outputs)
    return Case(name, level, op, dtype.name, arrays, options, expected, bounds)


def _nudged(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    return {name: compare.nudge(x, rng) if is_float(x) else x for name, x in arrays.items()}


def _sizes(rng: np.random.Generator, n: int, largest: int = 7) -> list[int]:
    """n different sizes from 2 up."""
    return [int(k) for k in 2 + rng.permutation(max(largest, n) - 1)[:n]]


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape)


def _mask(rng: np.random.Generator, i: int, B: int, H: int, T: int, S: int) -> Arrays:
    """Padding on the right, anything, no mask, anything with rows that are all False; and again.

    (B, 1, 1, S) or (B, H, T, S), True = may attend
    """
    kind = i % 4
    if kind == 0:
        return {"mask": (np.arange(S) < rng.integers(1, S + 1, (B, 1)))[:, None, None, :]}
    if kind == 2:
        return {}
    mask = rng.random((B, H, T, S)) < 0.6
    mask[..., 0] |= ~mask.any(axis=-1)
    if kind == 3:
        mask[rng.integers(B), :, rng.integers(T)] = False
    return {"mask": mask}


def _linear(rng, i, fixed):
    B, T, n_in, n_out = _sizes(rng, 4)
    arrays = {"x": _normal(rng, B, T, n_in), "weight": _normal(rng, n_out, n_in)}
    arrays |= {"bias": _normal(rng, n_out), "dy": _normal(rng, B, T, n_out)}
    return arrays, {}, n_in + n_out + B * T


def _embedding(rng, i, fixed):
    B, T, V, C = _sizes(rng, 4)
    arrays = {"weight": _normal(rng, V, C), "ids": rng.integers(0, V, (B, T))}
    return arrays | {"dy": _normal(rng, B, T, C)}, {"padding_idx": int(rng.integers(V))}, B * T


def _layer_norm(rng, i, fixed):
    B, T, C = _sizes(rng, 3)
    arrays = {"x": 0.5 + 2 * _normal(rng, B, T, C + 1), "weight": 1 + 0.3 * _normal(rng, C + 1)}
    arrays |= {"bias": _normal(rng, C + 1), "dy": _normal(rng, B, T, C + 1)}
    return arrays, {"eps": _fix(fixed, "eps", [1e-5, 1e-2][i % 2])}, 4 * C + B * T


def _fix(fixed: dict[str, Any], name: str, otherwise: Any) -> Any:
    return fixed.get(name, otherwise)


def _parameters(module: Module, rng: np.random.Generator) -> Arrays:
    randomise(module, int(rng.integers(2**32)))
    return {name: p.data.copy() for name, p in module.named_parameters()}


def _activation(fixed: dict[str, Any], i: int) -> str:
    """In float32 no relu: a rounding may change its sign, and with it everything after."""
    choices = ACTIVATIONS if fixed["dtype"] == "float64" else ACTIVATIONS[1:]
    return _fix(fixed, "activation", choices[i % len(choices)])


def _multi_head_attention(rng, i, fixed):
    B, T, S, H, D = _sizes(rng, 5)
    C = H * D
    module = MultiHeadAttention(C, H, rng=rng, dtype=np.float64)
    arrays = {"query": _normal(rng, B, T, C), "key": _normal(rng, B, S, C)}
    arrays |= {"value": _normal(rng, B, S, C), "dy": _normal(rng, B, T, C)}
    arrays |= _mask(rng, i, B, H, T, S) | _parameters(module, rng)
    return arrays, {"n_heads": H}, 4 * C + D + S + B * (T + S)


def _causal_attention(rng, i, fixed):
    B, T, S, D, offset = _sizes(rng, 5)
    offset = 0 if i % 2 == 0 else offset
    S = S if offset == 0 else T + offset + (i % 4 == 3)  # a warm cache, maybe with a key too many
    arrays = {"q": _normal(rng, B, T, D), "k": _normal(rng, B, S, D), "v": _normal(rng, B, S, D)}
    return arrays | {"dy": _normal(rng, B, T, D)}, {"offset": offset}, 2 * D + S + T


def _feed_forward(rng, i, fixed):
    B, T, C, F = _sizes(rng, 4)
    module = FeedForward(C, F, rng=rng, dtype=np.float64)
    arrays = {"x": _normal(rng, B, T, C), "dy": _normal(rng, B, T, C)} | _parameters(module, rng)
    return arrays, {"activation": _activation(fixed, i)}, 2 * (C + F + B * T)


def _sinusoidal_positions(rng, i, fixed):
    B, T, C = _sizes(rng, 3, 12)
    x, dy = _normal(rng, B, T, C), _normal(rng, B, T, C)
    return {"x": x, "dy": dy}, {"offset": [0, 5][i % 2]}, B


def _layer_options(fixed, i, H):
    return {
        "n_heads": H,
        "activation": _activation(fixed, i),
        "norm_first": _fix(fixed, "norm_first", i % 4 in (1, 2)),
        "eps": _fix(fixed, "eps", [1e-5, 1e-2][i % 3 == 2]),
    }


def _encoder_layer(rng, i, fixed):
    B, S, H, D, F = _sizes(rng, 5)
    C = H * D
    module = EncoderLayer(C, H, F, rng=rng, dtype=np.float64)
    arrays = {"x": _normal(rng, B, S, C), "dy": _normal(rng, B, S, C)}
    arrays |= _mask(rng, i, B, H, S, S) | _parameters(module, rng)
    return arrays, _layer_options(fixed, i, H), 13 * C + F + S + B * S


def _decoder_layer(rng, i, fixed):
    B, T, S, H, D, F = _sizes(rng, 6)
    C = H * D
    module = DecoderLayer(C, H, F, rng=rng, dtype=np.float64)
    arrays = {"x": _normal(rng, B, T, C), "memory": _normal(rng, B, S, C)}
    arrays |= {"dy": _normal(rng, B, T, C)} | _parameters(module, rng)
    arrays["mask"] = np.tri(T, dtype=bool)
    if given := _mask(rng, i, B, H, T, S):
        arrays["memory_mask"] = given["mask"]
    return arrays, _layer_options(fixed, i, H), 18 * C + F + T + S + B * (T + S)


LAYERS: dict[str, Callable] = {
    "linear": _linear,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "causal_attention": _causal_attention,
    "multi_head_attention": _multi_head_attention,
    "feed_forward": _feed_forward,
    "sinusoidal_positions": _sinusoidal_positions,
}
BLOCKS: dict[str, Callable] = {"encoder_layer": _encoder_layer, "decoder_layer": _decoder_layer}


# --- Models and decoding ----------------------------------------------------------------------


def models(
    n: int, seed: int, dtype: Any, fixed: dict[str, Any], asked: tuple[str, ...]
) -> Iterator[Case]:
    for op, has_encoder in (("transformer", True), ("decoder_only", False)):
        if op not in asked:
            continue
        if "n_encoder_layers" in fixed and bool(fixed["n_encoder_layers"]) != has_encoder:
            continue
        for i in range(n):
            rng = np.random.default_rng([seed, i])
            config = _config(rng, i, {"dtype": dtype.name} | fixed, has_encoder)
            arrays = _batch(rng, i, config) | _model(config, rng)
            options = {"config": asdict(config), "label_smoothing": [0.0, 0.1][i // 2 % 2]}
            C, F, layers = config.d_model, config.d_ff, config.n_encoder_layers
            n_summed = (layers + config.n_decoder_layers) * (18 * C + F) + sum(
                x.size for x in (arrays["tgt"], arrays.get("src", arrays["tgt"]))
            )
            yield measured(f"model.{op}-{i}", "model", op, arrays, options, n_summed, dtype)


def _config(
    rng: np.random.Generator, i: int, fixed: dict[str, Any], has_encoder: bool
) -> TransformerConfig:
    """Case 0 is the paper's, small; from then on every field is drawn but those that are fixed."""
    heads, d_head, d_ff = [(2, 4, 11), (3, 4, 7), (1, 5, 7), (4, 3, 13)][i % 4]
    choose = (lambda a, b: a) if i == 0 else (lambda a, b: [a, b][rng.integers(2)])
    shared = choose(False, True)
    values: dict[str, Any] = dict(
        src_vocab_size=11 if shared else 10,
        tgt_vocab_size=11 if shared else 9,
        d_model=heads * d_head,
        n_heads=heads,
        d_ff=d_ff,
        n_encoder_layers=choose(2, 1) if has_encoder else 0,
        n_decoder_layers=choose(2, 1),
        max_len=14,
        activation=_activation(fixed, i),
        norm_first=choose(False, True),
        final_norm=choose(False, True),
        positions=choose("sinusoidal", "learned"),
        scale_embedding=choose(True, False),
        share_embeddings=shared,
        tie_head=choose(False, True),
        eps=choose(1e-5, 1e-2),
    )
    values["src_pad_id"] = values["tgt_pad_id"] = 0 if i < 2 else int(rng.integers(9))
    for kind in ("embedding", "attention", "activation", "sublayer"):
        values[f"{kind}_dropout"] = 0.0
    return TransformerConfig(**(values | {k: v for k, v in fixed.items() if k != "dtype"}))


def _batch(rng: np.random.Generator, i: int, config: TransformerConfig) -> Arrays:
    """Even cases: padding on the right.  Odd: pads anywhere, and masks besides."""
    B, S, T = 3, 6, 5

    def ids(n: int, vocab_size: int, pad: int) -> Array:
        found = (pad + rng.integers(1, vocab_size, (B, n))) % vocab_size  # no pad
        lengths = np.array([n, *rng.integers(1, n + 1, B - 1)])[:, None]
        padded = np.arange(n) >= lengths if i % 2 == 0 else rng.random((B, n)) < 0.3
        padded[0, -1] = False  # there is a target
        return np.where(padded, pad, found)

    tgt = ids(T + 1, config.tgt_vocab_size, config.tgt_pad_id)
    arrays = {"tgt": tgt[:, :-1], "targets": tgt[:, 1:]}
    if config.n_encoder_layers:
        arrays["src"] = ids(S, config.src_vocab_size, config.src_pad_id)
    if i % 2:
        arrays["tgt_mask"] = rng.random((B, 1, T, T)) < 0.8
        if config.n_encoder_layers:
            arrays["src_mask"] = rng.random((B, config.n_heads, S, S)) < 0.8
    return arrays


def _model(config: TransformerConfig, rng: np.random.Generator) -> Arrays:
    return _parameters(Transformer(config, rng, np.float64), rng)


def decoding(
    n: int, seed: int, dtype: Any, fixed: dict[str, Any], asked: tuple[str, ...]
) -> Iterator[Case]:
    """Models and sources for which no token is a close call: no rounding can change the answer."""
    if fixed.get("n_encoder_layers") == 0 or "greedy" not in asked:
        return
    for i in range(n):
        for attempt in range(200):
            rng = np.random.default_rng([seed, i, attempt])
            paddings = {"src_pad_id": 0, "tgt_pad_id": 0}  # 1 and 2 are sos and eos
            config = _config(rng, i, {"dtype": dtype.name} | paddings | fixed, True)
            arrays = {"src": _batch(rng, 0, config)["src"]} | _model(config, rng)
            options = {"config": asdict(config), "max_len": 8, "sos_id": 1, "eos_id": 2}
            arrays = plain(cast(arrays, dtype))
            tokens = reference("greedy", cast(arrays, np.float64), options)["tokens"]
            is_clear = _margin(cast(arrays, np.float64), options, tokens) > 1e-3
            if is_clear and len(np.unique(tokens)) > 3:
                break
        else:
            raise ValueError("no model with clear answers was found; fix fewer fields")
        expected, bounds = {"tokens": tokens}, {"tokens": 0.0}
        name = f"decoding.greedy-{i}"
        yield Case(name, "decoding", "greedy", dtype.name, arrays, options, expected, bounds)


def _margin(arrays: Arrays, options: dict[str, Any], tokens: Array) -> float:
    """How far the best logit was ahead of the next one, at the closest of all calls, relatively."""
    config = TransformerConfig(**options["config"])
    model = Transformer(config, np.random.default_rng(0), np.float64)
    model.load_state_dict({k: v for k, v in arrays.items() if k != "src"})
    closest = math.inf
    for src, answer in zip(arrays["src"], tokens, strict=True):
        length = int((answer != config.tgt_pad_id).sum())
        read = np.array([[options["sos_id"], *answer[: min(length, len(answer) - 1)]]])
        logits = model.infer(src[None], read)[0]  # (T, V)
        never = {config.tgt_pad_id, options["sos_id"]} - {options["eos_id"]}
        logits[:, sorted(never)] = -np.inf
        best = np.sort(logits, axis=-1)[:, -2:]
        closest = min(closest, float((best[:, 1] - best[:, 0]).min() / np.abs(best).max()))
    return closest
