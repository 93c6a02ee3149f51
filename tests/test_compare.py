"""A report says what is wrong, each hint where it is true and only there."""

import numpy as np
import pytest

from npformer import compare

HINTS = ["constant factor", "transposed", "sign", "only some rows", "masked", "NaN", "infinite"]
HINTS += ["dtypes differ", "0 everywhere"]
x = np.random.default_rng(0).standard_normal((3, 4, 4))
mask = np.eye(4) == 0  # each row has an entry that is masked


def hints(actual, expected=x, bound=1e-12, mask=None) -> list[str]:
    text = compare.report("dweight", actual, expected, bound, mask)
    assert text is not None
    assert "dweight" in text
    return [hint for hint in HINTS if hint in text]


def changed(index, value=1.0):
    y = x.copy()
    y[index] += value
    return y


def test_no_report_within_the_bound():
    assert compare.report("y", x, x, 0.0) is None
    assert compare.report("y", x + 0.9e-3, x, 1e-3) is None
    assert compare.report("y", x + 1.1e-3, x, 1e-3) is not None
    assert compare.report("y", np.empty((0, 3)), np.empty((0, 3)), 0.0) is None
    assert compare.report("loss", np.float32(1.5), 1.5, 0.0) is None  # scalars, and other dtypes
    compare.assert_close("y", x, x, 0.0)


def test_a_bound_is_elementwise_and_broadcasts():
    bound = np.array([1e-3, 1e-3, 1e-3, 1.0])
    assert compare.report("y", changed((..., 3), 0.9), x, bound) is None
    assert hints(changed((..., 2), 0.9), bound=bound) == []


def test_equal_infinities_and_nans_agree():
    y = changed((0, 0, 0), np.nan)
    y[1, 1, 1] = -np.inf
    assert compare.report("y", y, y, 0.0) is None
    assert compare.report("y", y, -y, 1e9) is not None


def test_the_worst_entry_is_named_with_both_values_and_units():
    y = x.copy()
    y[1, 2, 3] = 1 + 2.0**-20
    e = x.copy()
    e[1, 2, 3] = 1.0
    y[0, 0, 0] += 1e-7
    text = compare.report("dx", y, e, 2.0**-30)
    assert text is not None
    assert "dx (3, 4, 4) float64: 2 of 48 entries" in text
    assert "(1, 2, 3): actual 1.0000009536743164, expected 1.0" in text
    assert f"{2**10:.3g} tolerances" in text
    assert f"{2**32:.3g} ulps" in text  # eps is 2⁻⁵²
    as_float32 = compare.report("dx", y.astype(np.float32), e, 2.0**-30)
    assert as_float32 is not None
    assert "8 ulps" in as_float32  # in the coarser dtype, where eps is 2⁻²³


def test_an_error_where_none_is_allowed():
    text = compare.report("dx", changed((0, 0, 0)), x, 0.0)
    assert text is not None
    assert "inf tolerances" in text
    assert compare.report("dx", x, x, np.nan) is None
    assert compare.report("dx", x + 1, x, np.nan) is not None


@pytest.mark.parametrize(
    ("c", "name"),
    [(8.0, "8 *"), (1 / 3, "(1/3?)"), (2**0.5, "(√2?)"), (5**-0.5, "(1/√5?)"), (-0.2, "(-1/5?)")],
)
def test_hint_constant_factor(c, name):
    assert hints(c * x) == ["constant factor"]
    assert name in str(compare.report("dweight", c * x, x, 1e-12))
    assert hints(np.float32(c) * x.astype("f4"), x.astype("f4"), 1e-6) == ["constant factor"]


def test_no_factor_explains_one_number_or_noise():
    assert hints(np.array(2.0), np.array(1.0)) == []
    assert hints(np.array([2.0, 0.0]), np.array([1.0, 0.0])) == []
    assert hints(2 * x + 1e-6 * x**2) == []


def test_hint_sign():
    assert hints(-x) == ["sign"]


def test_hint_zero():
    assert hints(0 * x) == ["0 everywhere"]


def test_hint_transposed():
    assert hints(x.mT) == ["transposed"]
    assert hints(x[:, :3], x[:, :3].mT) == ["transposed"]  # even where the shapes say so
    assert hints(x[:, :3] + 1, x[:, :3].mT) == []
    assert hints(x[0, 0, :3], x[0, 0]) == []


def test_hint_rows():
    assert hints(changed((1, 2))) == ["only some rows"]
    assert "1 of 12 are out: (1, 2)" in str(compare.report("y", changed((1, 2)), x, 0.0))
    assert hints(changed((..., 0))) == []  # every row has one
    assert hints(changed((0, 0, 0))[0, 0], x[0, 0]) == []  # one row is all there is
    assert "and 4 more" in str(compare.report("y", changed(slice(2)), x, 0.0))


def test_hint_masked():
    assert hints(np.where(mask, x, 7.0), mask=mask) == ["masked"]
    assert hints(np.where(mask, x, 7.0)) == []
    assert hints(x + 1, mask=mask) == []
    assert hints(np.where(mask, 7.0, x), mask=mask) == []


