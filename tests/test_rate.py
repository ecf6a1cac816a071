"""Token buckets, with a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.rate import Bucket

rates = st.integers(1, 10_000)
pauses = st.floats(0, 200, allow_nan=False)


def test_a_minutes_worth_at_once_then_one_by_one():
    bucket = Bucket(6, 0)
    for _ in range(6):
        assert bucket.wait(0) == 0
        bucket.take(1, 0)
    assert bucket.wait(0) == pytest.approx(10)
    assert bucket.wait(4) == pytest.approx(6)
    assert bucket.wait(10) == 0
    bucket.take(1, 10)
    assert bucket.wait(10) == pytest.approx(10)


def test_debt_is_paid_by_waiting():
    bucket = Bucket(60, 0)
    bucket.take(360, 0)
    assert bucket.wait(0) == pytest.approx(301)
    assert bucket.wait(300) == pytest.approx(1)
    assert bucket.wait(301) == 0


def test_a_rest_saves_no_more_than_a_minute():
    bucket = Bucket(6, 0)
    for _ in range(6):
        assert bucket.wait(10_000) == 0
        bucket.take(1, 10_000)
    assert bucket.wait(10_000) > 0


def test_what_was_used_stays_used_when_the_rate_changes():
    bucket = Bucket(10, 0)
    bucket.take(8, 0)
    bucket.resize(5, 0)
    assert bucket.wait(0) == pytest.approx((1 + 3) * 12)
    bucket.resize(100, 0)
    bucket.take(91, 0)
    assert bucket.wait(0) == 0
    bucket.take(1, 0)
    assert bucket.wait(0) > 0


@given(rates, st.lists(pauses, max_size=60))
def test_never_more_than_the_rate(rate, steps):
    """In any span from one request to another, no more get through than a minute's worth and what came since."""
    bucket, now = Bucket(rate, 0), 0.0
    let_in: list[float] = []
    for pause in steps:
        now += pause
        for _ in range(3):
            if bucket.wait(now) == 0:
                bucket.take(1, now)
                let_in.append(now)
    for first, begin in enumerate(let_in):
        for last, end in enumerate(let_in[first:], first):
            assert last - first + 1 <= rate * (1 + (end - begin) / 60) + 1e-6 * (1 + rate)


@given(rates, st.integers(0, 100_000), pauses)
def test_the_wait_that_is_told_is_enough_and_not_too_long(rate, units, now):
    def after(seconds: float) -> float:
        bucket = Bucket(rate, 0)
        bucket.take(units, 0)
        return bucket.wait(seconds)

    wait = after(now)
    assert after(now + wait) < 1e-3
    if wait > 0.02:
        assert after(now + wait - 0.01) > 0


@given(rates, st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_clock_that_goes_back_gives_nothing(rate, now, back):
    bucket = Bucket(rate, now)
    bucket.take(rate, now)
    before = bucket.wait(now)
    assert bucket.wait(now - back) == before
