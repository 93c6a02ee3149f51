"""The learning rate of each step against the formulas, written once more and differently."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npformer import schedules
from npformer.compare import assert_close
from npformer.config import TransformerConfig
from npformer.training import Recipe

peaks = st.sampled_from([1e-4, 1e-3, 0.5, 2.0])
warmups = st.integers(1, 500)
EPS = float(np.finfo(np.float64).eps)


def rates(schedule, last):
    return np.array([schedule(step) for step in range(1, last + 1)])


def assert_few_roundings(name, actual, expected, scale):
    """Each value is a dozen operations: a dozen roundings of the largest value there is."""
    assert_close(name, actual, expected, 12 * EPS * scale)


@given(peaks)
def test_constant(peak):
    assert set(rates(schedules.constant(peak), 100)) == {peak}


@given(st.integers(1, 1024), warmups, peaks)
def test_noam_is_the_papers_equation_3(d_model, warmup, factor):
    step = np.arange(1, 1001.0)
    expected = (
        factor / np.sqrt(d_model) * np.minimum(1 / np.sqrt(step), step / warmup / np.sqrt(warmup))
    )
    actual = rates(schedules.noam(d_model, warmup, factor), 1000)
    assert_few_roundings("noam", actual, expected, expected.max())


def test_noam_with_the_numbers_of_the_paper():
    """d_model 512, 4000 steps of warmup: 7.0e-4 at the top, and half of it at 16 000."""
    rate = schedules.noam(512, 4000)
    assert rate(4000) == pytest.approx(512**-0.5 * 4000**-0.5)
    assert f"{rate(4000):.3e}" == "6.988e-04"
    assert f"{rate(1):.3e}" == "1.747e-07"
    assert rate(2000) == pytest.approx(rate(4000) / 2)
    assert rate(16_000) == pytest.approx(rate(4000) / 2)


@given(peaks, warmups)
def test_inverse_sqrt(peak, warmup):
    step = np.arange(1, 1001.0)
    rising, falling = peak * step / warmup, peak * np.sqrt(warmup) / np.sqrt(step)
    expected = np.where(step <= warmup, rising, falling)
    rate = schedules.inverse_sqrt(peak, warmup)
    assert_few_roundings("inverse_sqrt", rates(rate, 1000), expected, peak)
    assert rate(warmup) == peak
    assert rate(4 * warmup) == peak / 2


@given(st.integers(1, 1024), warmups)
def test_inverse_sqrt_is_noam_with_its_peak_named(d_model, warmup):
    noam = rates(schedules.noam(d_model, warmup), 1000)
    peak = (d_model * warmup) ** -0.5
    assert_few_roundings("noam", noam, rates(schedules.inverse_sqrt(peak, warmup), 1000), peak)


@given(peaks, warmups, st.integers(0, 500), st.sampled_from([0.0, 1e-5]))
def test_cosine_is_a_line_and_then_half_a_cosine(peak, warmup, more, floor):
    total = warmup + more
    rate = schedules.cosine(peak, warmup, total, floor)
    expected = []
    for step in range(1, total + 1):
        if step <= warmup:
            expected.append(peak / warmup * step)
        else:  # cos² of half the angle is the same curve
            angle = math.pi * (step - warmup) / (total - warmup + 1)
            expected.append(floor + (peak - floor) * math.cos(angle / 2) ** 2)
    expected += [floor] * 20
    assert_few_roundings("cosine", rates(rate, total + 20), np.array(expected), peak)
    for step in range(total + 1, total + 20):
        assert rate(step) == floor


@given(peaks, st.integers(1, 50))
def test_cosine_is_torchs_annealing(peak, total):
    """CosineAnnealingLR counts from 0 and is at its floor after T_max steps."""
    tensor = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([tensor], lr=peak)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    expected = []
    for _ in range(total):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    rate = schedules.cosine(peak, 1, total)
    # torch multiplies its way along the curve, an error for each step
    assert_close("cosine", rates(rate, total), np.array(expected), 12 * total * EPS * peak)


def test_cosine_that_ends_before_its_warmup_does_not_rise_again():
    rate = schedules.cosine(1.0, 10, 5, 0.25)
    assert [rate(step) for step in (1, 5, 10, 11, 1000)] == [0.1, 0.5, 1.0, 0.25, 0.25]


@given(peaks, warmups, st.integers(1, 400))
def test_up_then_down_and_never_at_rest(peak, warmup, more):
    total = warmup + more
    for schedule in (
        schedules.noam(64, warmup, peak),
        schedules.inverse_sqrt(peak, warmup),
        schedules.cosine(peak, warmup, total),
    ):
        values = rates(schedule, total)
        assert (values > 0).all()  # the first step and the last one, too
        assert (np.diff(values[:warmup]) > 0).all()
        assert (np.diff(values[warmup - 1 :]) < 0).all()
        assert isinstance(schedule(1), float)


@pytest.mark.parametrize("warmup", [0, -1])
def test_a_warmup_of_no_steps_is_refused(warmup):
    for make in (
        lambda: schedules.noam(64, warmup),
        lambda: schedules.inverse_sqrt(1.0, warmup),
        lambda: schedules.cosine(1.0, warmup, 10),
    ):
        with pytest.raises(ValueError, match=f"warmup must be at least 1, got {warmup}"):
            make()


def test_a_recipe_names_its_schedule():
    config = TransformerConfig(9, 9, d_model=16)
    recipe = {"rate": 0.25, "warmup": 7}
    expected = {
        "constant": schedules.constant(0.25),
        "noam": schedules.noam(16, 7, 0.25),
        "inverse_sqrt": schedules.inverse_sqrt(0.25, 7),
        "cosine": schedules.cosine(0.25, 7, 30),
    }
    for name, schedule in expected.items():
        actual = Recipe(schedule=name, **recipe).schedule_for(config, 30)
        assert rates(actual, 40).tolist() == rates(schedule, 40).tolist(), name
    short = Recipe(schedule="cosine", **recipe).schedule_for(config, 4)  # fewer than the warmup
    assert rates(short, 5).tolist() == rates(schedules.cosine(0.25, 4, 4), 5).tolist()
