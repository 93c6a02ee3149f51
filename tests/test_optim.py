"""The optimizers against torch.optim, and what packing, clipping and resuming promise."""

import copy
import math
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, target
from hypothesis import strategies as st

import npformer
from npformer import SGD, Adam, AdamW, Parameter, clip_grad_norm, optim, schedules, tasks
from npformer.compare import assert_close
from npformer.testing.conformance import GRADIENT
from npformer.testing.models import Batch, batches, configs, make_model, numpy_step, torch_step
from npformer.testing.strategies import seeds
from torchformer.convert import to_torch

STEPS = 25
EPS = float(np.finfo(np.float64).eps)

rates = st.sampled_from([1e-4, 1e-2, 0.3])
decays = st.sampled_from([0.0, 0.01, 0.3])
betas = st.tuples(st.sampled_from([0.0, 0.5, 0.9, 0.98]), st.sampled_from([0.9, 0.99, 0.999]))
epsilons = st.sampled_from([1e-8, 1e-9, 1e-3])
shapes = st.lists(
    st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4
)  # () too: a scalar is a parameter


@st.composite
def recipes(draw):
    """One of the optimizers, as (ours, torch's, the settings of both)."""
    kind = draw(st.sampled_from(["SGD", "Adam", "AdamW"]))
    settings = {"weight_decay": draw(decays)}
    if kind == "SGD":
        settings["momentum"] = draw(st.sampled_from([0.0, 0.5, 0.9]))
    else:
        settings |= {"betas": draw(betas), "eps": draw(epsilons)}
    return getattr(optim, kind), getattr(torch.optim, kind), settings


def make(shapes, seed, dtype=np.float64):
    """Parameters, and the gradient of every step: of all sizes, with zeros in it."""
    rng = np.random.default_rng(seed)
    parameters = [Parameter(np.asarray(rng.standard_normal(s), dtype)) for s in shapes]
    gradients = []
    for _ in range(STEPS):
        scale = 10.0 ** rng.integers(-3, 3)
        step = [scale * rng.standard_normal(s) * (rng.random(s) < 0.8) for s in shapes]
        gradients.append([np.asarray(g, dtype) for g in step])
    return parameters, gradients


def run(optimizer, gradients):
    """The data after each step: a list of lists of arrays."""
    history = []
    for step in gradients:
        for parameter, gradient in zip(optimizer.parameters, step, strict=True):
            parameter.grad[...] = gradient
        optimizer.step()
        history.append([parameter.data.copy() for parameter in optimizer.parameters])
    return history


def run_torch(Optimizer, parameters, gradients, schedule, settings):
    tensors = [torch.nn.Parameter(torch.tensor(p.data)) for p in parameters]
    optimizer = Optimizer(tensors, lr=1.0, foreach=False, **settings)
    history = []
    for i, step in enumerate(gradients, 1):
        for tensor, gradient in zip(tensors, step, strict=True):
            tensor.grad = torch.tensor(gradient)
        optimizer.param_groups[0]["lr"] = schedule(i)
        optimizer.step()
        history.append([tensor.detach().numpy().copy() for tensor in tensors])
    return history, [optimizer.state[tensor] for tensor in tensors]


def schedule_of(rate):
    """Not constant: what takes the rate of another step is off by a tenth."""
    return lambda step: rate * (1 + step / 10)


# --- The same as torch.optim ------------------------------------------------------------------


