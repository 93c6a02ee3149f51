"""Models and recipes that work, by task and name; a file or the command line can change any of it.

Measured results for them are in the README.
"""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from npformer import storage
from npformer.checkpoint import CheckpointError, blame
from npformer.config import TransformerConfig
from npformer.tasks import Task
from npformer.training import Recipe

LARGEST, LONGEST = 1 << 16, 1000  # bytes of a TOML file, and of a line: x.x.x.x takes their square
SHORT = 0.2  # of the longest: a batch of words is as long as its longest, few have 40 letters
Settings = dict[str, dict[str, Any]]  # {"model": fields of the config, "recipe": of the recipe}

NO_DROPOUT = {
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "sublayer_dropout": 0.0,
}
# The model of the notes this project grew from: post-norm, as in the paper.
NOTES = {"d_model": 64, "n_encoder_layers": 3, "n_decoder_layers": 3, "n_heads": 4, "d_ff": 256}

DIGITS: dict[str, Settings] = {
    # There is no end of digits to train on, so there is nothing for dropout to prevent.
    "default": {
        "model": {**NOTES, **NO_DROPOUT, "n_encoder_layers": 2, "n_decoder_layers": 2}
        | {"norm_first": True},
        "recipe": {"steps": 1500, "rate": 2e-3},
    },
    "notes": {"model": NOTES, "recipe": {"steps": 3000}},
    "demo": {"model": {**NOTES, **NO_DROPOUT}, "recipe": {"steps": 1500}},
}
RELEASE = {**NOTES, "d_model": 128, "d_ff": 512, "norm_first": True, "max_len": 64}
G2P: dict[str, Settings] = {
    "default": {
        "model": {**NOTES, "d_model": 128, "d_ff": 512, "norm_first": True, "max_len": 64},
        "recipe": {
            "batch_size": 256,
            "steps": 5000,
            "rate": 2e-3,
            "warmup": 200,
            "label_smoothing": 0.1,
            "evaluate_every": 250,
        },
    },
    "notes": {
        "model": {**NOTES, "max_len": 64},
        "recipe": {"batch_size": 256, "steps": 5000, "warmup": 400, "label_smoothing": 0.1},
    },
    # What the package ships: on a GPU in minutes, or a smaller one on a CPU, 30 epochs in an hour.
    "release": {
        "model": RELEASE | {"n_encoder_layers": 4, "n_decoder_layers": 4},
        "recipe": {
            "batch_size": 1024,
            "steps": 20_000,
            "rate": 1e-3,
            "warmup": 3000,
            "label_smoothing": 0.1,
            "evaluate_every": 500,
            "dev_examples": 2513,
            "average": 10,
        },
    },
    "release-cpu": {
        # Thirty epochs are too few to overfit: dropout is for the sublayers alone.
        "model": RELEASE | {"attention_dropout": 0.0, "activation_dropout": 0.0},
        "recipe": {
            "batch_size": 256,
            "steps": 13_000,
            "rate": 2e-3,
            "warmup": 1000,
            "label_smoothing": 0.1,
            "evaluate_every": 430,
            "dev_examples": 2513,
            "average": 5,
        },
    },
}


def names(task_name: str) -> list[str]:
    return list(G2P if task_name.startswith("g2p") else DIGITS)


def settings(task: Task, preset: str = "default", file: str | Path | None = None) -> Settings:
    """The settings of a preset, with those of a TOML file ([model], [recipe]) laid over them."""
    presets = G2P if task.name.startswith("g2p") else DIGITS
    if preset not in presets:
        raise ValueError(f"{task.name} has no preset {preset!r}, there are: {', '.join(presets)}")
    chosen = {part: dict(values) for part, values in presets[preset].items()}
    if file is not None:
        for part, values in read(file).items():
            chosen[part] |= values
    return chosen


def read(file: str | Path) -> Settings:
    """A TOML file with the tables [model] and [recipe].  Raises CheckpointError with its path."""
    known = {
        "model": {f.name for f in fields(TransformerConfig)},
        "recipe": {f.name for f in fields(Recipe)},
    }
    with blame(file):
        data = storage.read(file, LARGEST)
        if any(len(line) > LONGEST for line in data.splitlines()):
            raise CheckpointError(f"{file}: a line is longer than {LONGEST} bytes")
        try:
            values = tomllib.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not TOML ({error})") from None
    for part, table in values.items():
        if part not in known or not isinstance(table, dict):
            raise CheckpointError(f"{file}: unknown table [{part}], there are [model] and [recipe]")
        if unknown := sorted(set(table) - known[part]):
            raise CheckpointError(f"{file}: unknown key {unknown[0]!r} in [{part}]")
    return values


def build(task: Task, chosen: Settings) -> tuple[TransformerConfig, Recipe]:
    """The config, with the task's vocabularies, and the recipe.  Raises ValueError."""
    vocabularies = {
        "src_vocab_size": len(task.src_vocabulary),
        "tgt_vocab_size": len(task.tgt_vocabulary),
        "max_len": max(task.max_src_len, task.max_tgt_len + 1),  # the answer and its start token
    }
    config = TransformerConfig(**{**vocabularies, **chosen["model"]})
    needed = vocabularies["max_len"]
    if config.max_len < needed:
        raise ValueError(f"max_len={config.max_len} is too short for {task.name}: {needed}")
    sizes = (len(task.src_vocabulary), len(task.tgt_vocabulary))
    if (config.src_vocab_size, config.tgt_vocab_size) != sizes:
        raise ValueError(f"the vocabulary sizes are the task's, {task.name} has {sizes}")
    if config.n_encoder_layers == 0:
        raise ValueError(f"{task.name} needs an encoder: n_encoder_layers must be at least 1")
    return config, Recipe(**chosen["recipe"])


def bytes_to_train(task: Task, config: TransformerConfig, recipe: Recipe) -> int:
    """About what training takes, rather less: to refuse what is out of all reach."""
    weights = 4 * 4 * config.n_parameters  # float32: they, their gradients, Adam's two means
    drawn = 8 * config.d_model * max(config.d_ff, config.src_vocab_size, config.tgt_vocab_size)
    tables = 8 * config.d_model * config.max_len * (2 if config.positions == "sinusoidal" else 0)
    tokens = recipe.batch_size * (SHORT * task.max_src_len + SHORT * task.max_tgt_len)
    width = 8 * config.d_model + 2 * config.d_ff  # numbers that a layer keeps of a token
    kept = 4 * width * max(config.n_encoder_layers, config.n_decoder_layers)
    return weights + drawn + tables + int(tokens * kept)
