# SPDX-License-Identifier: Apache-2.0
"""What is read between two runs of a stretch."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.bench import eviction
from onnxcollapse.calibration import open_session

MB = 1 << 20


@pytest.mark.parametrize(
    ("rest", "expected"),
    [(0, 0), (MB - 1, 0), (MB, MB), (MB + 1, 2 * MB), (19 * MB, 32 * MB), (1 << 40, 128 * MB)],
)
def test_as_much_is_read_as_the_rest_of_the_model_has(rest, expected):
    assert eviction.passage(rest) == expected


def test_nothing_is_read_for_a_small_model():
    with eviction.eviction(0, "cpu") as read:
        assert read is None


def test_memory_is_read_on_the_cpu():
    with eviction.eviction(MB, "cpu") as read:
        assert read.__self__.nbytes == MB
        assert read() == 1.0


def test_other_devices_read_with_a_model():
    feeds = {"x": np.arange(2048, dtype=np.float32).reshape(2, 1024)}
    with open_session(eviction._reader((2, 1024)), provider="cpu") as session:
        assert session.run(feeds)["y"].tolist() == [[2047.0]]
