# SPDX-License-Identifier: Apache-2.0
"""How many times as long one thing takes as another, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from onnxcollapse.bench.timing import Timing

RESAMPLES, LEVEL = 2000, 0.95
BLOCK = 2
"""Rounds that are drawn together: of two in a row each thing comes first in one."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of times.

    Attributes:
        value: The time over the other one's.
        low: Where its interval begins.
        high: Where it ends.
    """

    value: float
    low: float
    high: float


def ratio(timings: Sequence[Timing], bases: Sequence[Timing], seed: int = 0) -> Ratio:
    """The ratio of the medians over rounds of two things timed in turns, with a 95 % bootstrap interval.

    A turn counts with the mean of its calls. Where other work runs on the machine, a call as short as the slices of
    time that the scheduler deals out mostly gets through in one, and one that is a little longer waits for another:
    the medians of calls of 2 and 4 ms had a ratio of 4. Over turns longer than slices both wait for their share.

    Openings are drawn again with replacement, as two sessions over one file differ by what memory they got; so are
    their rounds, in pairs that follow each other, both things of a round together: what slows the machine for a while
    slows both, and drops out. Deviations are widened as Student's are, because so few openings vary less than many.

    Args:
        timings: The one, a timing for each time that sessions were opened.
        bases: The other one, of the same rounds.
        seed: Of the draws.
    """
    turns = np.array([_turns(each) for each in _same_length(timings, bases)])
    value = float(_medians(turns.reshape(2, 1, -1))[0])
    drawn = _medians(_drawn(turns, np.random.default_rng(seed)))
    bounds = np.quantile(np.log(drawn / value), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.exp(bounds * _widening(turns.shape[1], turns.shape[2])) * value
    return Ratio(value, min(float(low), value), max(float(high), value))


def _same_length(*sides: Sequence[Timing]) -> list[list[Timing]]:
    """As many rounds of every opening: a limit of time may have ended one early."""
    least = min(len(timing.rounds) for side in sides for timing in side)
    return [[Timing(timing.rounds[:least]) for timing in side] for side in sides]


def _turns(timings: Sequence[Timing]) -> list[list[float]]:
    """The mean call of each turn [openings, rounds]."""
    return [[sum(turn) / len(turn) for turn in timing.rounds] for timing in timings]


def _drawn(turns: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Turns of both things [2, resamples, rounds in all], drawn from [2, openings, rounds]."""
    _, openings, rounds = turns.shape
    block = min(BLOCK, rounds)
    starts = random.integers(0, rounds - block + 1, (RESAMPLES, openings, -(-rounds // block), 1))
    places = (starts + np.arange(block)).reshape(RESAMPLES, openings, -1)[..., :rounds]
    chosen = random.integers(0, openings, (RESAMPLES, openings, 1))
    return turns[:, chosen, places].reshape(2, RESAMPLES, -1)


def _medians(turns: np.ndarray) -> np.ndarray:
    one, other = np.median(turns, axis=-1)
    return np.asarray(one / other)


def _widening(openings: int, rounds: int) -> float:
    """How much wider an interval of so few independent parts has to be than the normal one."""
    parts = openings if openings > 1 else max(rounds // BLOCK, 2)
    share = (1 + LEVEL) / 2
    return float(stdtrit(parts - 1, share) / ndtri(share) * (parts / (parts - 1)) ** 0.5)