@given(recipes(), rates, shapes, st.integers(1, 9), seeds)
def test_every_step_is_torchs_in_float64(recipe, rate, shapes, chunk, seed):
    """Chunks of 1 to 9 elements: they end inside parameters, between them, and beyond the last.

    The bound: a step rounds some ten times, each time relative to the largest value in play (of
    the data, or of one step); the errors of K steps add up to 10 K roundings.  So they do in what
    is remembered, relative to the largest gradient so far: 25 steps, 5e-14.
    """
    Ours, Theirs, settings = recipe
    parameters, gradients = make(shapes, seed)
    expected, state = run_torch(Theirs, parameters, gradients, schedule_of(rate), settings)
    start = [p.data.copy() for p in parameters]
    optimizer = Ours(parameters, schedule_of(rate), **settings)
    with mock.patch.object(optim, "CHUNK", chunk):
        actual = run(optimizer, gradients)
    path = [start, *expected]
    for i, shape in enumerate(shapes):
        values = np.array([arrays[i] for arrays in path])
        steps = np.abs(np.diff(values, axis=0))
        scale = float(max(np.abs(values).max(), steps.max()))
        bound = 10 * STEPS * EPS * scale
        errors = [float(np.abs(a[i] - b[i]).max()) for a, b in zip(actual, expected, strict=True)]
        target(max(errors) / bound, label=f"{Ours.__name__}, {i}")
        for k in (0, 1, STEPS - 1):  # the first steps know most of the bias correction
            name = f"{Ours.__name__}: parameter {i} {shape} after step {k + 1}"
            assert_close(name, actual[k][i], expected[k][i], bound)

    largest = max(float(np.abs(g).max()) for step in gradients for g in step)
    largest += settings["weight_decay"] * max(float(np.abs(x).max()) for step in path for x in step)
    kept = {
        "m": ("exp_avg", largest),
        "v": ("exp_avg_sq", largest**2),
        "velocity": ("momentum_buffer", largest / (1 - settings.get("momentum", 0))),
    }
    for name, array in optimizer.state.items():
        if name == "velocity" and not settings["momentum"]:
            continue  # torch keeps none
        their_name, scale = kept[name]
        theirs = np.concatenate([s[their_name].numpy().reshape(-1) for s in state])
        assert_close(name, array, theirs, 10 * STEPS * EPS * scale)
    assert optimizer.steps == STEPS


@given(recipes(), shapes, seeds)
def test_float32_is_as_exact_as_torchs(recipe, shapes, seed):
    """Both against the float64 result: ours is off by at most twice as much as torch's."""
    Ours, Theirs, settings = recipe
    parameters, gradients = make(shapes, seed, np.float32)
    exact = [Parameter(p.data.astype(np.float64)) for p in parameters]
    wide = [[g.astype(np.float64) for g in step] for step in gradients]
    oracle = run(Ours(exact, schedule_of(0.01), **settings), wide)[-1]
    theirs, _ = run_torch(Theirs, parameters, gradients, schedule_of(0.01), settings)
    ours = run(Ours(parameters, schedule_of(0.01), **settings), gradients)[-1]
    for i, x in enumerate(oracle):
        assert ours[i].dtype == np.float32
        peer = float(np.abs(theirs[-1][i] - x).max())
        roundings = 2 * STEPS * float(np.finfo(np.float32).eps) * float(np.abs(x).max() + 1)
        assert_close(f"{Ours.__name__} {i}", ours[i], x, 2 * peer + roundings)


@given(recipes(), shapes, st.integers(1, 9), seeds)
def test_the_size_of_a_chunk_changes_no_bit(recipe, shapes, chunk, seed):
    Ours, _, settings = recipe
    results = []
    for size in (chunk, optim.CHUNK):
        parameters, gradients = make(shapes, seed)
        with mock.patch.object(optim, "CHUNK", size):
            results.append(run(Ours(parameters, 0.01, **settings), gradients)[-1])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_defaults_are_torchs():
    parameter = Parameter(np.ones(1))
    tensor = torch.nn.Parameter(torch.ones(1))
    for Ours, Theirs in (
        (SGD, torch.optim.SGD),
        (Adam, torch.optim.Adam),
        (AdamW, torch.optim.AdamW),
    ):
        ours, theirs = Ours([parameter]), Theirs([tensor]).defaults
        assert ours.rate(1) == theirs["lr"]
        for name in {"betas", "eps", "weight_decay", "momentum"} & set(theirs):
            assert getattr(ours, name) == theirs[name], (Ours, name)


