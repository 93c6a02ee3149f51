"""Masks in words: the grid is the mask, the reason is the reason, and any mask is understood."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import npformer
from npformer import cli
from npformer.explain import MARKS, read_mask
from npformer.masks import causal_mask, padding_mask, window_mask

TRIL = np.tri(4, dtype=bool)


def grid_of(text, sample=0):
    """The rows of marks of a sample."""
    lines = text.split(f"sample {sample}: queries down, keys along\n")[1].split("\n\n")[0]
    rows = [line.split("   nothing")[0].split()[1:] for line in lines.splitlines()[1:]]
    return np.array(rows)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.booleans(), st.integers(1, 4))
def test_the_grid_is_the_mask_and_names_a_reason_that_holds(ids, causal, window):
    ids = np.array([ids])
    n = ids.shape[1]
    grid = grid_of(npformer.explain_mask(ids=ids, causal=causal, window=window))
    parts = {"padding": padding_mask(ids, 0)[0, 0], "window": window_mask(n, n, window)}
    if causal:
        parts["causal"] = causal_mask(n)
    allowed = np.broadcast_to(np.logical_and.reduce([
        np.broadcast_to(m, (n, n)) for m in parts.values()
    ]), (n, n))  # fmt: skip
    np.testing.assert_array_equal(grid == ".", allowed)
    for name, mark in MARKS.items():
        if name in parts:
            assert not np.broadcast_to(parts[name], (n, n))[grid == mark].any()


ADDITIVE = np.where(TRIL, 0.0, -np.inf)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (TRIL, "boolean, True = may attend"),
        (~TRIL, "boolean, True = may NOT attend, as in nn.MultiheadAttention"),
        (TRIL.astype(int), "0s and 1s (int64), True = may attend"),
        (TRIL.astype(np.float32), "would hide nothing"),
        (ADDITIVE, "additive (float64): 0 = may attend, -inf = may not"),
        (np.where(TRIL, 0.0, -1e9), "attends to all alike"),
        (torch.tensor(TRIL), "boolean, True = may attend"),
        (torch.tensor(~TRIL), "True = may NOT attend"),
        (torch.tensor(ADDITIVE), "additive"),
        (torch.nn.Transformer.generate_square_subsequent_mask(4), "additive (float32)"),
        (torch.tensor(ADDITIVE).bfloat16(), "additive"),
    ],
)
def test_every_kind_of_mask_is_understood(mask, says):
    allowed, looks = read_mask(mask)
    np.testing.assert_array_equal(allowed, TRIL)
    assert says in looks
    np.testing.assert_array_equal(grid_of(npformer.explain_mask(mask)) == ".", TRIL)


def test_shapes_are_aligned_and_dead_rows_named():
    text = npformer.explain_mask(ids=np.array([[0, 3]]), causal=True, tokens=["<pad>", "cat"])
    assert re.search(r"padding +\( +1, +1, +1, +2\)", text)
    assert re.search(r"causal +\( +2, +2\)", text)
    assert "nothing to attend to: its output is 0" in text
    assert "cat" in text


def test_many_samples_heads_and_tokens_are_cut_and_it_says_so():
    text = npformer.explain_mask(np.ones((6, 1, 50, 50), bool), causal=True)
    assert "and 2 more samples" in text
    assert "only the first 40 of 50 queries and 50 keys" in text
    heads = np.ones((1, 2, 2, 2), bool)
    heads[0, 1, 1, 0] = False
    assert "sample 0, head 1" in npformer.explain_mask(heads)


def test_refuses():
    with pytest.raises(TypeError, match="neither boolean, nor 0 and 1"):
        npformer.explain_mask(np.array([[0.5, 2.0]]))
    with pytest.raises(TypeError, match="an array of booleans or numbers"):
        npformer.explain_mask(np.array(["a"]))
    with pytest.raises(ValueError, match="nothing to explain"):
        npformer.explain_mask(tokens=["a"])
    with pytest.raises(ValueError, match="how many keys"):
        npformer.explain_mask(causal=True)
    with pytest.raises(ValueError, match=r"do not broadcast to \(B, H, T, S\)"):
        npformer.explain_mask(np.ones((3, 5), bool), ids=np.array([[1, 2]]))


def test_the_command(tmp_path, capsys):
    assert cli.main(["mask", "3", "4", "0", "--causal"]) == 0
    said = capsys.readouterr().out
    assert "c  may not: the key comes after the query" in said
    np.testing.assert_array_equal(
        grid_of(said), [[".", "c", "p"], [".", ".", "p"], [".", ".", "p"]]
    )
    np.save(tmp_path / "m.npy", ~TRIL)
    assert cli.main(["mask", "--file", str(tmp_path / "m.npy")]) == 0
    assert "nn.MultiheadAttention" in capsys.readouterr().out
    for arguments in (["mask"], ["mask", "--file", str(tmp_path / "none.npy")]):
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
