# SPDX-License-Identifier: Apache-2.0
"""How many times as long one thing takes as another, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from onnxcollapse.bench.timing import Timing

RESAMPLES, LEVEL = 2000, 0.95
BLOCK, PART = 2, 4
"""Rounds that are drawn together, as of two in a row each thing comes first in one, and those that stand for an
opening where there is only one."""


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
    """How many times as long one of two things timed in turns takes as the other, with a 95 % bootstrap interval.

    That is the median over rounds of the ratio of their turns, so that what slows the machine for a while drops out. A
    turn counts with the mean of its calls. Where other work runs on the machine, a call as short as the slices of
    time that the scheduler deals out mostly gets through in one, and one that is a little longer waits for another.
    Over turns longer than slices both wait for their share.

    For the interval, openings are drawn again with replacement, as two sessions over one file differ by what memory
    they got, and so are their rounds, in pairs that follow each other: in one of each pair either thing came first. It
    is widened as Student's is, because so few openings vary less than many would.

    Args:
        timings: The one, a timing for each time that sessions were opened.
        bases: The other one, of the same rounds.
        seed: Of the draws.
    """
    least = min(
        len(timing.rounds) for timing in (*timings, *bases)
    )  # a limit of time may have ended one early
    logs = np.log(_turns(timings, least)) - np.log(_turns(bases, least))
    middle, logs = float(np.median(logs)), _parts(logs)
    drawn = np.median(_drawn(logs, np.random.default_rng(seed)), axis=1) - middle
    bounds = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) * _widening(len(logs))
    low, value, high = np.exp([middle + min(bounds[0], 0.0), middle, middle + max(bounds[1], 0.0)]).tolist()
    return Ratio(value, low, high)


def _turns(timings: Sequence[Timing], rounds: int) -> np.ndarray:
    """The mean call of each turn [openings, rounds]; a call that a clock is too coarse for counts as a picosecond."""
    means = [[sum(turn) / len(turn) for turn in timing.rounds[:rounds]] for timing in timings]
    return np.maximum(means, 1e-12)


def _parts(logs: np.ndarray) -> np.ndarray:
    """Independent parts: the openings, or runs of rounds where there is only one."""
    openings, rounds = logs.shape
    if openings > 1 or rounds < 2 * BLOCK:
        return logs
    length = PART if rounds >= 2 * PART else BLOCK
    return logs[:, : rounds // length * length].reshape(-1, length)


def _drawn(logs: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Resamples [resamples, rounds in all] of [parts, rounds]."""
    openings, rounds = logs.shape
    block = min(BLOCK, rounds)
    starts = random.integers(0, rounds - block + 1, (RESAMPLES, openings, -(-rounds // block), 1))
    places = (starts + np.arange(block)).reshape(RESAMPLES, openings, -1)[..., :rounds]
    chosen = random.integers(0, openings, (RESAMPLES, openings, 1))
    return logs[chosen, places].reshape(RESAMPLES, -1)


def _widening(parts: int) -> float:
    """How much wider an interval of so few independent parts has to be than the normal one."""
    share, parts = (1 + LEVEL) / 2, max(parts, 2)
    return float(stdtrit(parts - 1, share) / ndtri(share) * (parts / (parts - 1)) ** 0.5)