def test_hint_not_finite_on_one_side():
    assert hints(changed((..., 1), np.nan)) == ["NaN"]
    assert hints(x, changed((..., 1), np.nan)) == ["NaN"]
    assert hints(changed((..., 1), np.inf), bound=np.inf) == ["infinite"]
    text = str(compare.report("y", changed((0, 0, 0), np.nan), x, 1e9))
    assert "actual is NaN in 1 entries" in text


def test_hint_dtype():
    assert hints(x.astype("f4") + 1) == ["dtypes differ"]
    assert compare.report("y", x.astype("f4"), x.astype("f4").astype("f8"), 0.0) is None


def test_a_failure_raises_the_report():
    with pytest.raises(AssertionError, match=r"q_proj\.weight.*\n.*worst at(.*\n)*.*factor"):
        compare.assert_close("q_proj.weight", 8 * x, x, 1e-12)


# --- A whole model ----------------------------------------------------------------------------


def test_tensors_are_compared_by_name_in_the_order_given():
    expected = {"head": x, "layers.0": x[0], "embedding": x[1]}
    actual = {"embedding": x[1], "layers.0": x[0], "head": x}
    rows = compare.compare_tensors(actual, expected, lambda name, e: 1e-12 * np.abs(e).max())
    assert [row.name for row in rows] == list(expected)
    assert all(row.ok for row in rows)
    assert rows[0].scale == np.abs(x).max()
    assert "first difference" not in compare.table(rows)


def test_the_first_difference_is_marked_and_explained():
    expected = {"head": x, "layers.1": x[0], "layers.0": x[1]}
    actual = {"head": x + 1e-13, "layers.1": 2 * x[0], "layers.0": x[1] + 1}
    rows = compare.compare_tensors(actual, expected, dict.fromkeys(expected, 1e-12))
    assert [row.ok for row in rows] == [True, False, False]
    assert 0.09 < rows[0].tolerances < 0.11
    text = compare.table(rows)
    assert "> layers.1" in text
    assert "layers.1 (4, 4) float64: 16 of 16" in text
    assert "constant factor: actual = 2 * expected" in text


def test_missing_unknown_and_misshapen_tensors_are_reported():
    rows = compare.compare_tensors(
        {"a": x, "d": x, "c": x[0]}, {"a": x, "b": x, "c": x}, lambda name, e: 0.0
    )
    assert {row.name: row.note[:7] for row in rows} == {
        "a": "",
        "b": "missing",
        "c": "c (4, 4",
        "d": "unknown",
    }
    assert all(row.tolerances == np.inf for row in rows[1:])
    assert "b: missing: only expected has it" in compare.table(rows)


# --- Bounds -----------------------------------------------------------------------------------


def test_bounds_are_those_of_the_dtype():
    assert compare.eps(np.float32) == 2.0**-23
    assert compare.sum_of_products_bound(10, 2.0, np.float64) == pytest.approx(20 * 2.0**-52)
    y = np.full((1, 4), 0.25)
    bound = compare.softmax_bound(np.array([[3.0, 0, 0, 1]]), y, np.float64)
    assert bound == pytest.approx((4 + 3 + 5) * 2.0**-52 * y)
    masked = compare.softmax_bound(np.array([[3.0, 0, 0, 1]]), y, np.float64, np.eye(1, 4) == 1)
    assert masked == pytest.approx((4 + 0 + 5) * 2.0**-52 * y)


def test_layer_norm_bound_grows_where_a_row_is_all_offset():
    one = np.ones(4)
    ordinary = compare.layer_norm_bound(x[0], one, one, np.float32).max()
    constant = compare.layer_norm_bound(np.full((1, 4), 1e4), one, one, np.float32).max()
    assert ordinary < 1e-5
    assert constant > 1


def test_peer_rule():
    oracle, nudged = x, x + 1e-7
    peer = (x * (1 + 1e-6)).astype(np.float32)
    error = np.abs(peer.astype(np.float64) - oracle).max()
    bound = compare.peer_bound(peer, oracle, nudged, 10)
    assert bound == pytest.approx(2 * error + 2e-7 + 10 * 2.0**-23 * np.abs(x).max())
    assert compare.max_norm_error(peer, oracle, 0.5) == 2 * error


def test_peer_rule_measures_a_zero_gradient_on_the_scale_of_the_largest():
    oracles = {"q_proj.weight": x, "k_proj.bias": np.zeros(4)}
    peers = {name: value.astype(np.float32) for name, value in oracles.items()}
    bounds = compare.peer_bounds(peers, oracles, oracles, 10)
    assert bounds["k_proj.bias"] == pytest.approx(10 * 2.0**-23 * np.abs(x).max())


def test_nudge_is_a_rounding_of_each_entry():
    nudged = compare.nudge(x, np.random.default_rng(0))
    np.testing.assert_allclose(abs(nudged / x - 1), 2.0**-24, rtol=1e-6)
    assert {*np.sign(nudged / x - 1).ravel()} == {-1, 1}


@pytest.mark.parametrize("c", [1e-200, 1e200, -1e-200])
def test_a_factor_beyond_all_names_is_a_factor(c):
    """As numbers are that nobody has computed."""
    assert "a constant factor: actual = " in str(compare.report("dweight", c * x, x, 1e-250))