@given(st.data(), seeds)
def test_ten_steps_of_a_model_are_those_of_its_twin(data, seed):
    """Tables that are tied and shared among them: one parameter, moved once a step.

    By the contract of the gradients, each is off by GRADIENT of the largest; the optimizer turns
    that into rate · GRADIENT · largest / eps a step at most (Adam), or / (1 - momentum) (SGD).
    """
    tied = {"tie_head": data.draw(st.booleans()), "share_embeddings": data.draw(st.booleans())}
    sizes = {"src_vocab_size": 11, "tgt_vocab_size": 11, "src_pad_id": 0, "tgt_pad_id": 0}
    config = data.draw(configs(activation="gelu", **tied, **sizes))
    kind = data.draw(st.sampled_from(["SGD", "AdamW"]))
    settings = {"momentum": 0.9} if kind == "SGD" else {"eps": 1e-2, "weight_decay": 0.1}
    model = make_model(config, seed)
    batch, twin = data.draw(batches(config)), to_torch(make_model(config, seed))
    ours = getattr(optim, kind)(model.parameters(), 1e-2, **settings)
    theirs = getattr(torch.optim, kind)(twin.parameters(), lr=1e-2, **settings)
    largest = 0.0
    for _ in range(10):
        numpy_step(model, batch)
        largest = max(largest, clip_grad_norm(model.parameters(), 1.0))
        ours.step()
        gradients = torch_step(twin, batch)
        for name, p in twin.named_parameters():
            p.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        theirs.step()
    amplified = 10 if kind == "SGD" else 100
    bound = 10 * 1e-2 * amplified * GRADIENT * min(largest, 1.0)
    for name, p in model.named_parameters():
        assert_close(name, p.data, dict(twin.named_parameters())[name].detach().numpy(), bound)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_twenty_steps_of_training_end_at_the_same_weights(kind, norm_first):
    """As one trains: other batches each time, a schedule, clipping, the usual eps."""
    task = tasks.load("sort")
    sizes = {"d_model": 32, "n_heads": 4, "d_ff": 64, "n_encoder_layers": 2, "n_decoder_layers": 2}
    config = npformer.TransformerConfig(13, 13, **sizes, norm_first=norm_first, activation="gelu")
    model = npformer.Transformer(config, np.random.default_rng(0), np.float64)
    twin = to_torch(model)
    settings = {"momentum": 0.9} if kind == "SGD" else {"betas": (0.9, 0.98), "eps": 1e-9}
    schedule = schedules.cosine(3e-2 if kind == "SGD" else 3e-3, warmup=4, total=20)
    ours = getattr(optim, kind)(model.parameters(), schedule, **settings)
    theirs = getattr(torch.optim, kind)(twin.parameters(), lr=1.0, **settings)
    losses = []
    for step in range(1, 21):
        batch = Batch(*task.batch(step, 16, seed=0), {}, label_smoothing=0.1)
        found, expected = numpy_step(model, batch), torch_step(twin, batch)
        for name, p in twin.named_parameters():
            p.grad = torch.tensor(expected[name])
        norm = clip_grad_norm(model.parameters(), 1.0)
        torch_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        assert_close("norm", np.asarray(norm), torch_norm.numpy(), 1e-10 * norm)
        theirs.param_groups[0]["lr"] = schedule(step)
        ours.step()
        theirs.step()
        assert_close(f"loss {step}", found["loss"], expected["loss"], 1e-10)
        losses.append(float(found["loss"]))
    assert losses[-1] < losses[0]
    for name, p in twin.named_parameters():
        assert_close(name, dict(model.named_parameters())[name].data, p.detach().numpy(), 1e-10)


