"""When things happen: the rules as formulas, over all small cases."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oialr_peft.engine.schedule import Schedule
from oialr_peft.tuner.quantities import rank_of, steps_of


def schedule(**fields):
    defaults = {"total_steps": 100, "delay": 0, "update_every": 10, "layers_per_update": 1.0, "threshold": None}
    return Schedule(**{**defaults, **fields})


# ---- steps and ranks -------------------------------------------------------------------------------------------------


@given(steps=st.integers(0, 10_000), total=st.integers(1, 10_000))
def test_an_int_is_a_number_of_steps(steps, total):
    assert steps_of(steps, total) == steps


@given(percent=st.integers(1, 99), total=st.integers(1, 100_000))
@example(percent=4, total=25)
@example(percent=7, total=100)
@example(percent=29, total=100)
def test_a_float_is_a_share_of_all_steps_rounded_up_as_in_decimal_arithmetic(percent, total):
    assert steps_of(percent / 100, total) == max(1, math.ceil(Fraction(percent * total, 100)))


@given(share=st.floats(1e-6, 1, exclude_max=True), total=st.integers(1, 10_000))
def test_a_share_is_never_less_than_one_step_nor_more_than_all(share, total):
    assert 1 <= steps_of(share, total) <= total


def test_only_a_float_below_one_is_a_share():
    assert (steps_of(1, 50), steps_of(1.0, 50), steps_of(0.0, 50), steps_of(0, 50)) == (1, 1, 0, 0)
    assert (rank_of(1, 50), rank_of(1.0, 50), rank_of(0.0, 50), rank_of(2.0, 50)) == (1, 1, 1, 2)


@given(full=st.integers(1, 4096))
def test_no_rank_means_the_full_one(full):
    assert rank_of(None, full) == full


@given(rank=st.integers(1, 10_000), full=st.integers(1, 4096))
def test_a_count_is_a_rank_up_to_the_full_one(rank, full):
    assert rank_of(rank, full) == min(rank, full)


@given(percent=st.integers(1, 99), full=st.integers(1, 4096))
@example(percent=1, full=64)
@example(percent=7, full=100)
def test_a_float_is_a_share_of_the_full_rank_rounded_up(percent, full):
    assert rank_of(percent / 100, full) == max(1, math.ceil(Fraction(percent * full, 100)))


# ---- checks and freezes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 10])
def test_checks_are_the_multiples_of_the_interval_from_the_first_on(every):
    checks = [step for step in range(31) if schedule(update_every=every).is_check(step)]
    assert checks == list(range(every, 31, every))


@pytest.mark.parametrize(
    ("step", "stability", "expected"),
    [(9, 1.0, False), (10, 0.9, True), (10, 0.8999, False), (10, None, False), (11, 0.95, True), (9, None, False)],
)
def test_a_stable_layer_is_factored_from_the_delay_on(step, stability, expected):
    assert schedule(delay=10, threshold=0.9).freezes(step, stability) is expected


@pytest.mark.parametrize("stability", [None, -1.0, 0.0, 1.0])
def test_without_a_threshold_every_layer_is_factored_at_the_delay(stability):
    assert not schedule(delay=10).freezes(9, stability)
    assert schedule(delay=10).freezes(10, stability)


# ---- layers due ------------------------------------------------------------------------------------------------------


@given(percent=st.integers(1, 100), update=st.integers(1, 200), layers=st.integers(1, 200))
@example(percent=10, update=3, layers=10)
@example(percent=7, update=1, layers=100)
def test_the_layers_due_are_the_last_ones_of_the_formula(percent, update, layers):
    due = schedule(layers_per_update=percent / 100).layers_due(update, layers)
    count = min(layers, math.ceil(Fraction(percent * update * layers, 100)))
    assert list(due) == list(range(layers))[layers - count :]
    assert count >= 1


@given(share=st.floats(0.001, 1), update=st.integers(1, 100), layers=st.integers(1, 200))
def test_layers_that_were_due_stay_due(share, update, layers):
    rule = schedule(layers_per_update=share)
    assert set(rule.layers_due(update, layers)) <= set(rule.layers_due(update + 1, layers))


@pytest.mark.parametrize("layers", [1, 7, 30])
def test_a_share_of_one_takes_every_layer_at_once(layers):
    assert list(schedule().layers_due(1, layers)) == list(range(layers))
