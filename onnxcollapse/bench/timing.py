# SPDX-License-Identifier: Apache-2.0
"""Times several things against each other in one process, so that what slows the machine slows all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LEAST_ROUNDS = 3
MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Timing:
    """How long calls take.

    Attributes:
        rounds: Seconds of every single call, round by round.
    """

    rounds: tuple[tuple[float, ...], ...]

    @property
    def calls(self) -> list[float]:
        """Seconds of every call, shortest first."""
        return sorted(seconds for turn in self.rounds for seconds in turn)

    @property
    def median(self) -> float:
        """Median of all calls, in seconds: what a user waits."""
        return statistics.median(self.calls)

    @property
    def steady(self) -> float:
        """Median over the rounds of the fastest call of each, in seconds: what to compare by.

        Where other work runs on the machine, a call that waits for a processor takes ten times as long as it runs, and
        of a model with many parallel operators most calls do. Waiting only ever adds.
        """
        return statistics.median(map(min, self.rounds))

    @property
    def spread(self) -> float:
        """Distance between the quartiles of all calls, in seconds."""
        return self.quantile(0.75) - self.quantile(0.25)

    def quantile(self, share: float) -> float:
        """The time that this share of the calls stays under, in seconds, interpolated between calls.

        Args:
            share: In [0, 1].
        """
        ordered = self.calls
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))


def interleaved(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int = 9,
    warmup: int = 3,
    repeats: int = 5,
    min_seconds: float = 0.002,
    between: Callable[[], object] | None = None,
    limit: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Times calls in turns: each has one a round, and the order is turned round from one round to the next.

    Each turn begins with an untimed call, because the turn before it has left its data in the caches and its threads
    spinning.

    Args:
        calls: What is timed; each has to be over when it returns.
        rounds: Turns of each call.
        warmup: Untimed calls of each before the first round, at least 1.
        repeats: Calls in a turn, each timed by itself.
        min_seconds: There are more calls in a turn where it would not last about so long.
        between: Called before every call, untimed.
        limit: Seconds that all turns together should not exceed: then there are fewer calls in each, and then fewer
            rounds, but never less than 3 of one.
        clock: Returns seconds.

    Returns:
        A timing for each call, in the order given.
    """
    expected = [min(_time(call, max(warmup, 1), clock, between)) for call in calls]
    gap = 0.0 if between is None else min(_time(between, 2, clock))
    full = [seconds + gap for seconds in expected]
    wanted = [_repeats(seconds, repeats, min_seconds) for seconds in expected]
    shrink = min(limit / max(_seconds(full, wanted) * rounds, 1e-9), 1.0)
    counts = [max(int(count * shrink), 1) for count in wanted]
    fit = int(limit / _seconds(full, counts)) if shrink < 1.0 else rounds
    rounds = min(rounds, max(fit, LEAST_ROUNDS))
    taken: list[list[tuple[float, ...]]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for _ in range(rounds):
        for index in order:
            calls[index]()
            taken[index].append(_time(calls[index], counts[index], clock, between))
        order.reverse()
    return [Timing(tuple(turns)) for turns in taken]


def _repeats(seconds: float, least: int, min_seconds: float) -> int:
    """How often a call that takes some seconds is made in a turn."""
    filling = math.ceil(min_seconds / seconds) if seconds > 0.0 else MOST_REPEATS
    return max(min(filling, MOST_REPEATS), least, 1)


def _seconds(expected: Sequence[float], counts: Sequence[int]) -> float:
    """How long a round takes, untimed calls included."""
    return sum((count + 1) * seconds for count, seconds in zip(counts, expected, strict=True))


def _time(
    call: Callable[[], object],
    times: int,
    clock: Callable[[], float],
    between: Callable[[], object] | None = None,
) -> tuple[float, ...]:
    """Makes a call some times; returns the seconds of each."""
    taken = []
    for _ in range(times):
        if between is not None:
            between()
        began = clock()
        call()
        taken.append(clock() - began)
    return tuple(taken)
