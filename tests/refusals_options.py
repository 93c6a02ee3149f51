"""Hyper-parameters and options: rows of the table of test_refusals.py."""

import inspect
import math
from dataclasses import fields

import numpy as np
import torch
from refusals import NO_INTEGERS, NO_NUMBERS, NOT_FINITE, SMALL, Row, rows

import npformer
import torchformer.parallel
import torchformer.training
from npformer import normalize, tasks
from npformer.testing.cases import make_cases
from npformer.training import Recipe, Trainer, run


def _config() -> list[Row]:
    """One class for both twins, so both are asked through their own name for it."""
    found = []
    values = {int: NO_INTEGERS, float: [*NO_NUMBERS, -0.1, float("nan"), float("inf")]}
    values |= {str: [None, 1, "", "no such"], bool: [1, 0, "true"]}
    for field in fields(npformer.TransformerConfig):
        kind = bool if field.name == "final_norm" else type(field.default)
        kind = kind if kind in values else int
        ours, theirs = (
            lambda value, name=field.name, package=package: package.TransformerConfig(
                **{f.name: getattr(SMALL, f.name) for f in fields(SMALL)} | {name: value}
            )
            for package in (npformer, torchformer)
        )
        found += rows(f"config {field.name}", ours, theirs, f"^{field.name} ", values[kind])
    return found


X = np.ones((2, 3, 4), np.float32)
IDS = np.zeros((2, 3), np.int64)
RNG = np.random.default_rng(0)
NO_PROBABILITIES = [*NO_NUMBERS, -0.1, 1.1, *NOT_FINITE]
NO_SIZES = [*NO_INTEGERS, 0, -3]
NO_EPS = [*NO_NUMBERS, -1e-5, *NOT_FINITE]


def _ops() -> list[Row]:
    """Of the ops that torchformer has; the twins of the others are torch's own."""
    w, b = np.ones(4, np.float32), np.zeros(4, np.float32)
    x = torch.from_numpy(X)
    ours = npformer.ops
    entropy = lambda **options: ours.cross_entropy(X, IDS, **options)  # noqa: E731
    return [
        *rows(
            "dropout p",
            lambda p: ours.dropout(X, p, RNG),
            lambda p: torchformer.ops.dropout(x, p, True),
            r"^dropout: p (is a probability|must be a number), got ",
            NO_PROBABILITIES,
        ),
        *rows(
            "attention p",
            lambda p: ours.attention(X, X, X, None, p),
            lambda p: torchformer.ops.attention(x, x, x, None, p),
            r"^dropout: p (is a probability|must be a number), got ",
            NO_PROBABILITIES,
        ),
        *rows(
            "layer_norm eps",
            lambda eps: ours.layer_norm(X, w, b, eps),
            None,
            r"^layer_norm: eps must be (at least 0 and finite|a number), got ",
            NO_EPS,
        ),
        *rows(
            "masked_fill value",
            lambda value: ours.masked_fill(X, X > 0, value),
            None,
            "^masked_fill: value must be a number, got ",
            NO_NUMBERS,
        ),
        *rows(
            "padding_idx",
            lambda i: ours.embedding(IDS, X[0], i),
            None,
            r"^embedding: padding_idx must be (an integer|in 0\.\.2)",
            [*NO_INTEGERS[1:], -1, 3],
        ),
        *rows(
            "n_targets",
            lambda n: entropy(n_targets=n),
            None,
            r"^cross_entropy: n_targets must be (an integer|at least 1), got ",
            [5.75, *NO_SIZES[1:]],
        ),
        *rows(  # a tensor's number is not asked for: that would be to wait
            "n_targets of the twin",
            None,
            lambda n: torchformer.training.cross_entropy(x, torch.tensor(IDS), n_targets=n),
            r"^cross_entropy: n_targets must be (an integer|at least 1), got ",
            [5.75, *(n for n in NO_SIZES[1:] if not isinstance(n, torch.Tensor))],
        ),
        *rows(
            "ignore_index",
            lambda i: entropy(ignore_index=i),
            None,
            "^cross_entropy: ignore_index must be an integer, got ",
            NO_INTEGERS[1:],
        ),
        *rows(
            "label_smoothing",
            lambda value: entropy(label_smoothing=value),
            lambda value: torchformer.training.cross_entropy(
                x, torch.tensor(IDS), label_smoothing=value
            ),
            r"^cross_entropy: label_smoothing (is a probability|must be a number), got ",
            NO_PROBABILITIES,
        ),
    ]


