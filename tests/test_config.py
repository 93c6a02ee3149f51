"""The configuration: what a model can have, what none can have, and the way to text and back."""

import dataclasses
import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torchformer
from npformer import TransformerConfig, presets, tasks
from npformer.checkpoint import CheckpointError
from npformer.config import FORMAT_VERSION
from npformer.testing.models import configs

SMALL = TransformerConfig(11, 9)


def test_the_defaults_are_the_papers_post_norm_model():
    assert asdict(SMALL) == {
        "src_vocab_size": 11,
        "tgt_vocab_size": 9,
        "d_model": 64,
        "n_heads": 4,
        "d_ff": 256,
        "n_encoder_layers": 3,
        "n_decoder_layers": 3,
        "max_len": 512,
        "src_pad_id": 0,
        "tgt_pad_id": 0,
        "activation": "relu",
        "norm_first": False,
        "final_norm": False,
        "positions": "sinusoidal",
        "scale_embedding": True,
        "share_embeddings": False,
        "tie_head": False,
        "embedding_dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "sublayer_dropout": 0.1,
        "eps": 1e-5,
    }
    assert SMALL.d_head == 16
    assert torchformer.TransformerConfig is TransformerConfig  # one class, not two that agree


def test_final_norm_follows_norm_first_unless_it_is_said():
    for norm_first in (False, True):
        assert replace(SMALL, norm_first=norm_first, final_norm=None).final_norm is norm_first
        for said in (False, True):
            assert replace(SMALL, norm_first=norm_first, final_norm=said).final_norm is said


def test_a_config_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.d_model = 32
    assert TransformerConfig(11, 9) == SMALL
    assert hash(TransformerConfig(11, 9)) == hash(SMALL)
    assert replace(SMALL, d_ff=7) != SMALL


TAKEN = [
    {"n_heads": 1},
    {"n_heads": 64},
    {"d_model": 5, "n_heads": 5},  # odd: the sinusoidal table takes any width
    {"n_encoder_layers": 0, "src_vocab_size": 0, "src_pad_id": 5},  # no source: not looked at
    {"src_pad_id": 10, "tgt_pad_id": 8},  # the last of each vocabulary
    {"share_embeddings": True, "tgt_vocab_size": 11},
    {"attention_dropout": 0, "sublayer_dropout": 1},  # integers are numbers, as in JSON
    {"max_len": 1},
    {"eps": 1},
]


@pytest.mark.parametrize("changes", TAKEN, ids=str)
def test_takes(changes):
    config = replace(SMALL, **changes)
    for name, value in changes.items():
        assert getattr(config, name) == value


def must_be(name, what, *values):
    return [({name: value}, f"^{name} must be {what}") for value in values]


