"""Masks in words: the grid is the mask, the reason is the reason, and any mask is understood."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import npformer
from npformer import cli, ops
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


# --- What is said of a mask is so -------------------------------------------------------------

PADS = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], bool)[:, None, None, :]
TWO_VALUES = {
    "causal": TRIL,
    "a causal batch": np.broadcast_to(TRIL, (2, 1, 4, 4)),
    "causal without the diagonal": np.tri(4, k=-1, dtype=bool),
    "what comes later, and itself": np.triu(np.full((4, 4), True)),
    "itself alone": np.eye(4, dtype=bool),
    "a window": TRIL & window_mask(4, 4, 2),
    "pads": PADS,
    "causal and pads": PADS & TRIL,
    "pads on the left": PADS[..., ::-1] & TRIL,
    "everything": np.full((1, 1, 4, 4), True),
    "everything, of other sizes": np.full((3, 4), True),
    "anything": np.random.default_rng(0).random((2, 3, 4, 5)) < 0.5,
}
TWO_VALUES |= {f"not {what}": ~x for what, x in TWO_VALUES.items()}
DECLARED = {"causal", "a causal batch"}  # and their opposites


def n_empty(allowed):
    return int((~allowed.any(axis=-1)).sum())


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8, np.float32])
@pytest.mark.parametrize("what", TWO_VALUES)
def test_a_polarity_is_declared_where_it_is_forced_and_else_both_are_said(what, dtype):
    x = TWO_VALUES[what]
    allowed, looks = read_mask(x.astype(dtype))
    readings = {"True = may attend": x, "True = may NOT attend": ~x}
    assert any((allowed == reading).all() for reading in readings.values())
    if x.ndim == 2 or x.shape[1] == 1:  # no heads
        grid = grid_of(npformer.explain_mask(x.astype(dtype)))
        shown = np.broadcast_to(allowed, np.broadcast_shapes(allowed.shape, (1, 1, *grid.shape)))
        np.testing.assert_array_equal(grid == ".", shown[0, 0])
    said = re.findall(r"if (True = may (?:NOT )?attend), as [^:]*: (.+)", looks)
    if what.removeprefix("not ") in DECLARED:
        assert not said
        polarity = re.search(r", (True = may (?:NOT )?attend)", looks)
        assert polarity
        np.testing.assert_array_equal(allowed, readings[polarity[1]])
        assert "no query would see itself, and some would see nothing" in looks
        other = ~allowed
        assert not np.diagonal(other, axis1=-2, axis2=-1).any()
        assert n_empty(other) > 0
        return
    assert [polarity for polarity, _ in said] == list(readings)
    for polarity, claim in said:
        reading = readings[polarity]
        if reading.all():
            assert claim == "everything may be attended to"
        elif not reading.any():
            assert claim == "nothing may be attended to"
        else:
            n, size, empty = re.fullmatch(
                r"(\d+) of (\d+) may be attended to(?:, rows with nothing to attend to: (\d+))?",
                claim,
            ).groups()
            assert (int(n), int(size)) == (reading.sum(), reading.size)
            assert int(empty or 0) == n_empty(reading)
    taken = "second" if "take it for the second" in looks else "first"
    np.testing.assert_array_equal(allowed, x if taken == "first" else ~x)


def weights_by_torch(mask, dtype=torch.float64, scores=None):
    """Of SDPA, whose values are unit vectors, and whose scores are given.   mask (T, S)"""
    T, S = mask.shape
    scores = torch.zeros(T, S) if scores is None else scores
    q = torch.cat([scores, torch.zeros(T, 4)], dim=1) * (S + 4) ** 0.5
    k = torch.eye(S, S + 4)
    out = F.scaled_dot_product_attention(
        q[None].to(dtype),
        k[None].to(dtype),
        torch.eye(S)[None].to(dtype),
        attn_mask=mask[None].to(dtype),
    )
    return out[0]


@pytest.mark.parametrize("of", [iter, tuple, np.array, lambda names: (name for name in names)])
def test_names_of_tokens_may_be_any_iterable(of):
    ids, names = np.array([[1, 2, 0]]), ["a", "b", "c"]
    expected = npformer.explain_mask(ids=ids, causal=True, tokens=names, query_tokens=names)
    assert npformer.explain_mask(ids=ids, causal=True, tokens=of(names)) == expected
    assert (
        npformer.explain_mask(ids=ids, causal=True, tokens=names, query_tokens=of(names))
        == expected
    )
    assert "a  . c" in npformer.explain_mask(causal=True, tokens=of(names[:2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ["a"]}, "^tokens must be 3 names, one for each position, got 1$"),
        ({"query_tokens": "abcd"}, "^query_tokens must be 3 names, one for each position, got 4$"),
        ({"causal": "no"}, "^causal must be true or false, got 'no'$"),
        ({"window": 1.5}, "^window_mask: width must be an integer, got 1.5$"),
        ({"causal": True, "offset": 1.5}, "^causal_mask: offset must be an integer, got 1.5$"),
        ({"pad_id": "0"}, "^padding_mask: pad_id must be an integer, got '0'$"),
    ],
)
def test_options_that_say_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        npformer.explain_mask(ids=np.array([[1, 2, 0]]), **options)


def test_numbers_that_are_added_hide_nothing():
    """0s alone, 1s alone, and both: what is said of a mask that is added to the scores."""
    scores = torch.tensor(np.random.default_rng(0).standard_normal((4, 4)))
    plain = weights_by_torch(torch.zeros(4, 4), scores=scores)
    for x in (torch.zeros(4, 4), torch.ones(4, 4)):
        allowed, looks = read_mask(x)
        assert allowed.all()
        assert "if it is added to the scores: everything may be attended to" in looks
        torch.testing.assert_close(weights_by_torch(x, scores=scores), plain)
    _, looks = read_mask(np.zeros((2, 3), int))
    assert "nothing but 0 (int64), of which polarity its values do not say" in looks
    x = torch.tensor(TRIL).double()
    _, looks = read_mask(x)
    assert "hide nothing, and make the weights at its 1s 2.718 times as large" in looks
    weights = weights_by_torch(x)
    assert (weights > 0).all()
    assert abs(weights[1, 0] / weights[1, 3] - 2.718) < 1e-3


FILLS = [-100.0, -104.0, -300.0, -1e3, -1e4, -65504.0, -1e9, -1e30, float(np.finfo(np.float32).min)]


@pytest.mark.parametrize("fill", FILLS)
def test_a_finite_fill_does_what_is_said_of_it(fill):
    """Each claim is computed: what is left, a row of nothing else in every precision, and NaN."""
    _, looks = read_mask(np.where(TRIL, 0.0, fill))
    assert looks.startswith(f"additive (float64): 0 = may attend, {fill:g} = may not")

    left = torch.tensor([0, fill], dtype=torch.float64).softmax(dim=-1)
    ratio = float(left[1] / left[0])
    said = re.search(r"leaves exp\(.*\) = (\S+), in (.*) precision nothing,", looks)
    if said:
        assert abs(float(said[1]) / ratio - 1) < 0.02  # two digits of it
        assert said[2] == ("half" if fill == -100 else "single and half")
    else:
        assert "leaves nothing, in any precision," in looks
        assert ratio == 0
    assert (torch.tensor([0, fill]).softmax(dim=-1)[1] == 0) == (fill != -100)
    for half in (torch.bfloat16, torch.float16):
        assert torch.tensor([0, fill]).to(half).softmax(dim=-1)[1] == 0

    assert "as if it hid nothing: what all scores have in common drops out" in looks
    scores = torch.tensor([0.7, -1.3, 2.1, 5.9, -8.0])
    for name in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, name)
        masked = scores.to(dtype) + torch.tensor(fill, dtype=torch.float64).to(dtype)
        claim = re.search(rf"in {name} (.*)", looks)[1]
        if "is -inf, and such a row NaN by F.softmax" in claim:
            assert masked.isneginf().all()
            assert masked.softmax(dim=-1).isnan().all()
            continue
        step = float(re.fullmatch(r"the scores in it are rounded to steps of (.*)", claim)[1])
        seen = (masked - masked.max()).double()
        exact = 2.0 ** round(np.log2(step))  # it is a power of 2, of which two digits are said
        assert abs(exact / step - 1) < 0.02
        assert torch.equal((seen / exact).round(), seen / exact)
        before = scores.to(dtype).double()
        assert (seen - (before - before[3])).abs().max() <= exact  # half a step each
        weights = masked.double().softmax(dim=-1)
        if exact < 1e-3:
            torch.testing.assert_close(weights, before.softmax(dim=-1), rtol=0, atol=exact)
        elif exact > 2 * scores.abs().max():
            assert torch.equal(weights, torch.full((5,), 0.2, dtype=torch.float64))

    assert f"attends to all alike where {fill:g} is written over the scores" in looks
    over = scores.double().masked_fill(torch.ones(5, dtype=torch.bool), fill).softmax(dim=-1)
    assert torch.equal(over, torch.full((5,), 0.2, dtype=torch.float64))


def test_several_fills_and_infinity():
    x = np.array([[0.0, -1e9, -100.0], [-200.0, -np.inf, -101.0]])
    _, looks = read_mask(x)
    assert "-inf to -100 = may not" in looks
    assert "a row of nothing else: attends as if the largest number in it were 0" in looks
    scores = torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)
    row = torch.tensor(x[1])
    torch.testing.assert_close((scores + row).softmax(-1), (scores + row + 101).softmax(-1))
    _, looks = read_mask(np.where(TRIL[:, :3], 0.0, -np.inf))
    assert "NaN by F.softmax, 0 by F.scaled_dot_product_attention and here" in looks
    nothing = torch.full((1, 3), -torch.inf)
    assert nothing.softmax(dim=-1).isnan().all()
    for dtype in (torch.float32, torch.bfloat16):
        assert not weights_by_torch(nothing, dtype).any()
    y, _ = ops.softmax(np.zeros((1, 3)), np.full((1, 3), False))
    assert not y.any()
    assert "its output is 0 here" in npformer.explain_mask(np.full((1, 1, 2, 2), -1e4))


def test_whose_axes_they_are():
    """Two are (T, S); where B == T nobody can tell; three and one are refused by the modules."""
    square = npformer.explain_mask(TRIL)
    assert "two axes are always (T, S), here 4 queries of 4 keys; for pads of 4 samples" in square
    assert "give mask[:, None, None, :], which is (B, 1, 1, S)" in square
    assert "4 samples of 4 tokens would have this shape: nobody can tell the two apart" in square
    assert "nobody can tell" not in npformer.explain_mask(TRIL[:3])
    assert "give mask[:, None] for one per sample" in npformer.explain_mask(TRIL[None])
    assert "give mask[None, None, None, :]" in npformer.explain_mask(TRIL[2])
    assert (
        "axes" not in npformer.explain_mask(TRIL[None, None]).replace("axis", "").split("shapes")[0]
    )
    attention = npformer.MultiHeadAttention(8, 2, rng=np.random.default_rng(0))
    for mask, B in ((TRIL, 1), (TRIL[2, None, None, None], 2), (TRIL[None, None], 2)):
        x = np.ones((B, 4, 8), np.float32)
        attention(x, x, x, mask)
    for mask in (TRIL[None], TRIL[2], TRIL[:2]):
        x = np.ones((2, 4, 8), np.float32)
        with pytest.raises(ValueError, match="a padding mask is"):
            attention(x, x, x, mask)


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
    for mask in (
        np.array(["a"]),
        np.array([1j]),
        np.array(True),
        np.ones((0, 3)),
        TRIL[None, None, None],
    ):
        with pytest.raises(
            TypeError, match="an array of booleans or numbers with one to four axes"
        ):
            npformer.explain_mask(mask)
    with pytest.raises(TypeError, match="its values go from nan to nan"):
        npformer.explain_mask(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="n_queries must be at least 1, got 0"):
        npformer.explain_mask(TRIL, n_queries=0)
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