def test_a_table_that_is_tied_and_shared_is_moved_once():
    config = npformer.TransformerConfig(9, 9, 6, 2, 7, 1, 1, share_embeddings=True, tie_head=True)
    model = make_model(config, 0)
    src, tgt = np.array([[3, 4, 4]]), np.array([[1, 5]])
    logits, backward = model(src, tgt)
    backward(logits)
    before, rate = model.state_dict(), 0.25
    gradients = {name: p.grad.copy() for name, p in model.named_parameters()}
    optimizer = SGD(model.parameters(), rate)
    assert optimizer.data.size == sum(x.size for x in before.values())
    optimizer.step()
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.data, before[name] - rate * gradients[name], err_msg=name)
    assert gradients["tgt_embedding.weight"].any()


# --- Gradients of nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("Optimizer", [SGD, Adam, AdamW])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_a_gradient_nothing_moves(Optimizer, dtype):
    parameter = Parameter(np.linspace(-1, 1, 7, dtype=dtype))
    before = parameter.data.copy()
    optimizer = Optimizer([parameter], 0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.step()
    np.testing.assert_array_equal(parameter.data, before)
    assert not any(x.any() for x in optimizer.state.values())


def test_decoupled_decay_shrinks_by_rate_times_decay_whatever_the_gradient():
    for rate, decay, k in ((0.1, 0.01, 5), (0.5, 0.3, 3)):
        parameter = Parameter(np.linspace(-1, 1, 7))
        expected = parameter.data * (1 - rate * decay) ** k
        optimizer = AdamW([parameter], rate, weight_decay=decay)
        for _ in range(k):
            optimizer.step()
        assert_close("decayed", parameter.data, expected, (k + 2) * EPS)


def test_the_first_step_of_adam_is_the_rate_whatever_the_gradients_size():
    """m̂ / √v̂ = g / |g|: what the bias correction is for."""
    parameter = Parameter(np.zeros(4))
    optimizer = Adam([parameter], 0.1)
    parameter.grad[...] = [1e-3, -1, 1e3, -1e6]
    optimizer.step()
    # eps = 1e-8 beside a gradient of 1e-3 takes off 1e-5 of the step
    assert_close("step", parameter.data, np.array([-0.1, 0.1, -0.1, 0.1]), 0.1 * 1.1e-5)
    assert_close("step", parameter.data[1:], np.array([0.1, -0.1, 0.1]), 0.1 * 1.1e-8)


def test_weight_decay_of_sgd_and_adam_is_a_gradient():
    for Optimizer in (SGD, Adam):
        decayed, by_hand = Parameter(np.array([2.0, -3.0])), Parameter(np.array([2.0, -3.0]))
        decayed.grad[...] = 0.5
        by_hand.grad[...] = 0.5 + 0.1 * by_hand.data
        Optimizer([decayed], 0.1, weight_decay=0.1).step()
        Optimizer([by_hand], 0.1).step()
        np.testing.assert_array_equal(decayed.data, by_hand.data)


# --- Packing ----------------------------------------------------------------------------------


@given(shapes, seeds, st.sampled_from([np.float32, np.float64]))
def test_packing_changes_no_number_and_every_parameter_is_a_view(shapes, seed, dtype):
    parameters, _ = make(shapes, seed, dtype)
    for p in parameters:
        p.grad += 1 + p.data
    before = [(p.data.copy(), p.grad.copy()) for p in parameters]
    optimizer = SGD(parameters, 0.1)
    for p, (data, grad) in zip(parameters, before, strict=True):
        assert p.data.shape == p.grad.shape == data.shape
        assert p.data.dtype == p.grad.dtype == dtype
        np.testing.assert_array_equal(p.data, data)
        np.testing.assert_array_equal(p.grad, grad)
        assert np.shares_memory(p.data, optimizer.data)
        assert np.shares_memory(p.grad, optimizer.grad)
    again = SGD(parameters, 0.1)  # packed already: they stay where they are
    assert again.data is optimizer.data
    assert again.grad is optimizer.grad


# --- Two owners of one number -----------------------------------------------------------------


def train(touch, n_optimizers=1, momentum=0.9):
    """Three steps of SGD on three parameters, ours and torch's, with `touch` before each step.

    touch(parameters, like, k) does the same to both; `like` makes an array or a tensor.
    """
    values = [np.linspace(-1, 1, n) for n in (3, 4, 2)]
    ours = [Parameter(x.copy()) for x in values]
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in values]
    results = []
    for parameters, like, kind in (
        (ours, np.array, lambda p: SGD(p, 0.1, momentum)),
        (theirs, torch.DoubleTensor, lambda p: torch.optim.SGD(p, 0.1, momentum)),
    ):
        optimizers = [kind(parameters)]
        optimizers += [kind(parameters[i : i + 2]) for i in range(n_optimizers - 1)]
        for k in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for p in parameters:
                gradient = like([0.5 + i + k for i in range(len(p.data))])
                p.grad = gradient if p.grad is None else p.grad + gradient
            touch(parameters, like, k)
            for optimizer in optimizers:
                optimizer.step()
        results.append([np.asarray(p.data) for p in parameters])
    for i, (mine, torchs) in enumerate(zip(*results, strict=True)):
        assert_close(f"parameter {i}", mine, torchs, 100 * EPS)


