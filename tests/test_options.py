"""Numbers of NumPy and torch are numbers; a seed is of any size; an iterable is read once."""

import json
import math
from dataclasses import asdict, fields
from fractions import Fraction

import numpy as np
import pytest
import torch

import npformer
import torchformer
import torchformer.parallel
import torchformer.training
from npformer import TransformerConfig, cli, compare, normalize, ops, options, schedules, tasks
from npformer import training as numpy_training
from npformer.tasks import g2p
from npformer.tasks.task import Example, Vocabulary, make_batch, pad
from npformer.training import Recipe, Trainer

SMALL = TransformerConfig(13, 13, d_model=8, n_heads=2, d_ff=12, n_encoder_layers=1)
FLOATS = [np.float64, np.float32, np.float16, np.longdouble, np.array, torch.tensor, Fraction]
INTEGERS = [np.int64, np.uint8, np.int16, np.array, torch.tensor]


# --- What is a number -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOATS)
def test_every_scalar_is_a_number_and_comes_out_as_pythons(kind):
    for check in (options.real, options.number, options.positive, options.not_negative):
        assert check("x", kind(0.5)) == 0.5
        assert type(check("x", kind(0.5))) is float
    assert type(options.probability("x", kind(0.5))) is float
    assert type(options.limit("x", kind(0.5))) is float
    assert options.pair_of_betas([kind(0.5), kind(0.25)]) == (0.5, 0.25)
    assert {type(beta) for beta in options.pair_of_betas((kind(0.5), 0))} == {float}


@pytest.mark.parametrize("kind", INTEGERS)
def test_every_integer_is_one_and_comes_out_as_pythons(kind):
    assert options.integer("n", kind(7), 7) == 7
    assert type(options.integer("n", kind(7))) is int
    assert type(options.real("x", kind(7))) is float
    assert options.flag("x", np.True_) is True


def test_an_integer_may_be_longer_than_a_float():
    assert options.integer("n", 10**400) == 10**400
    assert options.real("x", -(10**400)) == -math.inf
    assert options.limit("x", math.inf) == math.inf


def test_a_config_of_numpys_numbers_is_the_config():
    """The size of a vocabulary is ids.max() + 1, and that is no int."""
    for ids in (np.array([[3, 10]]), torch.tensor([[3, 10]])):
        n = ids.max() + 1
        assert TransformerConfig(n, n) == TransformerConfig(11, 11)
    given = {f.name: getattr(SMALL, f.name) for f in fields(SMALL)}
    scalar = {int: np.int32, float: np.float64, bool: np.bool_, str: np.str_}
    config = TransformerConfig(**{k: scalar[type(x)](x) for k, x in given.items()})
    assert config == SMALL
    assert {k: type(x) for k, x in asdict(config).items() if not isinstance(x, str)} == {
        k: type(x) for k, x in given.items() if not isinstance(x, str)
    }
    assert TransformerConfig.from_json(config.to_json()) == SMALL


def test_a_recipe_of_numpys_numbers_is_the_recipe():
    recipe = Recipe(
        batch_size=np.int64(8), rate=np.float64(0.5), betas=np.array([0.5, 0.75]), eps=np.float64(1)
    )
    assert recipe == Recipe(batch_size=8, rate=0.5, betas=(0.5, 0.75), eps=1.0)
    assert Recipe(**json.loads(json.dumps(asdict(recipe)))) == recipe


X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
W, IDS = np.ones(4, np.float32), np.array([[0, 1, 2], [3, 0, 1]])
OPS = {
    "layer_norm": lambda f, _: ops.layer_norm(X, W, W, f(0.5)),
    "dropout": lambda f, _: ops.dropout(X, f(0.5), np.random.default_rng(0)),
    "attention": lambda f, _: ops.attention(X, X, X, None, f(0.5), np.random.default_rng(0)),
    "masked_fill": lambda f, _: ops.masked_fill(X, X > 0, f(0.5)),
    "embedding": lambda _, i: ops.embedding(IDS, X.reshape(6, 4), i(1)),
    "cross_entropy": lambda f, i: ops.cross_entropy(X, IDS, i(0), f(0.5), i(5)),
    "normalize": lambda f, _: normalize.normalize(X, -1, f(0.5)),
    "rms_norm": lambda f, _: normalize.rms_norm(X, W, f(0.5)),
    "group_norm": lambda f, i: normalize.group_norm(X.mT, i(2), W, W, f(0.5)),
    "instance_norm": lambda f, _: normalize.instance_norm(X.mT, W, W, f(0.5)),
    "batch_norm": lambda f, _: normalize.batch_norm(
        X.mT, W, W, normalize.Running.start(4), True, f(0.5), f(0.5)
    ),
    "batch_norm, running": lambda f, _: normalize.batch_norm(
        X.mT, W, W, normalize.Running.start(4), False, f(0.5), f(0.5)
    ),
    "SinusoidalPositions": lambda _, i: npformer.SinusoidalPositions(i(9), i(4))(X, i(2)),
    "LayerNorm": lambda f, i: npformer.LayerNorm(i(4), f(0.5))(X),
    "Linear": lambda _, i: npformer.Linear(i(4), i(3), rng=np.random.default_rng(0))(X),
    "EncoderLayer": lambda f, i: npformer.EncoderLayer(
        i(4),
        i(2),
        i(5),
        attention_dropout=f(0.5),
        activation_dropout=f(0.5),
        sublayer_dropout=f(0.5),
        eps=f(0.5),
        rng=np.random.default_rng(0),
    )(X, None, np.random.default_rng(1)),
}