def _modules() -> list[Row]:
    """Each argument of each module that both twins have, with everything else right."""
    found = []
    sizes = {"d_model": 8, "n_heads": 2, "d_ff": 12, "max_len": 6}
    others = ["dropout", "activation", "norm_first", "eps"]
    others += [f"{kind}_dropout" for kind in ("attention", "activation", "sublayer")]
    for name in (
        "MultiHeadAttention",
        "FeedForward",
        "EncoderLayer",
        "DecoderLayer",
        "SinusoidalPositions",
        "LearnedPositions",
    ):
        ours, theirs = getattr(npformer, name), getattr(torchformer, name)
        known = inspect.signature(ours).parameters
        needed = {size: n for size, n in sizes.items() if size in known}
        rng = {"rng": RNG} if "rng" in known else {}
        for option in [*needed, *(other for other in others if other in known)]:
            if option in sizes:
                message, values = r"must be (an integer|at least 1), got ", NO_SIZES
            elif option == "activation":
                message, values = r"must be (relu, gelu or gelu_tanh|a string), got ", [None, "no"]
            elif option == "norm_first":
                message, values = "must be true or false, got ", [None, 1, "yes"]
            elif option == "eps":
                message, values = r"must be (at least 0 and finite|a number), got ", NO_EPS
            else:
                message, values = r"(is a probability|must be a number), got ", NO_PROBABILITIES
            if option.endswith("_dropout") and option != "sublayer_dropout":
                message = "dropout " + message  # refused by the part that it is for
            else:
                message = f"^{option} {message}"
            found += rows(
                f"{name} {option}",
                lambda value, make=ours, option=option, rest=needed | rng: make(
                    **rest | {option: value}
                ),
                lambda value, make=theirs, option=option, rest=needed: make(
                    **rest | {option: value}
                ),
                message,
                values,
            )
    for positions in ("SinusoidalPositions", "LearnedPositions"):
        rng = {} if positions.startswith("S") else {"rng": RNG}
        found += rows(
            f"{positions} offset",
            lambda i, name=positions, rng=rng: getattr(npformer, name)(9, 4, **rng)(X, i),
            lambda i, name=positions: getattr(torchformer, name)(9, 4)(torch.from_numpy(X), i),
            r"^offset must be (an integer|at least 0), got ",
            [*NO_INTEGERS, -1],
        )
    return found


def _leaves() -> list[Row]:
    """Those whose twins are torch's own modules."""
    linear = lambda n_in, n_out: npformer.Linear(n_in, n_out, rng=RNG)  # noqa: E731
    table = lambda *sizes: npformer.Embedding(*sizes, rng=RNG)  # noqa: E731
    size = r" must be (an integer|at least 1), got "
    return [
        *rows("Linear n_in", lambda n: linear(n, 3), None, f"^n_in{size}", NO_SIZES),
        *rows("Linear n_out", lambda n: linear(3, n), None, f"^n_out{size}", NO_SIZES),
        *rows("Embedding n", lambda n: table(n, 3, 0), None, f"^n{size}", NO_SIZES),
        *rows("Embedding d_model", lambda n: table(3, n, 0), None, f"^d_model{size}", NO_SIZES),
        *rows(
            "Embedding padding_idx",
            lambda i: table(3, 4, i),
            None,
            r"^padding_idx(=3 is not in| must be)",
            [*NO_INTEGERS, -1, 3],
        ),
        *rows("LayerNorm d_model", npformer.LayerNorm, None, f"^d_model{size}", NO_SIZES),
        *rows(
            "LayerNorm eps",
            lambda eps: npformer.LayerNorm(4, eps),
            None,
            r"^eps must be (at least 0 and finite|a number), got ",
            NO_EPS,
        ),
    ]


def parameters():
    return [npformer.Parameter(np.ones(2))]


def torchs():
    return [torch.nn.Parameter(torch.ones(2))]


NO_DECAYS = [*NO_NUMBERS, -0.5, *NOT_FINITE]
NO_BETAS = [0.9, None, "ab", (0.9,), (0.9, 0.99, 0.999), (1.0, 0.0), (0.9, 1.0), (-0.1, 0.9)]
NO_BETAS += [(0.9, math.nan), (0.9, None), (True, 0.5), {0.9: 1}]


def _optimizers() -> list[Row]:
    """The twins are torch's own: see test_torch_refuses_these_hyper_parameters_too."""
    found = []
    at_least_0 = r"must be (at least 0 and finite|a number), got "
    for name in ("SGD", "Adam", "AdamW"):
        make = getattr(npformer, name)
        found += rows(
            f"{name} rate",
            lambda rate, make=make: make(parameters(), rate),
            None,
            f"^rate {at_least_0}",
            NO_DECAYS,
        )
        found += rows(
            f"{name} schedule that returns",
            lambda rate, make=make: make(parameters(), lambda step: rate).step(),
            None,
            f"^rate {at_least_0}",
            NO_DECAYS,
        )
        for option in ["weight_decay", *(["momentum"] if name == "SGD" else ["eps"])]:
            found += rows(
                f"{name} {option}",
                lambda value, make=make, option=option: make(parameters(), **{option: value}),
                None,
                f"^{option} {at_least_0}",
                NO_DECAYS,
            )
        if name != "SGD":
            found += rows(
                f"{name} betas",
                lambda betas, make=make: make(parameters(), betas=betas),
                None,
                r"^betas must be two numbers in \[0, 1\), got ",
                NO_BETAS,
            )
    return found + rows(
        "clip_grad_norm max_norm",
        lambda value: npformer.clip_grad_norm(parameters(), value),
        lambda value: torchformer.parallel.clip_grad_norm(torchs(), value),
        r"^max_norm must be (at least 0|a number), got ",
        [*NO_NUMBERS, -1.0, math.nan, -math.inf],
    )


