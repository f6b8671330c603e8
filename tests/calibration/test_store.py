# SPDX-License-Identifier: Apache-2.0
"""Statistics that wait: the same as they came, in memory as far as there is room."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from onnxcollapse.calibration import Cross, Gram, GramMatrix, Moments, MomentSums, Ref, Statistics, Store
from onnxcollapse.calibration.statistics import CrossMoments
from onnxcollapse.calibration.tape import Tape
from onnxcollapse.errors import OptionError

ROWS = np.random.default_rng(0).normal(size=(40, 5))
GRAMS = [Gram((Ref(name),)) for name in "abc"]
SIZE = 6 * 6 * 8


def gram(number):
    return GramMatrix.from_rows({f"t{number}": ROWS + number})


def store(room):
    found = Store(room)
    for number, request in enumerate(GRAMS):
        found.add({("fit", request): gram(number)})
        found.keep_only(GRAMS)
    return found


@pytest.mark.parametrize(("room", "held"), [(None, 3), (3 * SIZE, 3), (2 * SIZE, 2), (SIZE - 1, 0), (0, 0)])
def test_as_much_waits_in_memory_as_there_is_room_for(room, held):
    found = Statistics(store(room))
    same = [found.fit(request) is found.fit(request) for request in GRAMS]
    assert same == [True] * held + [False] * (3 - held)
    for number, request in enumerate(GRAMS):
        assert request in found
        result, wanted = found.fit(request), gram(number)
        np.testing.assert_array_equal(result.matrix, wanted.matrix)
        assert (result.count, result.refs, result.widths) == (wanted.count, wanted.refs, wanted.widths)


def test_what_has_just_come_is_there_and_is_not_moved():
    found, result = Store(0), gram(0)
    found.add({("fit", GRAMS[0]): result})
    assert found["fit", GRAMS[0]] is result
    assert list(found) == [("fit", GRAMS[0])]


@pytest.mark.parametrize("room", [None, 0])
def test_what_nobody_waits_for_is_forgotten_and_leaves_room(room):
    found = store(room)
    found.keep_only(GRAMS[1:])
    assert len(found) == 2
    with pytest.raises(OptionError, match="no fit statistics were collected"):
        Statistics(found).fit(GRAMS[0])
    found.close()
    assert not list(found)
    bounded = store(SIZE)
    bounded.keep_only(())
    bounded.add({("fit", GRAMS[2]): gram(2)})
    bounded.keep_only(GRAMS)
    assert bounded["fit", GRAMS[2]] is bounded["fit", GRAMS[2]]


def test_correlations_go_to_disk_and_vectors_stay():
    found = Store(0)
    cross, moments = Cross(Ref("a"), Ref("b")), Moments(Ref("a"))
    means, variances = (ROWS.mean(0), ROWS.mean(0)), (ROWS.var(0), ROWS.var(0))
    before = CrossMoments(40.0, means, variances, np.cov(ROWS.T))
    found.add({("heldout", cross): before, ("heldout", moments): MomentSums.from_rows(ROWS)})
    found.keep_only({cross, moments})
    held = Statistics(found)
    assert held.heldout(moments) is held.heldout(moments)
    assert held.heldout(cross) is not held.heldout(cross)
    np.testing.assert_array_equal(held.heldout(cross).correlation(), before.correlation())


def test_memory_does_not_hold_what_is_written_to_a_tape_twice():
    array, tape = np.ones((1 << 21,), np.float64), Tape()
    tracemalloc.start()
    try:
        tape.put("x", array)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < array.nbytes / 4
    np.testing.assert_array_equal(tape.get("x", 0), array)
    tape.close()