@pytest.mark.parametrize("kind", [np.float64, np.array, torch.tensor])
@pytest.mark.parametrize("name", OPS)
def test_an_option_of_numpys_changes_neither_dtype_nor_number(name, kind):
    """np.float64 times a float32 array is float64."""
    results = []
    for f, i in ((float, int), (kind, np.int64)):
        y, backward = OPS[name](f, i)
        gradients = backward(kind(1.0) if name == "cross_entropy" else np.ones_like(y))
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        results.append([np.asarray(x) for x in (y, *gradients) if x is not None])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_optimizers_and_schedules_stay_float32_and_exact():
    for Optimizer, settings in (
        (npformer.SGD, {"momentum": np.float64(0.5), "weight_decay": np.float64(0.25)}),
        (npformer.Adam, {"betas": (np.float64(0.5), np.float64(0.75)), "eps": np.float64(0.5)}),
        (npformer.AdamW, {"weight_decay": np.array(0.25)}),
    ):
        found = []
        for number in (lambda x: x, lambda x: np.asarray(x).tolist()):
            p = npformer.Parameter(X[0].copy())
            p.grad += 1
            plain = {name: number(x) for name, x in settings.items()}
            optimizer = Optimizer([p], schedules.cosine(np.float64(0.1), np.int64(2), np.int32(9)))
            optimizer = Optimizer([p], optimizer.rate, **plain)
            for _ in range(3):
                optimizer.step()
            assert p.data.dtype == np.float32
            found.append(p.data)
        np.testing.assert_array_equal(*found)
    for rate in (
        schedules.constant(np.float64(0.5)),
        schedules.noam(np.int64(8), np.int64(2), np.float64(1)),
        schedules.inverse_sqrt(np.float32(0.5), np.int64(2)),
        schedules.cosine(np.float64(0.5), np.int64(2), np.int64(5), np.float64(0)),
    ):
        assert {type(rate(step)) for step in (1, 2, 3, 9)} == {float}


def test_n_targets_of_numpy_divides_by_what_it_is():
    """5.75 was cut to 5; it is refused (test_refusals.py), and a whole number is not."""
    logits = X[0]
    total, _ = ops.cross_entropy(logits, IDS[0], n_targets=1)
    loss, _ = ops.cross_entropy(logits, IDS[0], n_targets=np.int64(5))
    assert loss == total / 5
    assert loss.dtype == np.float32


# --- What torch refuses we refuse -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"lr": -1}),
        ("SGD", {"momentum": -0.5}),
        ("SGD", {"weight_decay": -1}),
        ("Adam", {"lr": -1}),
        ("Adam", {"eps": -1}),
        ("Adam", {"betas": (1.0, 0.0)}),
        ("Adam", {"betas": (0.9, -0.1)}),
        ("Adam", {"betas": (0.9, math.nan)}),
        ("Adam", {"weight_decay": -1}),
        ("AdamW", {"weight_decay": -1}),
        ("AdamW", {"betas": (0.0, 1.0)}),
        ("AdamW", {"eps": math.nan}),
    ],
)
def test_torch_refuses_these_hyper_parameters_too(name, settings):
    with pytest.raises(ValueError, match=r"^Invalid"):
        getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(2))], **settings)
    ours = {"rate" if key == "lr" else key: value for key, value in settings.items()}
    with pytest.raises(ValueError, match=" must be "):
        getattr(npformer, name)([npformer.Parameter(np.ones(2))], **ours)


def test_what_torch_takes_we_take():
    p = [npformer.Parameter(np.ones(2))]
    npformer.SGD(p, 0, momentum=2, weight_decay=0)
    npformer.Adam(p, betas=[0, 0], eps=0)
    assert npformer.clip_grad_norm(p, math.inf) == 0
    assert npformer.clip_grad_norm(p, 0) == 0


