"""The whole model: against its twin, against a difference quotient, and by what must be true."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import npformer
import torchformer
from npformer import cross_entropy
from npformer.masks import window_mask
from npformer.testing import as_op, gradient_check
from npformer.testing.conformance import (
    N_NUDGED,
    OUTPUT,
    Example,
    assert_as_exact_as_a_peer,
    check_contract,
    stacked,
)
from npformer.testing.models import (
    Batch,
    assert_same_step,
    batches,
    configs,
    make_model,
    models_and_batches,
    numpy_step,
    torch_step,
)
from npformer.testing.replay import Replay, recorded_masks
from npformer.testing.strategies import seeds
from torchformer import fast, training
from torchformer.convert import to_torch
from torchformer.masks import CAUSAL, causal_mask

SMOOTH = st.sampled_from(["gelu", "gelu_tanh"])


def same_logits(name, actual, expected):
    __tracebackhide__ = True
    npformer.compare.assert_close(name, actual, expected, OUTPUT * abs(expected).max())


# --- Both twins are one function --------------------------------------------------------------


@given(models_and_batches())
def test_logits_loss_and_every_gradient_are_the_twins_in_float64(drawn):
    model, batch = drawn
    assert_same_step("Transformer", numpy_step(model, batch), torch_step(to_torch(model), batch))


@given(models_and_batches(dtype=np.float32, activation="gelu", eps=1e-2))
def test_float32_is_as_exact_as_the_twin(drawn):
    """With GELU: near 0 ReLU turns a rounding error into a gradient that is there or not.

    And a large eps: 1/sqrt(eps) is by how much a LayerNorm may magnify a rounding.
    """
    model, batch = drawn
    exact = npformer.Transformer(model.config, np.random.default_rng(0), np.float64)
    exact.load_state_dict(model.state_dict())
    oracle = numpy_step(exact, batch)
    rng, nudged = np.random.default_rng(0), []
    for _ in range(N_NUDGED):
        exact.load_state_dict(model.state_dict())
        for parameter in exact.parameters():
            parameter.data[...] = npformer.compare.nudge(parameter.data, rng)
        nudged.append(numpy_step(exact, batch))
    c, (B, T) = model.config, batch.tgt.shape
    S = 0 if batch.src is None else batch.src.shape[1]
    n_layers = c.n_encoder_layers + c.n_decoder_layers
    n = n_layers * (18 * c.d_model + c.d_ff + S + T) + c.tgt_vocab_size + B * (S + T)
    assert_as_exact_as_a_peer(
        "Transformer, float32",
        numpy_step(model, batch),
        torch_step(to_torch(model), batch),
        oracle,
        stacked(nudged),
        n,
        outputs=("logits", "loss"),
    )


@given(models_and_batches(dropout=True), seeds)
def test_with_the_same_entries_dropped_both_twins_are_one_function(drawn, seed):
    model, batch = drawn
    with recorded_masks() as masks:
        ours = numpy_step(model, batch, rng=np.random.default_rng(seed))
    replay = Replay(masks)
    theirs = torch_step(to_torch(model), batch, rng=replay)
    assert not replay.rest, f"the twin never asked for {len(replay.rest)} of the masks"
    assert_same_step("Transformer, with dropout", ours, theirs)


def test_every_kind_of_dropout_drops_where_it_says():
    """The masks in order, known by their probabilities; none without an rng."""
    config = npformer.TransformerConfig(
        11,
        9,
        d_model=6,
        n_heads=2,
        d_ff=10,
        n_encoder_layers=1,
        n_decoder_layers=1,
        embedding_dropout=0.1,
        attention_dropout=0.2,
        activation_dropout=0.3,
        sublayer_dropout=0.4,
    )
    model, src, tgt = make_model(config, 0), np.full((3, 5), 1), np.full((3, 4), 1)
    with recorded_masks() as masks:
        model(src, tgt)
    assert masks == []
    with recorded_masks() as masks:
        model(src, tgt, rng=np.random.default_rng(0))
    attention, feed_forward, sublayer = [0.2, 0.4], [0.3, 0.4], 0.4
    encoder = [0.1, *attention, *feed_forward]
    decoder = [0.1, *attention, *attention, *feed_forward]
    assert [p for _, p, _ in masks] == encoder + decoder
    shapes = {0.1: (6,), 0.3: (10,), sublayer: (6,)}
    for shape, p, keep in masks:
        assert shape == keep.shape
        assert shape[-1:] == shapes.get(p, shape[-1:])
    assert [m.shape for m in masks if m.p == 0.2] == [(3, 2, 5, 5), (3, 2, 4, 4), (3, 2, 4, 5)]


@given(configs(), seeds)
def test_one_seed_gives_both_twins_the_same_weights(config, seed):
    for name in ("float32", "float64"):
        ours = npformer.Transformer(config, np.random.default_rng(seed), getattr(np, name))
        theirs = torchformer.Transformer(config, np.random.default_rng(seed), getattr(torch, name))
        state = ours.state_dict()
        assert list(state) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        for key, x in theirs.state_dict().items():
            assert state[key].dtype == np.dtype(name)
            np.testing.assert_array_equal(state[key], x.numpy(), err_msg=key)


# --- The derivative ---------------------------------------------------------------------------


@given(st.data(), seeds)
def test_gradient_is_the_derivative(data, seed):
    """Without pads, whose rows have no gradient by decree, not by calculus."""
    config = data.draw(configs(activation=data.draw(SMOOTH), tie_head=False))
    model = make_model(config, seed)
    batch = data.draw(batches(config, pads=False))
    op = as_op(model, **batch.options)
    parameters = [p.data for p in model.parameters()]
    gradient_check("Transformer", op, batch.src, batch.tgt[:, :-1], *parameters)


@given(models_and_batches())
def test_contract(drawn):
    model, batch = drawn
    inputs = (batch.tgt,) if batch.src is None else (batch.src, batch.tgt[:, :-1])
    for dtype in (np.float32, np.float64):

        def make(_, dtype=dtype):
            copy = npformer.Transformer(model.config, np.random.default_rng(0), dtype)
            copy.load_state_dict(model.state_dict())
            return copy if batch.src is not None else DecoderOnly(copy)

        options = batch.options if batch.src is not None else {}
        check_contract(Example(make, lambda: None, inputs, options), dtype)


class DecoderOnly(npformer.Module):
    """Without the None that stands where a source would."""

    def __init__(self, model):
        self.model = model

    def forward(self, tgt, **options):
        return self.model(None, tgt, **options)


@given(models_and_batches(dropout=True), seeds)
def test_backward_drops_what_forward_dropped_however_often_it_is_called(drawn, seed):
    model, batch = drawn
    inputs = batch.src, batch.tgt[:, :-1]
    logits, backward = model(*inputs, rng=np.random.default_rng(seed))
    dlogits = np.random.default_rng(seed).standard_normal(logits.shape)
    backward(dlogits)
    first = [p.grad.copy() for p in model.parameters()]
    model(*inputs, rng=np.random.default_rng(seed + 1))
    model.zero_grad()
    backward(dlogits)
    for (name, p), g in zip(model.named_parameters(), first, strict=True):
        np.testing.assert_array_equal(p.grad, g, err_msg=name)


# --- Which gradients there are ----------------------------------------------------------------


def full_batch(config):
    """Every id and every position is used, and no id is a pad."""
    rng = np.random.default_rng(0)
    T = config.max_len
    src = np.tile(np.delete(np.arange(config.src_vocab_size), config.src_pad_id), (4, 2))[:, :T]
    tgt = np.tile(np.delete(np.arange(config.tgt_vocab_size), config.tgt_pad_id), (4, 2))
    tgt = rng.permuted(tgt, axis=1)[:, : T + 1]
    return Batch(src if config.n_encoder_layers else None, tgt, {})


@given(configs(activation="gelu"), seeds)
def test_every_parameter_gets_a_gradient(config, seed):
    """All but the bias of the keys, where it is 0 in theory; and no row of a table is forgotten."""
    model = make_model(config, seed)
    step = numpy_step(model, full_batch(config))
    eps, largest = float(np.finfo(np.float64).eps), max(abs(g).max() for g in step.values())
    for name, gradient in step.items():
        if name.endswith("k_proj.bias"):
            # A sum of terms that cancel, a few hundred of them
            assert abs(gradient).max() <= 1000 * eps * largest, name
        elif "embedding" in name:
            pad = config.src_pad_id if name.startswith("src") else config.tgt_pad_id
            assert np.delete(gradient, pad, axis=0).any(axis=1).all(), name
        elif "positions" in name:
            used = full_batch(config).tgt.shape[1] - 1
            assert gradient[:used].any(axis=1).all(), name
        elif name not in ("logits", "loss"):
            assert gradient.any(), name


@pytest.mark.parametrize("tie_head", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@given(data=st.data(), seed=seeds)
def test_the_row_of_a_pad_is_zero_and_has_no_gradient_in_either_twin(data, seed, tie_head, shared):
    fixed = {"src_vocab_size": 11, "tgt_vocab_size": 11, "src_pad_id": 4, "tgt_pad_id": 4}
    config = data.draw(configs(encoder=True, tie_head=tie_head, share_embeddings=shared, **fixed))
    model = make_model(config, seed)
    batch = data.draw(batches(config))
    for step in (numpy_step(model, batch), torch_step(to_torch(model), batch)):
        for name, gradient in step.items():
            if "embedding" in name:
                assert not gradient[4].any(), name
    for name, x in model.state_dict().items():
        if "embedding" in name:
            assert not x[4].any(), name


@given(st.data(), seeds)
def test_micro_batches_add_up_to_the_step(data, seed):
    """With `n_targets` of the whole step, whichever samples go together."""
    config = data.draw(configs())
    model, batch = make_model(config, seed), data.draw(batches(config, given_masks=False))
    whole = numpy_step(model, batch)
    asked = batch.tgt[:, 1:]
    n_targets = int((asked != config.tgt_pad_id).sum())
    model.zero_grad()
    total = 0.0
    cut = data.draw(st.integers(0, len(asked)))
    for part in (slice(0, cut), slice(cut, None)):
        tgt = batch.tgt[part]
        if len(tgt) == 0:
            continue
        logits, backward_model = model(None if batch.src is None else batch.src[part], tgt[:, :-1])
        loss, backward_loss = cross_entropy(
            logits, tgt[:, 1:], config.tgt_pad_id, batch.label_smoothing, n_targets
        )
        backward_model(backward_loss(1.0))
        total += loss
    parts = {"logits": whole["logits"], "loss": np.asarray(total)}
    parts |= {name: p.grad for name, p in model.named_parameters()}
    assert_same_step("Transformer, in parts", parts, whole)


# --- What must be true of any Transformer -----------------------------------------------------


@given(st.data(), seeds)
def test_causality_no_position_sees_what_comes_after_it(data, seed):
    config = data.draw(configs())
    model, batch = make_model(config, seed), data.draw(batches(config, given_masks=False))
    tgt = batch.tgt.astype(np.int64)
    t = data.draw(st.integers(1, tgt.shape[1] - 1))
    other = tgt.copy()
    other[:, t] = (other[:, t] + 1) % config.tgt_vocab_size
    before, after = model.infer(batch.src, tgt), model.infer(batch.src, other)
    same_logits("logits before the change", after[:, :t], before[:, :t])


def test_what_was_changed_is_seen_from_there_on():
    """Else the test above would pass for a model that sees nothing at all."""
    config = npformer.TransformerConfig(11, 9, d_model=8, n_heads=2, d_ff=12)
    model, src, tgt = make_model(config, 0), np.full((1, 3), 1), np.array([[1, 2, 3, 4]])
    before = model.infer(src, tgt)
    for t in range(4):
        other = tgt.copy()
        other[0, t] = 8
        seen = (model.infer(src, other) != before).any(axis=-1)[0]
        np.testing.assert_array_equal(seen, np.arange(4) >= t)
    other = src.copy()
    other[0, 1] = 7
    assert (model.infer(other, tgt) != before).any(axis=-1).all()


@given(st.data(), seeds)
def test_pads_on_the_right_change_nothing(data, seed):
    config = data.draw(configs())
    model = make_model(config, seed)
    src, tgt = data.draw(batches(config, pads=False, given_masks=False))[:2]
    expected = model.infer(src, tgt)
    more = data.draw(st.integers(1, 3))

    def pad(ids, pad_id):
        return np.pad(ids, ((0, 0), (0, more)), constant_values=pad_id)

    src = None if src is None else pad(src, config.src_pad_id)
    actual = model.infer(src, pad(tgt, config.tgt_pad_id))
    same_logits("logits beside pads", actual[:, : tgt.shape[1]], expected)


@given(models_and_batches(encoder=True), st.randoms(use_true_random=False))
def test_samples_do_not_know_of_each_other(drawn, random):
    model, (src, tgt, *_) = drawn
    expected = model.infer(src, tgt)
    order = list(range(len(tgt)))
    random.shuffle(order)
    same_logits("logits, permuted", model.infer(src[order], tgt[order]), expected[order])
    alone = np.concatenate([model.infer(src[i : i + 1], tgt[i : i + 1]) for i in order])
    same_logits("logits, one by one", alone, expected[order])


@given(models_and_batches(dropout=True))
def test_inference_is_pure_in_both_twins(drawn):
    model, batch = drawn
    src, tgt = batch.src, batch.tgt[:, :-1]
    weights = model.state_dict()
    logits, _ = model(src, tgt, **batch.options)
    for _ in range(2):
        np.testing.assert_array_equal(model.infer(src, tgt, **batch.options), logits)
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.data, weights[name], err_msg=name)
        assert not p.grad.any(), name

    twin = to_torch(model).train()
    src, tgt = (None if x is None else torch.tensor(x.astype(np.int64)) for x in (src, tgt))
    options = {k: None if x is None else torch.tensor(x.copy()) for k, x in batch.options.items()}
    first, again = twin.infer(src, tgt, **options), twin.infer(src, tgt, **options)
    np.testing.assert_array_equal(first.numpy(), again.numpy())  # no dropout ...
    assert twin.training  # ... and it goes on as it was
    assert not first.requires_grad
    same_logits("logits", logits, first.numpy())


# --- A mask that is given is &-ed to those that the model makes -------------------------------


@given(st.data(), seeds)
def test_a_given_mask_can_only_take_away(data, seed):
    config = data.draw(configs(encoder=True))
    model, batch = make_model(config, seed), data.draw(batches(config, given_masks=False))
    src, tgt = batch.src, batch.tgt
    expected = model.infer(src, tgt)
    everything = {"src_mask": np.full((src.shape[1],) * 2, True)}
    everything["tgt_mask"] = np.full((1, 1, 1, tgt.shape[1]), True)
    np.testing.assert_array_equal(model.infer(src, tgt, **everything), expected)
    # What padding and causality forbid already may be forbidden once more.
    causal = np.arange(tgt.shape[1]) <= np.arange(tgt.shape[1])[:, None]
    padding = (src != config.src_pad_id)[:, None, None, :]
    again = model.infer(src, tgt, src_mask=padding, tgt_mask=causal)
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("given", [(), (None,), (np.ones((1, 1, 1, 3), bool),)])
def test_a_memory_without_a_mask_is_all_attended_to_and_gets_its_gradient(given):
    """Without a mask the backward took the model for decoder-only, and crashed."""
    config = npformer.TransformerConfig(11, 9, 8, 2, 12, n_encoder_layers=1, n_decoder_layers=2)
    model, rng = make_model(config, 0), np.random.default_rng(0)
    tgt, memory = np.array([[1, 2, 3, 0], [4, 5, 6, 7]]), rng.standard_normal((2, 3, 8))
    logits, backward = model.decode(tgt, memory, *given)
    dlogits = rng.standard_normal(logits.shape)
    model.zero_grad()
    dmemory = backward(dlogits)

    twin, tensor = to_torch(model), torch.tensor(memory, requires_grad=True)
    masks = [None if mask is None else torch.tensor(mask) for mask in given]
    theirs = twin.eval().decode(torch.tensor(tgt), tensor, *masks)
    theirs.backward(torch.tensor(dlogits))
    np.testing.assert_allclose(logits, theirs.detach().numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(dmemory, tensor.grad, rtol=0, atol=1e-11)
    for name, p in twin.named_parameters():
        expected = 0 if p.grad is None else p.grad  # the encoder's: it was not asked
        actual = dict(model.named_parameters())[name].grad
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10, err_msg=name)


def test_encoding_alone_and_decoding_alone_go_back_as_well():
    """The parts of `forward`, called one by one, in any order."""
    config = npformer.TransformerConfig(11, 9, 8, 2, 12, n_encoder_layers=1, n_decoder_layers=1)
    model, rng = make_model(config, 0), np.random.default_rng(0)
    src, tgt = np.array([[1, 2, 0]]), np.array([[3, 4]])
    logits, backward = model(src, tgt)
    dlogits = rng.standard_normal(logits.shape)
    model.zero_grad()
    backward(dlogits)
    expected = {name: p.grad.copy() for name, p in model.named_parameters()}
    memory, backward_encode = model.encode(src)
    logits, backward_decode = model.decode(tgt, memory, (src != 0)[:, None, None, :])
    model.zero_grad()
    assert backward_encode(backward_decode(dlogits)) is None
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.grad, expected[name], err_msg=name)
    alone = make_model(replace(config, n_encoder_layers=0), 0)
    whole, _ = alone.decode(tgt, None)
    np.testing.assert_array_equal(alone.infer(None, tgt), whole)
    twin = to_torch(alone).eval()
    ids = torch.tensor(tgt)
    assert torch.equal(twin.infer(None, ids), twin.decode(ids, None))


@pytest.mark.parametrize("which", ["src_mask", "tgt_mask"])
def test_a_samples_mask_is_its_own_though_there_are_as_many_heads(which):
    """(B, T, S) was taken for (H, T, S): the mask of sample 1 changed sample 0 by 0.54."""
    config = npformer.TransformerConfig(11, 9, 8, 2, 12, n_encoder_layers=1, n_decoder_layers=1)
    model, twin = make_model(config, 0), to_torch(make_model(config, 0)).eval()
    src, tgt = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 2, 3], [4, 5, 6]])
    mask = np.full((2, 3, 3), True)
    mask[1, 1:, 0] = False  # of sample 1 alone
    given = {which: mask[:, None]}
    plain, masked = model.infer(src, tgt), model.infer(src, tgt, **given)
    np.testing.assert_allclose(masked[0], plain[0], rtol=0, atol=1e-12)
    assert np.abs(masked[1] - plain[1]).max() > 1e-3
    theirs = twin.infer(torch.tensor(src), torch.tensor(tgt), **{which: torch.tensor(given[which])})
    np.testing.assert_allclose(masked, theirs, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=f"{which} .* has 3 axes: is the first one B or H"):
        model.infer(src, tgt, **{which: mask})


def test_a_window_is_a_window():
    """One decoder-only layer: each position sees the last two tokens, and no other."""
    config = npformer.TransformerConfig(1, 9, 8, 2, 12, n_encoder_layers=0, n_decoder_layers=1)
    model, tgt = make_model(config, 0), np.array([[1, 2, 3, 4, 5]])
    mask = window_mask(5, 5, width=2)
    before = model.infer(None, tgt, tgt_mask=mask)
    for t in range(5):
        other = tgt.copy()
        other[0, t] = 8
        seen = (model.infer(None, other, tgt_mask=mask) != before).any(axis=-1)[0]
        np.testing.assert_array_equal(seen, np.isin(np.arange(5), [t, t + 1]))


def test_a_mask_of_the_source_is_the_encoders_alone():
    config = npformer.TransformerConfig(11, 9, 8, 2, 12, n_encoder_layers=1)
    model, src, tgt = make_model(config, 0), np.array([[1, 2, 3]]), np.array([[1, 2]])
    itself_only = np.eye(3) == 1
    memory, _ = model.encode(src, itself_only)
    other, _ = model.encode(np.array([[1, 2, 7]]), itself_only)
    np.testing.assert_array_equal((memory != other).any(axis=-1)[0], [False, False, True])
    # The decoder still asks all of the memory.
    seen = model.infer(src, tgt, src_mask=itself_only)
    changed = model.infer(np.array([[1, 2, 7]]), tgt, src_mask=itself_only)
    assert (seen != changed).any(axis=-1).all()


# --- What is refused --------------------------------------------------------------------------

CONFIG = npformer.TransformerConfig(
    11, 9, d_model=8, n_heads=2, d_ff=12, n_encoder_layers=1, n_decoder_layers=1, max_len=6
)
ALONE = npformer.TransformerConfig(
    11, 9, d_model=8, n_heads=2, d_ff=12, n_encoder_layers=0, n_decoder_layers=1, max_len=6
)
SRC, TGT = np.ones((2, 5), np.int64), np.ones((2, 4), np.int64)
REFUSED = {
    "a source of rank 1": (CONFIG, {"src": SRC[0]}, r"src .*\(B, S\).* shape \(5,\).* ids\[None\]"),
    "a target of rank 3": (CONFIG, {"tgt": TGT[None]}, r"tgt .*\(B, T\).* got shape \(1, 2, 4\)"),
    "no source": (CONFIG, {"src": None}, "src is None, but the model has an encoder"),
    "a source too many": (ALONE, {}, "src must be None, the model is decoder-only"),
    "no target": (CONFIG, {"tgt": None}, "tgt .*NoneType"),
    "too long a source": (CONFIG, {"src": np.ones((2, 7), int)}, r"src .* 7 pos.* 1 to 6 \(max_l"),
    "too long a target": (CONFIG, {"tgt": np.ones((2, 7), int)}, r"tgt .* 7 pos.* 1 to 6 \(max_l"),
    "an empty source": (CONFIG, {"src": np.ones((2, 0), int)}, "src has 0 positions"),
    "an empty target": (CONFIG, {"tgt": np.ones((2, 0), int)}, "tgt has 0 positions"),
    "two batch sizes": (CONFIG, {"src": SRC[:1]}, "src has 1 samples, tgt has 2"),
    "a float mask": (
        CONFIG,
        {"tgt_mask": np.tril(np.ones((4, 4)))},
        "mask must be boolean, True = may attend.* mask == 1",
    ),
    "a mask of integers": (CONFIG, {"src_mask": np.ones((5, 5), int)}, "mask must be boolean"),
    "a mask of another T": (
        CONFIG,
        {"tgt_mask": np.full((3, 3), True)},
        r"tgt_mask of shape \(3, 3\) does not broadcast to \(B, H, T, S\) = \(2, 2, 4, 4\)",
    ),
    "a mask of another S": (
        CONFIG,
        {"src_mask": np.full((2, 1, 1, 4), True)},
        r"src_mask of shape \(2, 1, 1, 4\) does not broadcast to \(B, H, T, S\) = \(2, 2, 5, 5\)",
    ),
    "a padding mask of rank 2": (
        CONFIG,
        {"src_mask": np.full((2, 5), True)},
        r"src_mask of shape \(2, 5\) .*; a padding mask is \(B, 1, 1, S\)",
    ),
    "a mask of rank 5": (
        CONFIG,
        {"tgt_mask": np.full((1, 2, 2, 4, 4), True)},
        r"tgt_mask of shape \(1, 2, 2, 4, 4\) does not broadcast",
    ),
}


@pytest.mark.parametrize("twin", ["npformer", "torchformer"])
@pytest.mark.parametrize("what", REFUSED)
def test_both_twins_refuse(what, twin):
    config, changes, message = REFUSED[what]
    arguments = {"src": SRC, "tgt": TGT} | changes
    if twin == "npformer":
        model = npformer.Transformer(config, np.random.default_rng(0))
    else:
        model = torchformer.Transformer(config, np.random.default_rng(0))
        arguments = {k: None if x is None else torch.tensor(x) for k, x in arguments.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.array([[1, 11]]), ValueError, r"id 11 is not in the vocabulary of 11 \(ids 0\.\.10\)"),
        (np.array([[-1, 1]]), ValueError, "id -1 is not in the vocabulary of 11"),
        (np.array([[1.0, 2.0]]), TypeError, "ids must be an integer array, got float64"),
        ([[1, 2]], ValueError, r"src must be an array \(B, S\) of integer ids, got list"),
    ],
)
def test_refuses_ids_that_are_none(ids, error, message):
    model = npformer.Transformer(CONFIG, np.random.default_rng(0))
    with pytest.raises(error, match=message):
        model(ids, TGT[:1])


@pytest.mark.parametrize("bad", [9, -1, 10**6])
@pytest.mark.parametrize("kind", [np.int64, np.int32])
def test_both_twins_name_an_id_that_there_is_not(bad, kind):
    """Of torch's own the CPU says 'index out of range in self', and not which."""
    model = npformer.Transformer(CONFIG, np.random.default_rng(0))
    twin = torchformer.Transformer(CONFIG, np.random.default_rng(0))
    src, tgt = SRC.astype(kind), TGT.astype(kind)
    source = src.copy()
    source[1, 2] = tgt[0, 1] = 11 if bad == 9 else bad  # the source's vocabulary is another
    good = np.ones_like(tgt)
    tgt[0, 1] = bad
    logits = np.zeros((2, 4, 9), np.float32)
    calls = {
        f"^embedding: id {source[1, 2]} is not in the vocabulary of 11": [
            (lambda: model(source, good), lambda: twin(*tensors(source, good))),
            (lambda: model.encode(source), lambda: twin.encode(*tensors(source))),
            (lambda: model.infer(source, good), lambda: twin.infer(*tensors(source, good))),
            (
                lambda: npformer.greedy(model, source, max_len=3),
                lambda: torchformer.greedy(twin, *tensors(source), max_len=3),
            ),
            (None, lambda: fast.greedy(twin, *tensors(source), max_len=3)),
        ],
        rf"^embedding: id {bad} is not in the vocabulary of 9 \(ids 0\.\.8\)$": [
            (lambda: model(src, tgt), lambda: twin(*tensors(src, tgt))),
            (
                lambda: model.step(tgt, model.start(src)),
                lambda: twin.step(*tensors(tgt), twin.start(*tensors(src))),
            ),
            (None, lambda: fast.continued(twin, *tensors(tgt), 2, src=torch.tensor(src))),
        ],
        rf"^cross_entropy: id {bad} is not in the vocabulary of 9 \(ids 0\.\.8\)$": [
            (
                lambda: npformer.cross_entropy(logits, tgt, ignore_index=0),
                lambda: training.cross_entropy(torch.tensor(logits), torch.tensor(tgt).long()),
            ),
        ],
    }
    for message, pairs in calls.items():
        for call in (call for pair in pairs for call in pair if call):
            with pytest.raises(ValueError, match=message):
                call()