def halve_gradients(parameters, like, k):
    for p in parameters[k:]:
        p.grad = p.grad / 2.0


def replace_data(parameters, like, k):
    parameters[k].data = parameters[k].data * 0.5


def replace_both(parameters, like, k):
    parameters[1].data = like([1.0, 2.0, 3.0, 4.0 + k])
    parameters[1].grad = like([4.0, 3.0, 2.0, 1.0 + k])


def perturb_and_restore(parameters, like, k):
    """Sharpness-aware minimisation: away, and back to the very array that was there."""
    before = [p.data for p in parameters]
    for p in parameters:
        p.data = p.data + 0.5
    for p, x in zip(parameters, before, strict=True):
        p.grad = p.grad + p.data
        p.data = x


def swap(parameters, like, k):
    """The gradient of another: each keeps its own array."""
    a, b = parameters[0].grad, parameters[1].grad[:3]
    parameters[0].grad, parameters[1].grad[:3] = b + 0, a + 0


@pytest.mark.parametrize(
    "touch", [halve_gradients, replace_data, replace_both, perturb_and_restore, swap]
)
@pytest.mark.parametrize("n_optimizers", [1, 2, 3])
def test_what_replaces_a_gradient_or_a_weight_is_used_as_in_torch(touch, n_optimizers):
    """By several optimizers as well, which take the parameters from each other."""
    train(touch, n_optimizers)


def test_a_replaced_gradient_trains_like_one_that_is_written_into():
    losses = {}
    for how in ("replaced", "in place", "as it is"):
        p = Parameter(np.array([3.0, -2.0]))
        optimizer = Adam([p], 0.1)
        for _ in range(30):
            optimizer.zero_grad()
            p.grad += 2 * p.data
            if how == "replaced":
                p.grad = p.grad / 1.0
            elif how == "in place":
                p.grad /= 1.0
            optimizer.step()
        losses[how] = float((p.data**2).sum())
    assert losses["replaced"] == losses["in place"] == losses["as it is"] < 1


def test_zero_grad_and_clipping_see_a_replaced_gradient():
    p, q = Parameter(np.ones(3)), Parameter(np.ones(2))
    optimizer = SGD([p, q], 1.0)
    p.grad = np.array([3.0, 0.0, 0.0])
    q.grad = np.array([0.0, 4.0])
    assert clip_grad_norm(optimizer.parameters, 1.0) == 5
    optimizer.step()
    assert_close("p", p.data, np.array([1 - 0.6, 1, 1]), 1e-6)
    assert_close("q", q.data, np.array([1, 1 - 0.8]), 1e-6)
    p.grad = np.array([3.0, 0.0, 0.0])
    optimizer.zero_grad()
    assert not p.grad.any()
    assert not optimizer.grad.any()
    p.grad += 1
    optimizer.step()
    assert_close("p", p.data, np.array([-0.6, 0, 0]), 1e-6)