def test_a_step_that_is_refused_is_not_counted():
    p = npformer.Parameter(np.ones(2))
    optimizer = npformer.Adam([p], lambda step: math.nan)
    with pytest.raises(ValueError, match=r"^rate must be at least 0 and finite, got nan$"):
        optimizer.step()
    assert optimizer.steps == 0
    np.testing.assert_array_equal(p.data, 1)


# --- One-shot iterables -----------------------------------------------------------------------


def once(items):
    yield from items


def test_clipping_and_optimizers_read_their_parameters_once():
    """clip_grad_norm(generator, 1.0) returned the norm and clipped nothing."""
    p, q = npformer.Parameter(np.zeros(2)), npformer.Parameter(np.zeros(1))
    p.grad += 10
    q.grad += 5
    assert npformer.clip_grad_norm(once([p, q]), 1.0) == 15
    np.testing.assert_allclose([*p.grad, *q.grad], [10 / 15, 10 / 15, 5 / 15], 1e-6)
    for Optimizer in (npformer.SGD, npformer.Adam, npformer.AdamW):
        optimizer = Optimizer(once([p, q]), 0.1)
        before = p.data.copy(), q.data.copy()
        optimizer.step()
        assert (p.data != before[0]).all()
        assert (q.data != before[1]).all()
        assert optimizer.data.size == 3
    tensors = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    for tensor, gradient in zip(tensors, (10.0, 5.0), strict=True):
        tensor.grad = torch.full_like(tensor, gradient)
    assert torchformer.parallel.clip_grad_norm(once(tensors), 1.0) == 15
    assert tensors[0].grad.tolist() == pytest.approx([10 / 15] * 2)


def test_tasks_read_tokens_pairs_and_answers_once():
    vocabulary = Vocabulary(once("abc"))
    assert vocabulary.tokens == Vocabulary("abc").tokens
    assert vocabulary.encode(once("ab")) == [3, 4]
    assert vocabulary.decode(once([3, 4])) == ["a", "b"]
    assert pad(once([once([3, 4]), once([5])])).tolist() == [[3, 4], [5, 0]]
    batch = make_batch(once([(once([3, 4]), once([5]))]))
    assert batch.src.tolist() == [[3, 4]]
    assert batch.tgt.tolist() == [[1, 5, 2]]
    assert g2p.edit_distance(once([1, 2, 3]), once([1, 3])) == 1

    sort = tasks.load("sort")
    examples = [Example([3, 4, 5, 6, 7, 8], [[3]]), Example([4], [[5]])]
    scores = sort.score(examples, [[3], [3]])
    assert scores == {"exact_match": 0.5, "exact_match_long": 1.0}
    assert sort.score(once(examples), once([once([3]), (3,)])) == scores
    reverse = tasks.load("reverse")
    assert reverse.answer(once([1, 2])) == [2, 1]
    words = tasks.load("g2p")
    examples = [Example([4], [[3, 4], [3, 5]]), Example([4], [[3]])]
    scores = words.score(examples, [[3, 5], [4]])
    assert words.score(once(examples), once([once([3, 5]), once([4])])) == scores
    answers = {(3,): [3], (4,): [5]}
    examples = [Example([3], [[3]]), Example([4], [[5]])]
    decode = lambda sources, n: (answers[tuple(src)] for src in sources)  # noqa: E731
    assert numpy_training.score(decode, sort, once(examples)) == {"exact_match": 1.0}


def test_a_table_of_rows_reads_them_once():
    rows = compare.compare_tensors({"a": X}, {"a": X + 1}, {"a": 0.1})
    assert compare.table(once(rows)) == compare.table(rows)
    assert "the first difference" in compare.table(once(rows))


# --- Seeds ------------------------------------------------------------------------------------