def _schedules() -> list[Row]:
    found = []
    right = {"peak": 0.1, "warmup": 10, "total": 100, "d_model": 8, "rate": 0.1}
    for name in ("constant", "noam", "inverse_sqrt", "cosine"):
        make = getattr(npformer.schedules, name)
        known = [*inspect.signature(make).parameters]
        for option in known:
            is_size = option in ("warmup", "total", "d_model")
            message = "an integer|at least 1" if is_size else "at least 0 and finite|a number"
            found += rows(
                f"{name} {option}",
                lambda value, make=make, known=known, option=option: make(
                    **{key: x for key, x in right.items() if key in known} | {option: value}
                ),
                None,
                f"^{option} must be ({message}), got ",
                NO_SIZES if is_size else NO_DECAYS,
            )
    return found


def _training() -> list[Row]:
    """One recipe for both trainers."""
    found = []
    for field in fields(Recipe):
        message, values = "must be (an integer|at least [01]), got ", [*NO_INTEGERS, -1]
        if field.name == "schedule":
            message, values = "must be (constant, noam, inv|a string)", [None, 1, "linear"]
        elif field.name == "betas":
            message, values = r"must be two numbers in \[0, 1\), got ", NO_BETAS
        elif field.name == "label_smoothing":
            message, values = "(is a probability|must be a number), got ", NO_PROBABILITIES
        elif field.type in (float, "float"):
            message, values = "must be (positive|a number), got ", [*NO_NUMBERS, 0, -1, *NOT_FINITE]
        found += rows(
            f"recipe {field.name}",
            lambda value, name=field.name: Recipe(**{name: value}),
            None,
            f"^{field.name} {message}",
            values,
        )
    no_seeds = [*NO_INTEGERS, -1, -(2**70)]
    found += rows(
        "trainer seed",
        lambda seed: Trainer(SMALL, Recipe(), seed),
        lambda seed: torchformer.training.Trainer(SMALL, Recipe(), seed),
        "^seed must be (an integer|at least 0), got ",
        no_seeds,
    )
    found += rows(
        "trainer threads",
        lambda n: Trainer(SMALL, Recipe(), 0, n),
        None,
        "^threads must be (an integer|at least 1), got ",
        NO_SIZES,
    )
    for option, message, values in (
        ("seed", "(an integer|at least 0)", no_seeds),
        ("minutes", "(positive|a number)", [*NO_NUMBERS[1:], 0, -1.0, *NOT_FINITE]),
        ("patience", "(an integer|at least 1)", NO_SIZES[1:]),
        ("test_examples", "(an integer|at least 1)", NO_SIZES[1:]),
    ):
        found += rows(
            f"run {option}",
            lambda value, option=option: run(
                None, tasks.load("sort"), "/nowhere", recipe=Recipe(), **{option: value}
            ),
            None,
            f"^{option} must be {message}, got ",
            values,
        )
    found += rows(
        "the kit's seed", lambda seed: make_cases(("op",), 1, seed), None, "^seed must be", no_seeds
    )
    found += rows(
        "the kit's examples",
        lambda n: make_cases(("op",), n),
        None,
        "^examples must be (an integer|at least 1), got ",
        NO_SIZES,
    )
    return found


def _normalize() -> list[Row]:
    x, w = np.ones((2, 4, 3)), np.ones(4)
    eps = r"^eps must be (at least 0 and finite|a number), got "
    return [
        *rows("normalize eps", lambda eps: normalize.normalize(x, -1, eps), None, eps, NO_EPS),
        *rows("rms_norm eps", lambda e: normalize.rms_norm(x, w[:3], e), None, eps, NO_EPS),
        *rows("group_norm eps", lambda e: normalize.group_norm(x, 2, w, w, e), None, eps, NO_EPS),
        *rows(
            "instance_norm eps", lambda e: normalize.instance_norm(x, w, w, e), None, eps, NO_EPS
        ),
        *rows("batch_norm eps", lambda e: normalize.batch_norm(x, w, w, eps=e), None, eps, NO_EPS),
        *rows(
            "batch_norm momentum",
            lambda m: normalize.batch_norm(x, w, w, momentum=m),
            None,
            r"^momentum (is a probability|must be a number), got ",
            NO_PROBABILITIES,
        ),
        *rows(
            "n_groups",
            lambda n: normalize.group_norm(x, n, w, w),
            None,
            r"^group_norm: n_groups must (be an integer|be at least 1|divide C = 4), got ",
            [*NO_SIZES, 3],
        ),
    ]


ROWS = [*_config(), *_ops(), *_modules(), *_leaves(), *_optimizers(), *_schedules()]
ROWS += [*_training(), *_normalize()]
