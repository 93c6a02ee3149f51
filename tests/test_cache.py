"""The key-value cache: however a sequence is cut into steps, it says what the whole would."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import npformer
import torchformer
from npformer import compare
from npformer.cache import KeyValues
from npformer.testing.conformance import OUTPUT
from npformer.testing.models import batches, configs, make_model
from npformer.testing.strategies import masks, seeds
from torchformer.convert import to_torch


def as_tensor(x) -> Any:
    return None if x is None else torch.tensor(x.astype(np.int64) if x.dtype != bool else x.copy())


def same(name, actual, expected):
    __tracebackhide__ = True
    compare.assert_close(name, actual, expected, OUTPUT * max(1, abs(expected).max()))


@st.composite
def pieces(draw, T):
    """Where a sequence of T is cut, in order: [0, ..., T]."""
    cuts = draw(st.sets(st.integers(1, T - 1))) if T > 1 else set()
    return [0, *sorted(cuts), T]


@st.composite
def cases(draw):
    """A model, a batch with pads anywhere, masks besides, and the cuts."""
    config = draw(configs())
    model, batch = make_model(config, draw(seeds)), draw(batches(config))
    T = batch.tgt.shape[1]
    tgt_mask = draw(masks((len(batch.tgt), config.n_heads), T, T))
    return model, batch.src, batch.tgt, batch.options.get("src_mask"), tgt_mask, draw(pieces(T))


def rows(mask, tgt, start, end):
    """The part of a mask of all T positions that a step from `start` to `end` takes."""
    if mask is None:
        return None
    T = tgt.shape[1]
    shape = np.broadcast_shapes(mask.shape, (T, T))
    return np.broadcast_to(mask, shape)[..., start:end, :end]


@given(cases())
def test_any_cut_of_a_sequence_gives_the_logits_of_the_whole(case):
    model, src, tgt, src_mask, tgt_mask, cuts = case
    expected = model.infer(src, tgt, src_mask, tgt_mask)
    cache = model.start(src, src_mask)
    for start, end in pairwise(cuts):
        assert cache.length == start
        logits, cache = model.step(tgt[:, start:end], cache, rows(tgt_mask, tgt, start, end))
        assert logits.dtype == expected.dtype
        same(f"logits {start}:{end}", logits, expected[:, start:end])


@given(cases())
def test_any_cut_gives_the_logits_of_the_whole_in_the_twin(case):
    model, src, tgt, src_mask, tgt_mask, cuts = case
    expected = model.infer(src, tgt, src_mask, tgt_mask)
    twin = to_torch(model).eval()
    cache = twin.start(as_tensor(src), as_tensor(src_mask))
    for start, end in pairwise(cuts):
        assert cache.length == start
        mask = rows(tgt_mask, tgt, start, end)
        logits, cache = twin.step(as_tensor(tgt[:, start:end]), cache, as_tensor(mask))
        same(f"logits {start}:{end}", logits.numpy(), expected[:, start:end])


@given(cases(), st.data())
def test_a_cache_can_be_continued_twice(case, data):
    """As beam search does: the second continuation must not overwrite the first."""
    model, src, tgt, *_ = case
    T = tgt.shape[1]
    assume(T > 1)
    start = data.draw(st.integers(1, T - 1))
    tgt = tgt.astype(np.int64)
    other = (tgt + 1) % model.config.tgt_vocab_size
    _, cache = model.step(tgt[:, :start], model.start(src))
    _, first = model.step(tgt[:, start : start + 1], cache)
    model.step(other[:, start : start + 1], cache)
    if start + 1 < T:
        logits, _ = model.step(tgt[:, start + 1 :], first)
        same("the first continuation", logits, model.infer(src, tgt)[:, start + 1 :])
    mixed = np.concatenate([tgt[:, :start], other[:, start:]], axis=1)
    logits, _ = model.step(other[:, start:], cache)
    same("the second continuation", logits, model.infer(src, mixed)[:, start:])


@given(cases(), st.data())
def test_some_samples_go_on_without_the_others(case, data):
    model, src, tgt, *_ = case
    assume(tgt.shape[1] > 1)
    samples = np.array(data.draw(st.lists(st.integers(0, len(tgt) - 1), min_size=1, max_size=5)))
    expected = model.infer(src, tgt)[samples, 1:]
    _, cache = model.step(tgt[:, :1], model.start(src))
    logits, _ = model.step(tgt[samples, 1:], cache.select(samples))
    same("logits of the samples that go on", logits, expected)

    twin = to_torch(model).eval()
    _, cache = twin.step(as_tensor(tgt[:, :1]), twin.start(as_tensor(src)))
    logits, _ = twin.step(as_tensor(tgt[samples, 1:]), cache.select(torch.tensor(samples)))
    same("logits of the samples that go on, twin", logits.numpy(), expected)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), seeds)
def test_keys_and_values_are_kept_in_order_and_seldom_copied(lengths, seed):
    rng = np.random.default_rng(seed)
    added = [rng.standard_normal((2, 2, 3, n, 4)) for n in lengths]
    kv, rooms = KeyValues.of(*added[0]), set()
    for keys, values in added[1:]:
        kv = kv.append(keys, values)
        rooms.add(id(kv.room))
    np.testing.assert_array_equal(kv.keys, np.concatenate([k for k, _ in added], axis=2))
    np.testing.assert_array_equal(kv.values, np.concatenate([v for _, v in added], axis=2))
    assert len(rooms) <= 1 + np.log2(sum(lengths))


def test_the_memory_is_projected_once():
    """The steps read its keys and values; poisoned projections would show in the logits."""
    config = npformer.TransformerConfig(11, 9, d_model=8, n_heads=2, d_ff=12)
    model = make_model(config, 0)
    src, tgt = np.array([[1, 2, 3]]), np.array([[1, 2, 3, 4]])
    expected = model.infer(src, tgt)
    cache = model.start(src)
    for layer in model.decoder.layers:
        layer.cross_attn.k_proj.weight.data[...] = np.nan
        layer.cross_attn.v_proj.weight.data[...] = np.nan
    for t in range(4):
        logits, cache = model.step(tgt[:, t : t + 1], cache)
        same("logits", logits, expected[:, t : t + 1])


# --- Greedy decoding --------------------------------------------------------------------------


def greedy_without_a_cache(model, src, max_len, eos_id):
    """The same, from the whole sequence each time and one sample at a time."""
    answers = []
    for row in src:
        tgt = [1]
        while len(tgt) <= max_len:
            logits = model.infer(row[None], np.array([tgt]))[0, -1]
            allowed = [i for i in range(len(logits)) if i not in (model.config.tgt_pad_id, 1)]
            token = max(allowed, key=lambda i: (logits[i], -i))
            if token == eos_id:
                break
            tgt.append(token)
        answers.append(tgt[1:])
    return answers


@given(st.data(), seeds)
def test_both_twins_emit_the_tokens_that_no_cache_would(data, seed):
    config = data.draw(configs(encoder=True, src_pad_id=0, tgt_pad_id=0, tie_head=False))
    model = make_model(config, seed)
    src = data.draw(batches(config)).src
    eos_id = data.draw(st.integers(2, config.tgt_vocab_size - 1))
    max_len = data.draw(st.integers(1, config.max_len - 1))
    expected = greedy_without_a_cache(model, src, max_len, eos_id)
    assert npformer.greedy(model, src, max_len=max_len, eos_id=eos_id) == expected
    twin = to_torch(model).eval()
    assert torchformer.greedy(twin, as_tensor(src), max_len=max_len, eos_id=eos_id) == expected


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [False, True])
def test_refuses(twin):
    config = npformer.TransformerConfig(11, 9, d_model=8, n_heads=2, d_ff=12, max_len=4)
    numpy_model = make_model(config, 0)
    model: Any = to_torch(numpy_model).eval() if twin else numpy_model
    convert = as_tensor if twin else np.asarray
    src, tgt = convert(np.array([[1, 2, 3]])), convert(np.array([[1, 2, 3]]))
    _, cache = model.step(tgt, model.start(src))
    with pytest.raises(ValueError, match=r"the sequence has 6 positions, the model has 4 \(max_l"):
        model.step(tgt, cache)
    with pytest.raises(ValueError, match=r"tgt must be .*\(B, T\)"):
        model.step(tgt[0], cache)
    with pytest.raises(ValueError, match="src is None, but the model has an encoder"):
        model.start(None)
    with pytest.raises(ValueError, match="tgt has 2 samples, the cache has 1"):
        model.step(convert(np.array([[1], [2]])), cache)