SEEDS = [0, 2**31, 2**63, 2**64 - 1, 2**64, 2**200 + 1, np.int64(3)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_may_be_of_any_size_in_both_twins(seed):
    recipe = Recipe(batch_size=2)
    ours, theirs = Trainer(SMALL, recipe, seed), torchformer.training.Trainer(SMALL, recipe, seed)
    for name, x in ours.weights().items():
        np.testing.assert_array_equal(x, theirs.weights()[name], err_msg=name)
    batch = tasks.load("sort").batch(1, 2, int(seed))
    first = theirs.step(batch, 0.1)
    again = torchformer.training.Trainer(SMALL, recipe, seed)
    assert again.step(batch, 0.1) == first
    assert math.isfinite(ours.step(batch, 0.1))


def kit(arguments):
    from npformer.testing.__main__ import main

    return main(arguments)


@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**64 + 5), "1.5", "9" * 5000])
@pytest.mark.parametrize(
    "command",
    [
        lambda *seed: cli.main(["demo", *seed]),
        lambda *seed: cli.main(["train", "sort", *seed]),
        lambda *seed: cli.main(["train", "sort", "--backend", "torch", *seed]),
        lambda *seed: torchformer.parallel.main(["sort", *seed]),
        lambda *seed: kit(["--target", "nowhere:f", *seed]),
        lambda *seed: kit(["--bounds", "1", *seed]),
    ],
    ids=["demo", "train", "train torch", "torchrun", "kit", "kit bounds"],
)
def test_every_command_refuses_the_same_seeds(command, seed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command("--seed", seed)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "argument --seed: must be a whole number from 0 to " in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_train_takes_the_longest_seed_and_goes_on_with_it(backend, tmp_path, monkeypatch):
    few = tasks.load("sort").dev()[:3]
    monkeypatch.setattr(tasks.digits.Digits, "_held_out", lambda *_, **__: few)
    seed = 2**63 - 1
    settings = tmp_path / "small.toml"
    settings.write_text("[model]\nd_model = 8\nn_heads = 1\nd_ff = 8\n[recipe]\nbatch_size = 2\n")
    command = ["train", "sort", "--backend", backend, "--seed", str(seed), "--config"]
    command += [str(settings), "--out", str(tmp_path / "run"), "--json"]
    assert cli.main([*command, "--steps", "2"]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seed"] == seed
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--steps", "3", "--json"]) == 0


# --- The state of a run is loaded whole or not at all -----------------------------------------


def trainers():
    return [Trainer(SMALL, Recipe()), torchformer.training.Trainer(SMALL, Recipe())]


def snapshot(trainer):
    arrays, values = trainer.state()
    return trainer.weights() | arrays, values


def assert_untouched(trainer, before):
    arrays, values = snapshot(trainer)
    assert values == before[1]
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, before[0][name], err_msg=name)


@pytest.mark.parametrize("which", [0, 1], ids=["numpy", "torch"])
@pytest.mark.parametrize("what", ["weights", "moments", "random numbers", "shape", "complex"])
def test_a_state_that_cannot_be_loaded_has_changed_nothing(which, what):
    source, trainer = trainers()[which], trainers()[which]
    batch = tasks.load("sort").batch(1, 2, 0)
    source.step(batch, 0.1)
    trainer.step(batch, 0.2)
    (arrays, values), weights = source.state(), source.weights()
    before = snapshot(trainer)
    moment = [name for name in arrays if name in ("v",) or name.endswith("exp_avg_sq")][-1]
    last = list(weights)[-1]
    if what == "weights":
        weights[last] = weights[last][:-1]
    elif what == "complex":
        weights[last] = weights[last].astype(complex)
    elif what == "moments":
        del arrays[moment]
    elif what == "shape":
        arrays[moment] = np.zeros((1, 2), np.float32)
    elif which == 0:
        values = {"rng": [values["rng"][0] | {"state": {"state": 1}}]}
    else:
        arrays["rng.cpu"] = arrays["rng.cpu"][:7]
    with pytest.raises((ValueError, KeyError)):
        trainer.load(weights, arrays, values)
    assert_untouched(trainer, before)
    if what in ("weights", "complex"):
        with pytest.raises(ValueError, match=r"^the weights do not fit this model: "):
            trainer.load_weights(weights)
        assert_untouched(trainer, before)


def test_an_optimizer_state_is_loaded_whole_or_not_at_all():
    p = npformer.Parameter(np.ones(2))
    optimizer = npformer.Adam([p], 0.1)
    p.grad += 1
    optimizer.step()
    before = optimizer.state_dict()
    for change in (
        {"steps": np.array(2.5)},
        {"steps": np.array(-1)},
        {"steps": np.array(math.nan)},
        {"v": np.ones(2, complex)},
        {"v": np.array([None, 1.0])},
        {"v": np.array(["1", "2"])},
    ):
        with pytest.raises(ValueError, match=r"^the optimizer state's (steps|v) "):
            optimizer.load_state_dict({name: x + 1 for name, x in before.items()} | change)
        for name, x in optimizer.state_dict().items():
            np.testing.assert_array_equal(x, before[name], err_msg=name)
    optimizer.load_state_dict({"steps": np.int64(7), "m": [1, 2], "v": np.ones(2, np.float32)})
    assert (optimizer.steps, optimizer.state["m"].tolist()) == (7, [1, 2])