SIZES = ["src_vocab_size", "tgt_vocab_size", "d_model", "n_heads", "d_ff", "n_encoder_layers"]
SIZES += ["n_decoder_layers", "max_len", "src_pad_id", "tgt_pad_id"]
FLAGS = ["norm_first", "final_norm", "scale_embedding", "share_embeddings", "tie_head"]
DROPOUTS = [f"{kind}_dropout" for kind in ("embedding", "attention", "activation", "sublayer")]
REFUSED = [
    ({"d_model": 10}, "^d_model=10 is not a multiple of n_heads=4: each head takes an equal slice"),
    ({"n_heads": 65}, "^d_model=64 is not a multiple of n_heads=65"),
    *must_be("n_encoder_layers", "at least 0, got -1", -1),
    ({"src_pad_id": 11}, "^src_pad_id=11 is not in the src vocabulary of 11$"),
    ({"tgt_pad_id": 9}, "^tgt_pad_id=9 is not in the tgt vocabulary of 9$"),
    ({"src_pad_id": -1}, "^src_pad_id=-1 is not in"),
    ({"tgt_pad_id": -1}, "^tgt_pad_id=-1 is not in"),
    ({"src_vocab_size": 0}, "^src_pad_id=0 is not in the src vocabulary of 0$"),
    *must_be("activation", "relu, gelu or gelu_tanh, got 'swish'", "swish"),
    *must_be("positions", "sinusoidal or learned, got 'rotary'", "rotary"),
    ({"share_embeddings": True}, "^share_embeddings=True needs one vocabulary: src_vocab_size and"),
    (
        {"share_embeddings": True, "tgt_vocab_size": 11, "tgt_pad_id": 3},
        "^share_embeddings=True needs one vocabulary",
    ),
    *[
        ({name: p}, f"^{name} is a probability, got ")
        for name in DROPOUTS
        for p in (-0.1, 1.1, 2, math.nan, math.inf)
    ],
    *[({"eps": value}, "^eps must be positive, got ") for value in (0, -1e-5, math.nan, math.inf)],
    # Wrong types, of which JSON and TOML bring many.
    *[case for name in SIZES for case in must_be(name, "an integer, got ", 1.0, "1", None, True)],
    *[case for name in FLAGS for case in must_be(name, "true or false, got ", 1, "true")],
    *[case for name in FLAGS if name != "final_norm" for case in must_be(name, "true or f", None)],
    *[
        case
        for name in [*DROPOUTS, "eps"]
        for case in must_be(name, "a number, got ", "0.1", None, True, [0.1])
    ],
    *must_be("activation", "a string, got ", None, 1),
    *must_be("positions", "a string, got ", None, True),
    *[
        case
        for name in ("tgt_vocab_size", "d_model", "n_heads", "d_ff", "n_decoder_layers", "max_len")
        for case in must_be(name, "at least 1, got ", 0, -4)
    ],
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        replace(SMALL, **changes)
    assert "\n" not in str(caught.value)


def test_every_field_is_checked():
    """Each of them has a wrong value above: a field that is added must be added there."""
    names = {name for changes, _ in REFUSED for name in changes}
    assert names == {field.name for field in dataclasses.fields(TransformerConfig)}


# --- Text -------------------------------------------------------------------------------------


@given(configs(dropout=True))
def test_json_round_trips(config):
    text = config.to_json()
    assert TransformerConfig.from_json(text) == config
    assert TransformerConfig.from_json(text).to_json() == text
    assert json.loads(text) == {"format_version": FORMAT_VERSION, **asdict(config)}


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_json_carries_every_bit_of_a_number(eps):
    assert TransformerConfig.from_json(replace(SMALL, eps=eps).to_json()).eps == eps


def test_json_needs_the_vocabularies_and_nothing_else():
    text = json.dumps({"format_version": 1, "src_vocab_size": 11, "tgt_vocab_size": 9})
    assert TransformerConfig.from_json(text) == SMALL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "^not JSON "),
        ('{"format_version": 1', "^not JSON "),
        ("[" * 10**5, "^not JSON "),
        ("3", "^not a JSON object$"),
        ("null", "^not a JSON object$"),
        ("[]", "^not a JSON object$"),
        ("{}", "^format_version is None, this program reads 1$"),
        ('{"format_version": 2}', "^format_version is 2, this program reads 1$"),
        ('{"format_version": "1"}', "^format_version is '1', this program reads 1$"),
        ('{"format_version": 1}', "^missing key 'src_vocab_size'$"),
        ('{"format_version": 1, "src_vocab_size": 3}', "^missing key 'tgt_vocab_size'$"),
        (SMALL.to_json().replace("d_ff", "d_fff"), "^unknown key 'd_fff'$"),
        (SMALL.to_json().replace('"eps": 1e-05', '"eps": NaN'), "^eps must be positive, got nan$"),
        (SMALL.to_json().replace("64", "6.4e1"), r"^d_model must be an integer, got 64\.0$"),
        (SMALL.to_json().replace("256", "null"), "^d_ff must be an integer, got None$"),
    ],
)
def test_from_json_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_json(text)


# --- A preset, and a TOML file laid over it ---------------------------------------------------


@pytest.mark.parametrize("name", tasks.NAMES)
def test_every_preset_is_a_model_of_its_task(name):
    task = tasks.load(name)
    for preset in presets.names(name):
        config, _ = presets.build(task, presets.settings(task, preset))
        sizes = (len(task.src_vocabulary), len(task.tgt_vocabulary))
        assert (config.src_vocab_size, config.tgt_vocab_size) == sizes
        assert config.max_len > task.max_tgt_len  # the answer and its start token
        assert config.max_len >= task.max_src_len


