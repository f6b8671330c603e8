# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing, on a clock that moves only when a call is made."""

from __future__ import annotations

import math

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
    a, b = interleaved(calls, rounds=5, repeats=2, clock=bench.clock)
    assert (a.rounds, b.rounds) == (((0.5, 0.5),) * 5, ((2.0, 2.0),) * 5)


def test_the_order_is_turned_round_from_round_to_round():
    bench = Bench()
    calls = [bench.call("a", 1.0), bench.call("b", 1.0)]
    interleaved(calls, rounds=3, warmup=2, repeats=1, clock=bench.clock)
    assert "".join(bench.made) == "aabb" + "aabb" + "bbaa" + "aabb"  # an untimed and a timed call each


def test_slow_first_calls_do_not_count():
    bench = Bench()
    (timing,) = interleaved([bench.call("a", 9.0, 8.0, 1.0)], rounds=4, warmup=3, clock=bench.clock)
    assert set(timing.calls) == {1.0}


def test_short_calls_are_made_more_often_in_a_turn():
    bench = Bench()
    calls = [bench.call("a", 0.25), bench.call("b", 4.0)]
    short, long = interleaved(calls, rounds=2, repeats=2, min_seconds=1.0, clock=bench.clock)
    assert [len(turn) for turn in short.rounds] == [4, 4]
    assert [len(turn) for turn in long.rounds] == [2, 2]
    assert (short.median, long.median) == (0.25, 4.0)


def test_calls_that_had_to_wait_do_not_count():
    bench = Bench()
    waits = [1.0, 1.0, 1.0, 1.0, *([40.0, 40.0, 1.0, 40.0] * 5)]
    (timing,) = interleaved([bench.call("a", *waits)], rounds=5, repeats=3, clock=bench.clock)
    assert timing.steady == 1.0
    assert timing.median == 40.0
    assert bench.now == sum(waits[:23])


@pytest.mark.parametrize(
    ("limit", "rounds", "repeats"),
    [(math.inf, 50, 9), (500.0, 50, 9), (250.0, 50, 4), (100.0, 50, 1), (20.0, 10, 1), (0.1, 3, 1)],
)
def test_a_limit_takes_calls_and_then_rounds_away(limit, rounds, repeats):
    bench = Bench()
    (timing,) = interleaved([bench.call("a", 1.0)], rounds=50, repeats=9, limit=limit, clock=bench.clock)
    assert (len(timing.rounds), len(timing.rounds[0])) == (rounds, repeats)
    assert bench.now <= max(limit, 6) + 3


def test_few_rounds_stay_few():
    assert len(interleaved([lambda: None], rounds=2, limit=0.0)[0].rounds) == 2


def test_a_call_that_takes_no_time_ends():
    (timing,) = interleaved([lambda: None], rounds=2, clock=lambda: 0.0)
    assert timing.median == 0.0


def test_statistics_of_a_timing():
    timing = Timing(((5.0, 1.0), (3.0, 2.0), (4.0,)))
    assert (timing.median, timing.steady, timing.spread) == (3.0, 2.0, 2.0)
    assert timing.calls == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert timing.quantile(0.9) == pytest.approx(4.6)
    assert Timing(((7.0,),)).spread == 0.0


def test_sessions_are_timed_by_what_they_run():
    feeds = {"x": rows(64, 256)}
    with (
        open_session(mlp([256, 1536, 1536, 256]), provider="cpu") as large,
        open_session(mlp([256, 16, 256]), provider="cpu") as small,
    ):
        slow, fast = interleaved([large.prepared(feeds), small.prepared(feeds)], rounds=5)
    assert slow.steady > 3 * fast.steady


def test_what_comes_between_calls_is_not_timed():
    bench = Bench()
    between = bench.call("-", 8.0)
    (timing,) = interleaved(
        [bench.call("a", 1.0)], rounds=1, warmup=1, repeats=2, between=between, clock=bench.clock
    )
    assert timing.rounds == ((1.0, 1.0),)
    assert "".join(bench.made) == "-a" + "--" + "a" + "-a-a"
