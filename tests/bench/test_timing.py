# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing, on a clock that moves only when a call is made."""

from __future__ import annotations

import pytest

from onnxcollapse.bench import Timing, interleaved
from onnxcollapse.calibration import open_session
from tests.support import mlp, rows


class Bench:
    """Calls that take a given time on a clock of their own, and what was called in which order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.made: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float):
        times = iter(seconds)
        last = [seconds[-1]]

        def run() -> None:
            self.made.append(name)
            self.now += next(times, last[0])

        return run


def test_each_call_has_its_own_time():
    bench = Bench()
    calls = [bench.call("a", 0.5), bench.call("b", 2.0)]
    a, b = interleaved(calls, rounds=5, clock=bench.clock)
    assert (a.seconds, b.seconds) == ((0.5,) * 5, (2.0,) * 5)
    assert (a.repeats, b.repeats) == (1, 1)


def test_the_order_is_turned_round_from_round_to_round():
    bench = Bench()
    calls = [bench.call("a", 1.0), bench.call("b", 1.0)]
    interleaved(calls, rounds=3, warmup=2, clock=bench.clock)
    assert "".join(bench.made) == "aabb" + "aabb" + "bbaa" + "aabb"  # an untimed and a timed call each


def test_slow_first_calls_do_not_count():
    bench = Bench()
    (timing,) = interleaved([bench.call("a", 9.0, 8.0, 1.0)], rounds=4, warmup=3, clock=bench.clock)
    assert timing.seconds == (1.0,) * 4


def test_short_calls_are_repeated_in_a_turn():
    bench = Bench()
    short, long = interleaved(
        [bench.call("a", 0.25), bench.call("b", 4.0)], rounds=2, min_seconds=1.0, clock=bench.clock
    )
    assert (short.repeats, long.repeats) == (4, 1)
    assert (short.median, long.median) == (0.25, 4.0)


def test_calls_that_had_to_wait_do_not_count():
    bench = Bench()
    call = bench.call("a", 1.0, 1.0, 1.0, 1.0, 40.0, 1.0, 40.0, 1.0)
    (timing,) = interleaved([call], rounds=1, min_seconds=5.0, clock=bench.clock)
    assert (timing.median, timing.repeats) == (1.0, 5)
    assert bench.now == 3 + 1 + 3 + 80


def test_a_limit_takes_rounds_away_but_never_all():
    bench = Bench()
    calls = [bench.call("a", 1.0)]
    assert len(interleaved(calls, rounds=50, limit=20.0, clock=bench.clock)[0].seconds) == 10
    assert len(interleaved(calls, rounds=50, limit=0.1, clock=bench.clock)[0].seconds) == 3
    assert len(interleaved(calls, rounds=2, limit=0.1, clock=bench.clock)[0].seconds) == 2


def test_a_call_that_takes_no_time_ends():
    (timing,) = interleaved([lambda: None], rounds=2, clock=lambda: 0.0)
    assert timing.median == 0.0


def test_statistics_of_a_timing():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0))
    assert (timing.median, timing.fastest, timing.spread) == (3.0, 1.0, 2.0)
    assert timing.quantile(0.9) == pytest.approx(4.6)
    assert Timing((7.0,)).spread == 0.0


def test_sessions_are_timed_by_what_they_run():
    feeds = {"x": rows(64, 256)}
    with (
        open_session(mlp([256, 1536, 1536, 256]), provider="cpu") as large,
        open_session(mlp([256, 16, 256]), provider="cpu") as small,
    ):
        slow, fast = interleaved([large.prepared(feeds), small.prepared(feeds)], rounds=5)
    assert slow.median > 3 * fast.median
