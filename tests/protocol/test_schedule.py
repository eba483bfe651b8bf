"""Schedules: functions of the version alone, exact where they begin and end."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.settings import Budget, Course, Schedule

laws = settings(deadline=None, max_examples=200)
counts = st.integers(0, 500)
ratios = st.floats(1e-6, 1.0)
numbers = st.floats(-1e6, 1e6)


# --- courses


@pytest.mark.parametrize("value", [0, 0.25, 3])
def test_a_plain_number_is_that_number_at_every_version(value):
    course = Course.model_validate(value)
    assert {course.at(version) for version in (0, 1, 1000)} == {value}


@laws
@given(numbers, numbers, counts, counts)
def test_a_course_is_first_until_it_begins_last_once_it_is_over_and_between_in_between(first, last, begin, rounds):
    course = Course(first=first, last=last, begin=begin, rounds=rounds)
    if begin:
        assert course.at(begin - 1) == first
    assert course.at(begin) == (first if rounds else last)
    assert course.at(begin + rounds) == course.at(begin + rounds + 1000) == last
    low, high = min(first, last), max(first, last)
    slack = 1e-12 * max(abs(low), abs(high))
    assert all(low - slack <= course.at(begin + done) <= high + slack for done in range(0, rounds + 1, 7))
    assert course.within(low, high)
    assert low == high or not (course.within(low, (low + high) / 2) and course.within((low + high) / 2, high))


def test_a_course_goes_in_equal_steps():
    course = Course(first=1.0, last=3.0, begin=10, rounds=4)
    assert [course.at(version) for version in range(9, 16)] == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"last": float("nan")}])
def test_a_course_that_is_not_finite_is_refused(value):
    with pytest.raises(ValidationError, match="finite"):
        Course.model_validate(value)


# --- compression


@laws
@given(counts, counts)
def test_nothing_is_compressed_before_the_start(start, version):
    assert Schedule(start_round=start).compresses(version) == (version >= start)


@laws
@given(counts, st.integers(1, 500), ratios, ratios, st.none() | st.integers(1, 600))
def test_a_warm_up_falls_from_its_ratio_to_the_final_one_and_never_below(start, rounds, first, final, steps):
    schedule = Schedule(start_round=start, warmup_rounds=rounds, warmup_ratio=first, warmup_steps=steps)
    found = [schedule.ratio(start + done, final) for done in range(rounds + 2)]
    assert found[rounds:] == [final, final]
    if final >= first:
        assert set(found) == {final}
        return
    assert found[0] == first
    assert all(one >= other for one, other in pairwise(found))
    assert all(final * (1 - 1e-12) <= ratio <= first for ratio in found)
    levels = len(set(found[:rounds]))
    if first / final > 1.001:  # else neighbours may be equal in floating point
        assert levels == (rounds if steps is None else min(rounds, steps))


@pytest.mark.parametrize(("rounds", "steps"), [(22, 22), (100, 50), (49, 7), (26, 13), (8, 4)])
def test_the_steps_of_a_warm_up_are_equally_long_and_equal_factors_apart(rounds, steps):
    schedule = Schedule(warmup_rounds=rounds, warmup_ratio=0.25, warmup_steps=steps)
    found = [schedule.ratio(version, 0.001) for version in range(rounds)]
    lengths = [found.count(level) for level in dict.fromkeys(found)]
    assert lengths == [rounds // steps] * steps
    factors = [other / one for one, other in zip(found, [*found[1:], 0.001], strict=True) if one != other]
    assert factors == pytest.approx([(0.001 / 0.25) ** (1 / steps)] * steps)


def test_without_steps_every_round_is_the_same_factor_below_the_last():
    schedule = Schedule(start_round=5, warmup_rounds=10, warmup_ratio=0.5)
    found = [schedule.ratio(5 + done, 0.01) for done in range(11)]
    assert [other / one for one, other in pairwise(found)] == pytest.approx([0.02**0.1] * 10)


def test_the_warm_up_of_dgc_takes_the_papers_steps():
    """Lin et al. (ICLR 2018), section 3.3: the sparsity grows as 75, 93.75, 98.4375, 99.6, 99.9 %."""
    schedule = Schedule(warmup_rounds=4, warmup_ratio=0.25, warmup_steps=4)
    sparsity = [100 * (1 - schedule.ratio(version, 0.001)) for version in range(5)]
    assert sparsity == pytest.approx([75, 93.75, 98.4375, 99.6, 99.9], abs=0.05)


# --- learning rate and batch


@pytest.mark.parametrize("start", [0, 1, 7])
def test_the_learning_rate_has_its_factor_from_the_start_on(start):
    schedule = Schedule(start_round=start, learning_rate=0.3)
    assert [schedule.learning_rate_factor(version) for version in range(10)] == [1.0] * start + [0.3] * (10 - start)


def test_the_batch_size_follows_its_course_and_is_at_least_one():
    schedule = Schedule(batch=Course(first=0.1, last=4.0, begin=2, rounds=3))
    assert [schedule.batch_size(version, 8) for version in range(7)] == [1, 1, 1, 11, 22, 32, 32]
    assert Schedule().batch_size(3, 17) == 17


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"warmup_ratio": 0.0},
        {"warmup_ratio": 1.5},
        {"warmup_steps": 0},
        {"start_round": -1},
        {"batch": 0.0},
        {"batch": {"first": 1.0, "last": -1.0}},
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(values):
    with pytest.raises(ValidationError):
        Schedule(**values)


@pytest.mark.parametrize("values", [{}, {"bytes": 0}, {"bytes": 9, "smallest": 0.0}, {"bytes": 9, "largest": 1.1}])
def test_a_budget_needs_bytes_and_ratios_between_0_and_1(values):
    with pytest.raises(ValidationError):
        Budget(**values)
