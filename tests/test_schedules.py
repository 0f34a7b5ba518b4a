"""Schedules against their definitions at the ends, in the middle and beyond."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits import schedules

numbers = st.floats(-100, 100)
counts = st.integers(0, 50)


@given(numbers, numbers, counts, counts, st.sampled_from(["linear", "cosine", "cubic"]))
def test_a_schedule_moves_from_begin_to_end_and_rests_before_and_after(a, b, start, steps, shape):
    schedule = getattr(schedules, shape)(a, b, steps=steps, start=start)
    assert all(schedule(step) == a for step in range(start))
    assert schedule(start) == pytest.approx(b if steps == 0 else a)
    assert schedule(start + steps) == schedule(start + steps + 1000) == b
    values = [schedule(step) for step in range(start, start + steps + 1)]
    ordered = values if a <= b else values[::-1]
    # 1e-12: rounding of numbers up to 100
    assert all(x <= y + 1e-12 for x, y in zip(ordered, ordered[1:], strict=False))


@pytest.mark.parametrize(("shape", "quarter", "half"), [
    ("linear", 0.25, 0.5),
    ("cosine", (1 - math.sqrt(0.5)) / 2, 0.5),
    ("cubic", 1 / 64, 1 / 8),
])  # fmt: skip
def test_each_shape_is_its_formula(shape, quarter, half):
    schedule = getattr(schedules, shape)(2.0, 6.0, steps=8, start=3)
    assert schedule(5) == pytest.approx(2 + 4 * quarter)
    assert schedule(7) == pytest.approx(2 + 4 * half)


def test_a_constant_is_zero_before_its_start():
    assert [schedules.constant(3.0, start=2)(step) for step in range(4)] == [0, 0, 3, 3]
    assert schedules.constant(3.0)(0) == 3


@pytest.mark.parametrize(("settings", "message"), [
    ({"begin": math.nan, "end": 1.0}, r"begin is nan\. Give a finite number"),
    ({"begin": 0.0, "end": math.inf}, r"end is inf"),
    ({"begin": 0.0, "end": 1.0, "start": -1}, r"start is -1\. Give a whole number, 0 or more"),
    ({"begin": 0.0, "end": 1.0, "steps": 2.5}, r"steps is 2\.5\. Give a whole number"),
    ({"begin": 0.0, "end": 1.0, "shape": "exp"}, r"shape is 'exp'\. Use 'linear', 'cosine' or"),
])  # fmt: skip
def test_impossible_schedules_are_refused(settings: dict[str, Any], message):
    with pytest.raises(fewbits.PlanError, match=message):
        schedules.Schedule(**settings)