def settings_with(tmp_path, text):
    file = tmp_path / "settings.toml"
    file.write_text(text)
    return presets.build(tasks.load("sort"), presets.settings(tasks.load("sort"), file=file))


def test_a_toml_file_changes_what_it_names_and_nothing_else(tmp_path):
    task = tasks.load("sort")
    config, recipe = presets.build(task, presets.settings(task))
    text = '[model]\nd_ff = 32\nactivation = "gelu"\neps = 1\n[recipe]\nrate = 0.5\nsteps = 3\n'
    changed, changed_recipe = settings_with(tmp_path, text)
    assert changed == replace(config, d_ff=32, activation="gelu", eps=1)
    assert changed_recipe == replace(recipe, rate=0.5, steps=3)
    assert presets.build(task, presets.settings(task)) == (
        config,
        recipe,
    )  # the preset is as it was
    assert settings_with(tmp_path, "") == (config, recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", r"settings\.toml: not TOML"),
        ("[data]\nx = 1", r"settings\.toml: unknown table \[data\], there are \[model\] and \[rec"),
        ("model = 3", r"settings\.toml: unknown table \[model\]"),
        ("[model]\ndepth = 3", r"settings\.toml: unknown key 'depth' in \[model\]"),
        ("[recipe]\nd_ff = 3", r"settings\.toml: unknown key 'd_ff' in \[recipe\]"),
        ("[model]\nd_model = 10", "d_model=10 is not a multiple of n_heads=4"),
        ("[model]\nd_model = 64.0", "d_model must be an integer, got 64.0"),
        ("[model]\nmax_len = 10", "max_len=10 is too short for sort: 11"),
        ("[model]\nsrc_vocab_size = 14", r"the vocabulary sizes are the task's, sort has \(13, 13"),
        ("[model]\nn_encoder_layers = 0", "sort needs an encoder: n_encoder_layers must be at le"),
        ("[recipe]\nsteps = 0", "steps must be at least 1, got 0"),
        ("[recipe]\nsteps = 1.5", "steps must be an integer, got 1.5"),
        ("[recipe]\nbatch_size = true", "batch_size must be an integer, got True"),
        ("[recipe]\nrate = -1.0", "rate must be positive, got -1.0"),
        ("[recipe]\nrate = nan", "rate must be positive, got nan"),
        ("[recipe]\nrate = inf", "rate must be positive, got inf"),
        ('[recipe]\nrate = "fast"', "rate must be a number, got 'fast'"),
        (
            '[recipe]\nschedule = "linear"',
            "schedule must be constant, noam, inverse_sqrt or cosine, got 'linear'",
        ),
        ("[recipe]\nlabel_smoothing = 1.5", "label_smoothing is a probability, got 1.5"),
        ('[recipe]\nlabel_smoothing = "a"', "label_smoothing must be a number, got 'a'"),
        ("[recipe]\nbetas = [0.9]", r"betas must be two numbers in \[0, 1\), got \[0.9\]"),
        ("[recipe]\nbetas = [0.9, 1.0]", r"betas must be two numbers in \[0, 1\), got"),
        ("[recipe]\nbetas = 0.9", r"betas must be two numbers in \[0, 1\), got 0.9"),
        ('[recipe]\nbetas = ["a", "b"]', r"betas must be two numbers in \[0, 1\), got"),
    ],
)
def test_a_toml_file_with_a_mistake_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        settings_with(tmp_path, text)


def test_a_toml_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    task = tasks.load("sort")
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name, reason in (("nowhere", "no such file"), ("bytes", "not TOML"), (".", "a folder")):
        with pytest.raises(CheckpointError, match=reason):
            presets.settings(task, file=tmp_path / name)
    with pytest.raises(ValueError, match="sort has no preset 'big', there are: default, notes, "):
        presets.settings(task, "big")