def test_what_replaces_is_copied_and_what_was_there_is_left_alone():
    """A step, an `+=` and a clipping write into no array but the parameter's own."""
    p, q = Parameter(np.ones(3)), Parameter(np.ones(3))
    optimizer = SGD([p, q], 0.5)
    old_data, old_grad, new = p.data, p.grad, np.full(3, 2.0)
    p.grad = q.grad = new  # two parameters, one array: each has its own copy
    p.data = new
    optimizer.step()
    p.grad += 1
    clip_grad_norm([p, q], 1e-3)
    optimizer.zero_grad()
    np.testing.assert_array_equal(new, 2)
    np.testing.assert_array_equal(old_data, 1)
    np.testing.assert_array_equal(old_grad, 0)
    np.testing.assert_array_equal(p.data, 1)
    np.testing.assert_array_equal(q.data, 0)


def test_a_gradient_takes_the_dtype_of_its_data():
    p = Parameter(np.ones(3, np.float32))
    p.grad = np.float64(0.5) * np.ones(3)
    assert p.grad.dtype == np.float32
    optimizer = Adam([p], np.float64(0.1), weight_decay=np.float32(0.5))
    optimizer.step()
    assert p.data.dtype == optimizer.data.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "grad",
            None,
            ValueError,
            r"^Parameter\.grad must be an array of shape \(3,\), got None; ",
        ),
        ("grad", 0, ValueError, r"^Parameter\.grad must be an array of shape \(3,\), got 0; "),
        ("grad", np.ones(1), ValueError, r"got shape \(1,\); p\.grad\[\.\.\.\] = x fills it"),
        ("grad", np.ones((3, 1)), ValueError, r"got shape \(3, 1\)"),
        ("grad", np.ones(3, complex), TypeError, r"^Parameter\.grad is float64, got complex128$"),
        ("grad", np.array(["1"] * 3), TypeError, r"^Parameter\.grad is float64, got <U1$"),
        (
            "data",
            None,
            ValueError,
            r"^Parameter\.data must be an array of shape \(3,\), got None; ",
        ),
        (
            "data",
            np.ones(4),
            ValueError,
            r"^Parameter\.data must be an array of shape \(3,\), got s",
        ),
        ("data", np.ones(3, np.float32), TypeError, r"^Parameter\.data is float64, got float32: p"),
    ],
)
def test_what_cannot_replace_is_refused_at_once(name, value, error, message):
    p = Parameter(np.arange(3.0))
    p.grad += 7
    optimizer = SGD([p], 0.1)
    with pytest.raises(error, match=message) as caught:
        setattr(p, name, value)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(optimizer.data, np.arange(3.0))
    np.testing.assert_array_equal(p.grad, 7)


def test_parameters_that_share_an_array_are_not_torn_apart():
    """Packing would give each a copy of its own."""
    x = np.ones(5)
    shared = Parameter(x), Parameter(x[2:4])
    for pair in (shared, (shared[0], shared[0].view())):
        with pytest.raises(ValueError, match="two parameters share an array; to tie them, use one"):
            SGD(pair, 0.1)
    SGD([Parameter(x[:2]), Parameter(x[2:])], 0.1)


def test_a_model_that_is_loaded_after_packing_is_the_one_that_is_trained():
    config = npformer.TransformerConfig(9, 9, 6, 2, 7, 1, 1)
    model, other = make_model(config, 0), make_model(config, 1)
    optimizer = SGD(model.parameters(), 0.5)
    model.load_state_dict(other.state_dict())
    for p in model.parameters():
        p.grad[...] = 1
    optimizer.step()
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.data, other.state_dict()[name] - 0.5, err_msg=name)


