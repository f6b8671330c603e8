# SPDX-License-Identifier: Apache-2.0
"""The ratio of two timings and its interval, on times that are made up."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.bench import Timing, interleaved, ratio

OPENINGS, ROUNDS, CALLS = 5, 4, 6


def noisy(
    seed: int, share: float, *, noise=0.1, drift=1.0, session=0.02
) -> tuple[list[Timing], list[Timing]]:
    """Timings of two things, the second `share` of the first.

    The machine drifts from round to round, each opening of a session has its own speed, and one call in fifty waits.
    """
    random = np.random.default_rng(seed)
    sides: tuple[list[Timing], list[Timing]] = ([], [])
    for _ in range(OPENINGS):
        machine = np.exp(drift * random.random(ROUNDS))
        for side, true in zip(sides, (1.0, share), strict=True):
            speed = np.exp(session * random.standard_normal())
            calls = true * speed * machine[:, None] * (1 + noise * random.exponential(size=(ROUNDS, CALLS)))
            calls *= np.where(random.random(calls.shape) < 1 / 50, 3.0, 1.0)
            side.append(Timing(tuple(map(tuple, calls))))
    return sides


@pytest.mark.parametrize("share", [1.0, 0.5, 2.25])
def test_what_is_exactly_proportional_has_an_interval_of_no_width(share):
    base, _ = noisy(0, 1.0)
    other = [Timing(tuple(tuple(share * call for call in turn) for turn in part.rounds)) for part in base]
    found = ratio(other, base)
    assert (found.value, found.low, found.high) == pytest.approx((share, share, share))


@pytest.mark.parametrize("share", [1.0, 0.8, 0.5])
def test_nineteen_of_twenty_intervals_hold_the_true_ratio(share):
    found = []
    for seed in range(20):
        base, other = noisy(seed, share)
        found.append(ratio(other, base))
    assert sum(one.low <= share <= one.high for one in found) >= 19
    widths = [one.high / one.low - 1 for one in found]
    assert np.median(widths) < 0.5, "an interval that holds everything says nothing"
    assert all(one.low <= one.value <= one.high for one in found)


def test_a_difference_that_is_there_is_seen():
    found = [ratio(*reversed(noisy(seed, 0.7, noise=0.02, drift=0.2))) for seed in range(20)]
    assert sum(one.high < 1 for one in found) >= 19


def test_less_noise_gives_a_narrower_interval():
    def width(**options) -> float:
        found = [ratio(*reversed(noisy(seed, 1.0, **options))) for seed in range(10)]
        return float(np.median([one.high / one.low for one in found])) - 1

    assert width(noise=0.01, drift=0.1, session=0.001) < width(noise=0.5, drift=0.1, session=0.001)
    assert width(session=0.0) < width(session=0.2)


def test_intervals_are_drawn_by_the_seed():
    base, other = noisy(3, 0.9)
    assert ratio(other, base, 1) == ratio(other, base, 1)
    assert ratio(other, base, 1) != ratio(other, base, 2)
    assert ratio(other, base, 1).value == ratio(other, base, 2).value


def test_rounds_that_only_one_opening_has_do_not_count():
    base, other = noisy(0, 0.5)
    longer = [Timing((*part.rounds, (1e9,))) for part in other[:1]]
    assert ratio([*longer, *other[1:]], base) == ratio(other, base)


def test_one_opening_is_enough():
    held = 0
    for seed in range(20):
        sides = noisy(seed, 0.5, session=0.0)
        base, other = ([Timing(tuple(turn for part in side for turn in part.rounds))] for side in sides)
        found = ratio(other, base)
        held += found.low < 0.5 < found.high
        assert found.high / found.low < 2
    assert held >= 18


class Scheduler:
    """A clock of a machine that gives a process 4 ms, with an end now and then, and takes 20 ms."""

    def __init__(self) -> None:
        self.now = self.left = 0.0

    def call(self, seconds: float):
        def run() -> None:
            if self.left < 1e-9:
                self.now, self.left = self.now + 0.020, 0.004
            used = min(seconds, self.left)
            self.now, self.left = self.now + used, self.left - used
            if used < seconds:
                self.call(seconds - used)()

        return run


def test_slices_of_a_scheduler_do_not_favour_short_calls():
    machine = Scheduler()
    calls = [machine.call(0.0040), machine.call(0.0010)]
    base, other = interleaved(calls, rounds=8, repeats=1, min_seconds=0.5, clock=lambda: machine.now)
    assert ratio([other], [base]).value == pytest.approx(0.25, rel=0.1)
    assert other.median / base.median < 0.1, "which is what medians of calls would say"