def tensors(*ids):
    return [torch.tensor(x) for x in ids]


def test_a_model_that_is_compiled_whole_still_is():
    """What names an id is a `try`, which dynamo has to follow."""
    twin = torchformer.Transformer(CONFIG, np.random.default_rng(0)).eval()
    compiled: Any = torch.compile(twin, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(*tensors(SRC, TGT)), twin(*tensors(SRC, TGT)))


NO_MEMORIES = {
    "another batch": np.ones((1, 5, 8)),
    "no batch": np.ones((5, 8)),
    "another width": np.ones((2, 5, 4)),
    "no positions": np.ones((2, 0, 8)),
    "a list": [[1.0]],
}


@pytest.mark.parametrize("what", NO_MEMORIES)
def test_what_is_no_memory_is_refused_by_both(what):
    memory = NO_MEMORIES[what]
    model = npformer.Transformer(CONFIG, np.random.default_rng(0), np.float64)
    twin = torchformer.Transformer(CONFIG, np.random.default_rng(0), torch.float64)
    message = r"^Transformer: memory must be \(B, S, C\) with B = 2.* and C = 8, got shape \("
    with pytest.raises(ValueError, match=message):
        model.decode(TGT, memory)  # type: ignore
    theirs = torch.tensor(memory) if isinstance(memory, np.ndarray) else memory
    with pytest.raises(ValueError, match=message):
        twin.decode(torch.tensor(TGT), theirs)


