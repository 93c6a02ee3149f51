"""Who may attend to whom: worked examples, the meaning of an offset, and the twin."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npformer import masks
from npformer.testing.strategies import token_batches
from torchformer import masks as twin_masks

lengths = st.integers(1, 7)
offsets = st.integers(-4, 5)


def test_worked_examples():
    ids = np.array([[5, 6, 0], [7, 0, 0]])
    padding = masks.padding_mask(ids, 0)
    np.testing.assert_array_equal(padding, [[[[True, True, False]]], [[[True, False, False]]]])
    causal = masks.causal_mask(3)
    np.testing.assert_array_equal(causal, np.tril(np.ones((3, 3))) == 1)
    both = padding & causal
    assert both.shape == (2, 1, 3, 3)
    np.testing.assert_array_equal(
        both[1, 0], [[True, False, False], [True, False, False], [True, False, False]]
    )
    # Two queries that continue three earlier keys: the first stands at position 3.
    np.testing.assert_array_equal(
        masks.causal_mask(2, offset=3),
        [[True, True, True, True, False], [True, True, True, True, True]],
    )
    np.testing.assert_array_equal(
        causal & masks.window_mask(3, 3, width=2),
        [[True, False, False], [True, True, False], [False, True, True]],
    )


@given(lengths, st.none() | lengths, offsets)
def test_causal_mask_is_its_definition_in_both_twins(T, S, offset):
    if S is None and offset + T < 1:
        offset = 0
    mask = masks.causal_mask(T, S, offset)
    S = offset + T if S is None else S
    assert mask.shape == (T, S)
    assert mask.dtype == bool
    for t in range(T):
        for s in range(S):
            assert mask[t, s] == (s <= t + offset)
    np.testing.assert_array_equal(twin_masks.causal_mask(T, S, offset).numpy(), mask)


@given(lengths, lengths, st.integers(1, 5), offsets)
def test_window_mask_is_its_definition_in_both_twins(T, S, width, offset):
    mask = masks.window_mask(T, S, width, offset)
    assert mask.dtype == bool
    for t in range(T):
        for s in range(S):
            assert mask[t, s] == (t + offset - s < width)
    np.testing.assert_array_equal(twin_masks.window_mask(T, S, width, offset).numpy(), mask)
    # Under the causal mask, a query sees the last `width` keys that there are.
    seen = (mask & masks.causal_mask(T, S, offset)).sum(axis=1)
    assert (seen <= width).all()


@given(st.data(), lengths, lengths, st.integers(0, 4))
def test_padding_mask_is_true_at_tokens_in_both_twins(data, B, S, pad_id):
    ids = data.draw(token_batches((B, S), 5, pad_id))
    mask = masks.padding_mask(ids, pad_id)
    assert mask.shape == (B, 1, 1, S)
    np.testing.assert_array_equal(mask[:, 0, 0], ids != pad_id)
    theirs = twin_masks.padding_mask(torch.tensor(ids.astype(np.int64)), pad_id)
    np.testing.assert_array_equal(theirs.numpy(), mask)


def test_a_causal_mask_of_a_warm_cache_is_the_end_of_the_whole_one():
    whole = masks.causal_mask(6)
    np.testing.assert_array_equal(masks.causal_mask(2, offset=4), whole[4:])


def test_without_a_pad_id_nothing_is_a_pad():
    ids = np.array([[1, 0]])
    np.testing.assert_array_equal(masks.padding_mask(ids, None), [[[[True, True]]]])
    np.testing.assert_array_equal(
        twin_masks.padding_mask(torch.tensor(ids), None), [[[[True, True]]]]
    )


@pytest.mark.parametrize("of", [masks, twin_masks])
def test_refuses(of):
    ids = np.ones(3, np.int64) if of is masks else torch.ones(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"padding_mask: ids must be \(B, S\), got shape \(3,\)"):
        of.padding_mask(ids, 0)
    with pytest.raises(ValueError, match="window_mask: width must be at least 1, got 0"):
        of.window_mask(3, 3, 0)
