# SPDX-License-Identifier: Apache-2.0
"""Times several things against each other in one process, so that what slows the machine slows all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

LEAST_ROUNDS = 3
MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        seconds: Seconds of a call, one number for each round.
        repeats: Calls that each of them is the median of.
    """

    seconds: tuple[float, ...]
    repeats: int = 1

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """The fastest round, in seconds."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the rounds, in seconds."""
        return self.quantile(0.75) - self.quantile(0.25)

    def quantile(self, share: float) -> float:
        """The time that this share of the rounds stays under, in seconds, interpolated between rounds.

        Args:
            share: In [0, 1].
        """
        ordered = sorted(self.seconds)
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))


def interleaved(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int = 9,
    warmup: int = 3,
    min_seconds: float = 0.002,
    limit: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Times calls in turns: each once a round, the order turned round from one round to the next.

    Before each turn the call is made once untimed, because the one before it has left its data in the caches and
    its threads spinning. Calls are timed singly and the median of a turn counts: on a machine that does other work,
    some wait for a processor, ten times as long as they run, and would make up a mean.

    Args:
        calls: What is timed; each has to be over when it returns.
        rounds: Turns of each call.
        warmup: Untimed calls of each before the first round, at least 1.
        min_seconds: A call is repeated in its turn until that lasts about so long.
        limit: Seconds that all rounds together should not exceed: then there are fewer, but never below 3.
        clock: Returns seconds.

    Returns:
        A timing for each call, in the order given.
    """
    expected = [_warm_up(call, max(warmup, 1), clock) for call in calls]
    repeats = [_repeats(seconds, min_seconds) for seconds in expected]
    one_round = sum((count + 1) * seconds for count, seconds in zip(repeats, expected, strict=True))
    if one_round * rounds > limit:
        rounds = min(rounds, max(int(limit / one_round), LEAST_ROUNDS))
    taken: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for _ in range(rounds):
        for index in order:
            calls[index]()
            taken[index].append(_time(calls[index], repeats[index], clock))
        order.reverse()
    return [Timing(tuple(seconds), count) for seconds, count in zip(taken, repeats, strict=True)]


def _warm_up(call: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    """Returns the fastest of some calls in seconds."""
    return min(_time(call, 1, clock) for _ in range(times))


def _repeats(seconds: float, wanted: float) -> int:
    if seconds <= 0.0:
        return MOST_REPEATS if wanted > 0.0 else 1
    return min(max(math.ceil(wanted / seconds), 1), MOST_REPEATS)


def _time(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Returns the median of some calls in seconds."""
    marks = [clock()]
    for _ in range(repeats):
        call()
        marks.append(clock())
    return statistics.median(after - before for before, after in pairwise(marks))