def test_zero_grad_of_the_optimizer_is_the_models():
    parameters, _ = make([(3, 2), (4,)], 0)
    optimizer = SGD(parameters, 0.1)
    for p in parameters:
        p.grad += 1
    optimizer.zero_grad()
    assert not any(p.grad.any() for p in parameters)


def falling(step):
    """A schedule that can be pickled."""
    return 0.1 / step


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("Optimizer", [SGD, Adam, AdamW])
@pytest.mark.parametrize("when", [0, 2])
def test_a_copy_of_an_optimizer_moves_its_own_parameters(again, Optimizer, when):
    """It moved a buffer of which they were no views any more: they stayed as they were."""
    finals = []
    for n_copies in (0, 1):
        parameters = [Parameter(np.array([3.0, -2.0])), Parameter(np.ones((2, 2)))]
        optimizer = Optimizer(parameters, falling)
        for step in range(5):
            if n_copies and step == when:
                first = [p.data.copy() for p in parameters]
                parameters, optimizer = again((parameters, optimizer))
            optimizer.zero_grad()
            for p in parameters:
                p.grad += 2 * p.data
            optimizer.step()
        finals.append([p.data for p in parameters])
    for a, b, start in zip(*finals, first, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != start).all()


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("name", ["data", "grad"])
@pytest.mark.parametrize("kind", [np.matrix, np.ma.array])
def test_subclasses_of_arrays_come_in_as_arrays(name, kind):
    """A matrix never loses its second axis: packed, it was of another shape."""
    p, q = Parameter(kind(np.ones((2, 3)))), Parameter(np.ones(3))
    assert type(p.data) is np.ndarray
    setattr(p, name, kind(np.full((2, 3), 2.0)))
    assert type(getattr(p, name)) is np.ndarray
    SGD([p, q], 0.5).step()
    np.testing.assert_array_equal(p.data, 2 if name == "data" else 0)


@pytest.mark.parametrize("given", [[np.ones(2)], [("name", Parameter(np.ones(2)))], [None]])
def test_an_optimizer_says_what_it_takes(given):
    with pytest.raises(
        TypeError, match=r"^an optimizer takes Parameters, model\.parameters\(\), got "
    ):
        Adam(given)
    with pytest.raises(TypeError, match=r"got torch\.nn\.parameter\.Parameter$"):
        Adam([*torch.nn.Linear(2, 2).parameters()])  # type: ignore


def test_what_no_optimizer_can_pack_is_refused():
    p = Parameter(np.ones(3))
    with pytest.raises(ValueError, match="an optimizer needs at least one parameter"):
        SGD([], 0.1)
    with pytest.raises(ValueError, match="each parameter once, and one is given twice"):
        SGD([p, Parameter(np.ones(2)), p], 0.1)
    with pytest.raises(TypeError, match=r"mixed dtypes \(float32, float64\)"):
        SGD([p, Parameter(np.ones(2, np.float32))], 0.1)
    assert p.data.base is None  # nothing was packed


# --- Resuming ---------------------------------------------------------------------------------


@given(recipes(), shapes, st.integers(1, STEPS - 1), seeds)
def test_resuming_is_exact(recipe, shapes, k, seed):
    """k steps, state and data copied to a new optimizer, the rest: no bit is another."""
    Ours, _, settings = recipe
    schedule = optim.cosine(0.1, 5, STEPS)
    parameters, gradients = make(shapes, seed)
    optimizer = Ours(parameters, schedule, **settings)
    data = run(optimizer, gradients[:k])[-1]
    state = optimizer.state_dict()
    assert state["steps"] == k
    expected = run(optimizer, gradients[k:])[-1]

    again = Ours([Parameter(x) for x in data], schedule, **settings)
    again.load_state_dict(state)
    for x in state.values():
        x[...] = -7  # it was copied
    actual = run(again, gradients[k:])[-1]
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.steps == STEPS