def test_causal_in_the_twin_is_the_mask_it_stands_for_or_refused():
    """In a step it hid the positions before the step: a kernel counts both from 0."""
    twin = torchformer.Transformer(CONFIG, np.random.default_rng(0)).eval()
    src, tgt = tensors(SRC, TGT)
    given = causal_mask(5)
    assert torch.equal(twin.infer(src, tgt, CAUSAL), twin.infer(src, tgt, given))
    assert torch.equal(twin.infer(src, tgt, None, CAUSAL), twin.infer(src, tgt))
    _, cache = twin.step(tgt[:, :2], twin.start(src))
    x = torch.ones(2, 1, 8)
    for call in (
        lambda: twin.step(tgt[:, 2:3], cache, CAUSAL),
        lambda: twin.decoder.step(x, cache.layers, CAUSAL),
        lambda: twin.decoder.layers[0].cross_attn(
            x, torch.ones(2, 5, 8), torch.ones(2, 5, 8), CAUSAL
        ),
    ):
        with pytest.raises(ValueError, match="mask is CAUSAL, for as many keys as queries, got 1"):
            call()


# --- Shortcuts of the torch twin ----------------------------------------------------------------


@given(st.data(), seeds)
def test_causal_alone_hides_pads_at_the_end(data, seed):
    """`right_padded`: logits at the tokens, the loss and every gradient are what they were."""
    config = data.draw(configs())
    model = make_model(config, seed)
    batch = data.draw(batches(config, pads=False, given_masks=False))
    tgt = batch.tgt.astype(np.int64)
    B, T = tgt.shape[0], tgt.shape[1] - 1
    lengths = data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
    for row, n in zip(tgt, lengths, strict=True):
        row[n + 1 :] = config.tgt_pad_id
    batch = batch._replace(tgt=tgt)
    twin = to_torch(model)
    plain = torch_step(twin, batch)
    twin.right_padded = True
    short = torch_step(twin, batch)
    is_token = tgt[:, :-1] != config.tgt_pad_id
    plain["logits"], short["logits"] = plain["logits"][is_token], short["logits"][is_token]
    assert_same_step("right_padded", short, plain)
