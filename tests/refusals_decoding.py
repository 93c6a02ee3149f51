"""Ids, masks and the options of decoding: rows of the table of test_refusals.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from refusals import NO_INTEGERS, NO_NUMBERS, NOT_FINITE, SMALL, Row, rows

import npformer
import torchformer
from torchformer import fast

ALONE = replace(SMALL, n_encoder_layers=0)
TWO = replace(SMALL, tgt_vocab_size=2)  # a pad and a start, and nothing to say
B, T, S = 2, 4, 5  # and 2 heads
SRC, TGT = np.full((B, S), 3), np.full((B, T), 4)


def _pair(config: npformer.TransformerConfig) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return npformer.Transformer(config, rng), torchformer.Transformer(config, rng).eval()


OURS, THEIRS = _pair(SMALL)


# --- Decoding ---------------------------------------------------------------------------------

NO_RNG = [None, 0, np.random, np.random.RandomState(0)]
KINDS = ("float64", "float32", "bool")
NO_ENDS = [x for x in NO_INTEGERS if not (x is None or isinstance(x, list))]


def _decoding(what: str, ours: Callable, theirs: Callable) -> list[Row]:
    """Of any way to decode: max_len, sos_id and eos_id, and what is decoded."""

    def of(name: str, message: str, values: list) -> list[Row]:
        return rows(
            f"{what} {name}",
            ours and (lambda x: ours(OURS, SRC, **{"max_len": 3} | {name: x})),
            lambda x: theirs(THEIRS, torch.tensor(SRC), **{"max_len": 3} | {name: x}),
            message,
            values,
        )

    def on(config: Any, source: np.ndarray, message: str, error=ValueError, **options: Any):
        model, twin = _pair(config)
        options = {"max_len": 3} | options
        return Row(
            f"{what} {message}",
            ours and (lambda: ours(model, source, **options)),
            lambda: theirs(twin, torch.tensor(source), **options),
            message,
            error,
        )

    return [
        *of("max_len", "^max_len must be (an integer|1 to 15), got ", [*NO_INTEGERS, 0, -1, 16]),
        *of(
            "sos_id", "^sos_id must be (an integer|0 to 8, a token's), got ", [*NO_INTEGERS, -1, 9]
        ),
        *of("eos_id", "^eos_id must be (an integer|0 to 8, a token's), got ", [*NO_ENDS, -1, 99]),
        *of("eos_id", "^eos_id must be ", [[2, 9], (True,), [2, 2.0], np.array([-1, 2]), ["2"]]),
        *of("eos_id", "^eos_id is empty: pass None where ", [[], (), np.array([], int)]),
        on(ALONE, SRC, "the model is decoder-only, there is no source to decode from"),
        on(TWO, SRC, "none of the 2 tokens may be chosen", eos_id=None),
        on(SMALL, SRC[0], r"src must be an? \w+ \(B, S\) of integer ids, got shape \(5,\)"),
        *(
            on(SMALL, SRC.astype(kind), f"ids must be an integer .*{kind}", TypeError)
            for kind in KINDS
        ),
    ]


def _sample(model: Any, src: Any, **options: Any) -> Any:
    return npformer.sample(model, src, **{"rng": np.random.default_rng(0)} | options)


def _sample_twin(model: Any, src: Any, **options: Any) -> Any:
    return torchformer.sample(model, src, **{"rng": torch.Generator()} | options)


def _options() -> list[Row]:
    def of(ours: Callable, theirs: Callable, name: str, message: str, values: list, error: type):
        return rows(
            name,
            lambda x: ours(OURS, SRC, max_len=3, **{name: x}),
            lambda x: theirs(THEIRS, torch.tensor(SRC), max_len=3, **{name: x}),
            message,
            values,
            error,
        )

    found = []
    for name, message, values in [
        ("num_beams", "^num_beams must be (an integer|at least 1)", [*NO_INTEGERS, 0, -1]),
        (
            "num_return_sequences",
            "^num_return_sequences must be (an integer|1 to num_beams = 5), got ",
            [*NO_INTEGERS, 0, 6],
        ),
        (
            "length_penalty",
            "^length_penalty (must be (a number|finite)|is a power of the length), got ",
            [*NO_NUMBERS, *NOT_FINITE, 1e4, -1e4],
        ),
        ("early_stopping", "^early_stopping must be true or false, got", [None, 1, "never"]),
    ]:
        ours, theirs = npformer.beam_search, torchformer.beam_search
        found += of(ours, theirs, name, message, values, ValueError)
    for name, message, values in [
        (
            "temperature",
            "^temperature must be (positive|a number), got ",
            [*NO_NUMBERS, *NOT_FINITE, 0, -1.0, 1e-310],
        ),
        ("top_k", "^top_k must be (an integer|at least 0), got ", [*NO_INTEGERS, -1]),
        (
            "top_p",
            r"^top_p must be (a number|in \(0, 1\]), got ",
            [*NO_NUMBERS, *NOT_FINITE, 0, -0.1, 1.1],
        ),
    ]:
        found += of(_sample, _sample_twin, name, message, values, ValueError)
    message = "^rng must be a generator, such as .*, got "
    found += of(_sample, _sample_twin, "rng", message, NO_RNG, TypeError)
    theirs = "the other library's rng"
    return [
        *found,
        *rows(theirs, lambda x: _sample(OURS, SRC, max_len=3, rng=x), None, message,
              [torch.Generator()], TypeError),
        *rows(theirs, None, lambda x: _sample_twin(THEIRS, torch.tensor(SRC), max_len=3, rng=x),
              message, [np.random.default_rng(0)], TypeError),
    ]  # fmt: skip


def _continued() -> list[Row]:
    """What there is in torchformer alone: fast.continued."""
    _, alone = _pair(ALONE)
    prompt = torch.tensor(TGT)

    def of(name: str, message: str, values: list) -> list[Row]:
        options: dict[str, Any] = {"prompt": prompt, "n_tokens": 3}
        return rows(
            f"continued {name}",
            None,
            lambda x: fast.continued(alone, **options | {name: x}),
            message,
            values,
        )

    padded = [[[4, 4], [4, 0]], [[4, 4], [0, 4]], [[0, 4], [0, 4]], [[4, 0, 4]]]
    return [
        *of("n_tokens", "^n_tokens must be (an integer|at least 1)", [*NO_INTEGERS, 0, -1]),
        *of("n_tokens", "^max_len must be 1 to 15, got 16", [13]),
        *of("look_every", "^look_every must be (an integer|at least 1)", [*NO_INTEGERS, 0]),
        *of("never", "^never must be ", [[9], [-1], [1.0], [True]]),
        *of("eos_id", "^eos_id must be ", [9, -1, [2, 9], 2.0]),
        *of("prompt", "^prompt has pads, ", [torch.tensor(ids) for ids in padded]),
        *of("prompt", r"prompt must be a tensor \(B, P\)", [[[4]], torch.tensor([4])]),
        Row(
            "never and eos_id",
            None,
            lambda: fast.continued(alone, prompt, 3, never=[1, 2], eos_id=[2]),
            "^never and eos_id contradict each other: 2 is in both",
        ),
    ]


# --- Masks ------------------------------------------------------------------------------------


def _makers() -> list[Row]:
    """What makes masks: with a pad of '0' nothing was a pad, and 2.5 keys back were 3."""
    ours, theirs, ids = npformer.masks, torchformer.masks, torch.tensor(SRC)
    found = rows(
        "padding_mask pad_id",
        lambda x: ours.padding_mask(SRC, x),
        lambda x: theirs.padding_mask(ids, x),
        "^padding_mask: pad_id must be an integer, got ",
        NO_INTEGERS[1:],
    )
    right = {"T": 2, "S": 3, "width": 2, "offset": 0}
    for maker, names in (("causal_mask", "T S offset"), ("window_mask", "T S width offset")):
        for name in names.split():
            values = NO_INTEGERS[1:] + [None] * (name != "S" or maker == "window_mask")
            f, g = (
                lambda x, module=module, maker=maker, names=names, name=name: getattr(
                    module, maker
                )(**{key: right[key] for key in names.split()} | {name: x})
                for module in (ours, theirs)
            )
            found += rows(f"{maker} {name}", f, g, f"^{maker}: {name} must be an integer", values)
    return found


WRONG_SHAPES = {
    "none": (),
    "one axis": (S,),
    "a pad mask (B, S)": (B, S),
    "(1, S)": (1, S),
    "(T, 1)": (T, 1),
    "one per sample (B, T, S)": (B, T, S),
    "one per head (H, T, S)": (2, T, S),
    "(1, T, S)": (1, T, S),
    "another T": (B, 1, T + 1, S),
    "another S": (B, 1, T, S + 1),
    "one key for all": (B, 1, T, 1),
    "another H": (B, 3, T, S),
    "another B": (B + 1, 1, 1, S),
    "five axes": (1, B, 2, T, S),
}


def _masks() -> list[Row]:
    """At every entrance: the shapes that are not (T, S) or (B or 1, H or 1, T or 1, S)."""
    C, memory, x = 8, np.ones((B, S, 8), np.float32), np.ones((B, T, 8), np.float32)
    rng = np.random.default_rng(0)
    layers = (npformer.EncoderLayer(C, 2, 12, rng=rng), npformer.DecoderLayer(C, 2, 12, rng=rng))
    twins = (torchformer.EncoderLayer(C, 2, 12), torchformer.DecoderLayer(C, 2, 12))
    square = memory  # S queries of S keys

    def layered(package: Any, encoder_layer: Any, decoder_layer: Any, attention: Any, of: Callable):
        encoder, decoder = package.Encoder([encoder_layer]), package.Decoder([decoder_layer])
        x_, memory_, square_ = of(x), of(memory), of(square)
        return {
            "attention": lambda mask: attention(x_, memory_, memory_, mask),
            "encoder layer": lambda mask: encoder_layer(square_, mask),
            "encoder": lambda mask: encoder(square_, mask),
            "decoder layer": lambda mask: decoder_layer(square_, memory_, mask),
            "decoder layer memory": lambda mask: decoder_layer(x_, memory_, None, mask),
            "decoder": lambda mask: decoder(square_, memory_, mask),
            "decoder memory": lambda mask: decoder(x_, memory_, None, mask),
            "decoder step": lambda mask: decoder.step(x_, decoder.start(memory_), None, mask),
        }

    def whole(model: Any, of: Callable) -> dict[str, Callable]:
        src, tgt, five, memory_ = of(SRC), of(TGT), of(np.full((B, S), 4)), of(memory)

        def stepped(mask: Any) -> Any:
            _, cache = model.step(tgt[:, :1], model.start(src))
            return model.step(tgt, cache, mask)  # the T that come after one: S keys

        return {
            "forward src_mask": lambda mask: model(src, tgt, mask),
            "forward tgt_mask": lambda mask: model(src, five, None, mask),
            "infer src_mask": lambda mask: model.infer(src, tgt, src_mask=mask),
            "infer tgt_mask": lambda mask: model.infer(src, five, tgt_mask=mask),
            "encode src_mask": lambda mask: model.encode(src, mask),
            "start src_mask": lambda mask: model.start(src, mask),
            "decode memory_mask": lambda mask: model.decode(tgt, memory_, mask),
            "decode tgt_mask": lambda mask: model.decode(five, memory_, None, mask),
            "step tgt_mask": stepped,
        }

    ours = layered(
        npformer, *layers, npformer.MultiHeadAttention(C, 2, rng=rng), lambda a: a
    ) | whole(OURS, lambda a: a)
    theirs = layered(
        torchformer, *twins, torchformer.MultiHeadAttention(C, 2), torch.from_numpy
    ) | whole(THEIRS, torch.from_numpy)
    asked_by_s = {"attention", "step tgt_mask", "decode memory_mask", "decoder step"}
    found = []
    for entrance in ours:
        name = entrance.split()[-1] if entrance.endswith("_mask") else "mask"
        has_t = entrance in asked_by_s or entrance.endswith("memory")
        for what, shape in WRONG_SHAPES.items():
            mask = np.full(
                shape if has_t else tuple({T: S, T + 1: 9}.get(n, n) for n in shape), True
            )
            message = (
                rf"{name} of shape \(.*\) (does not broadcast to \(B, H, T, S\) = |has 3 axes: is "
                rf"the first one B or H\?).*; a padding mask is \(B, 1, 1, S\), "
                rf"{name}\[:, None, None, :\], a causal .*, {name}\[:, None\]$"
            )
            found.append(
                Row(
                    f"{entrance}: {what}",
                    lambda call=ours[entrance], mask=mask: call(mask),
                    lambda call=theirs[entrance], mask=mask: call(torch.tensor(mask)),
                    message,
                )
            )
        for mask in (np.ones((T, S)), np.ones((T, S), int)):
            found.append(
                Row(
                    f"{entrance}: {mask.dtype}",
                    lambda call=ours[entrance], mask=mask: call(mask),
                    lambda call=theirs[entrance], mask=mask: call(torch.tensor(mask)),
                    f"{name} must be boolean, True = may attend",
                    TypeError,
                )
            )
    return found


def _memory() -> list[Row]:
    """What `decode` is given to ask."""
    (alone, twin), memory = _pair(ALONE), np.ones((B, S, 8), np.float32)
    mask = np.full((B, 1, 1, S), True)
    found = []
    for what, models, arguments, message in [
        ("no memory", (OURS, THEIRS), (None,), "memory is None, but the model has an encoder"),
        ("a memory", (alone, twin), (memory,), "memory must be None, the model is decoder-only"),
        ("a mask of none", (alone, twin), (None, mask), "memory_mask is given, but there is no m"),
        ("other samples", (OURS, THEIRS), (memory[:1],), r"memory must be \(B, S, C\) with B = 2"),
        ("no axis B", (OURS, THEIRS), (memory[0],), r"memory must be \(B, S, C\)"),
    ]:
        tensors = [None if x is None else torch.tensor(x) for x in arguments]
        found.append(
            Row(
                f"decode {what}",
                lambda model=models[0], given=arguments: model.decode(TGT, *given),
                lambda model=models[1], given=tensors: model.decode(torch.tensor(TGT), *given),
                message,
            )
        )
    return found


ROWS: list[Row] = [
    *_decoding("greedy", npformer.greedy, torchformer.greedy),
    *_decoding("fast greedy", None, fast.greedy),
    *_decoding("beam_search", npformer.beam_search, torchformer.beam_search),
    *_decoding("sample", _sample, _sample_twin),
    *_options(),
    *_continued(),
    *_makers(),
    *_masks(),
    *_memory(),
]