def test_a_state_is_a_copy():
    parameters, gradients = make([(3,)], 0)
    optimizer = Adam(parameters, 0.1)
    run(optimizer, gradients[:2])
    state = optimizer.state_dict()
    kept = {name: x.copy() for name, x in state.items()}
    run(optimizer, gradients[2:4])
    for name, x in state.items():
        np.testing.assert_array_equal(x, kept[name], err_msg=name)


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    def adam(n):
        parameters, gradients = make([(n,)], 0)
        optimizer = Adam(parameters, 0.1)
        run(optimizer, gradients[:3])
        return optimizer

    optimizer = adam(3)
    before = optimizer.state_dict()
    lacking = {name: x for name, x in before.items() if name != "v"}
    sgd = SGD([Parameter(np.ones(3))], 0.1).state_dict()
    for state in ({}, lacking, before | {"w": before["v"]}, adam(4).state_dict(), sgd):
        with pytest.raises(ValueError, match="belongs to another optimizer or another model"):
            optimizer.load_state_dict(state)
    for name, x in optimizer.state_dict().items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)


# --- Clipping ---------------------------------------------------------------------------------


def clip_both(gradients, max_norm):
    """(norm, gradients after) of ours and of torch's."""
    parameters = [Parameter(np.zeros_like(g)) for g in gradients]
    tensors = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in gradients]
    for p, tensor, g in zip(parameters, tensors, gradients, strict=True):
        p.grad[...], tensor.grad = g, torch.tensor(g)
    norm = clip_grad_norm(parameters, max_norm)
    their_norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm, foreach=False).item()
    return (norm, [p.grad for p in parameters]), (their_norm, [t.grad.numpy() for t in tensors])


@given(shapes, st.sampled_from([1e-6, 1e-3, 1.0, 100.0, math.inf]), seeds)
def test_clipping_is_torchs(shapes, max_norm, seed):
    """The norm is a root of a sum of n squares, and its error is relative; so is a product's."""
    rng = np.random.default_rng(seed)
    gradients = [np.asarray(rng.standard_normal(s) * 10.0 ** rng.integers(-4, 4)) for s in shapes]
    n = sum(g.size for g in gradients) + 4
    (norm, ours), (their_norm, theirs) = clip_both(gradients, max_norm)
    assert abs(norm - their_norm) <= n * EPS * their_norm
    assert (
        abs(norm - math.sqrt(sum(math.fsum(g.ravel() ** 2) for g in gradients))) <= n * EPS * norm
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_close("gradient", a, b, n * EPS * np.abs(b))
    after = math.sqrt(sum(float((g**2).sum()) for g in ours))
    assert after <= min(norm, max_norm) * (1 + n * EPS)
    if norm + 1e-6 <= max_norm:
        for a, b in zip(ours, gradients, strict=True):
            np.testing.assert_array_equal(a, b)


def test_clipping_of_nothing_does_nothing():
    (norm, (gradient,)), _ = clip_both([np.zeros(3)], 1.0)
    assert norm == 0
    assert not gradient.any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_returned_and_spreads_as_torchs(bad):
    """Infinity: what is finite becomes 0, the rest NaN.  NaN: everything is NaN."""
    with np.errstate(invalid="ignore"):
        (norm, ours), (their_norm, theirs) = clip_both([np.array([1.0, bad]), np.ones(2)], 1.0)
    np.testing.assert_array_equal(norm, their_norm)
    assert not math.isfinite(norm)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_clipping_keeps_the_dtype_and_writes_into_the_gradient():
    p = Parameter(np.zeros(3, np.float32))
    grad = p.grad
    grad += 2
    assert isinstance(clip_grad_norm([p], 1.0), float)
    assert p.grad is grad
    assert grad.dtype == np.float32
