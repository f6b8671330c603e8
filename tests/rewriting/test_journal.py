# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math

import numpy as np
import pytest

from onnxcollapse.rewriting import Entry, Journal, Saving
from onnxcollapse.rewriting.journal import plain


def test_a_decline_is_noted_once_and_what_was_kept_each_time():
    journal = Journal()
    for _ in range(2):
        journal.add(Entry("declined", "p", "site", reason="because"))
        journal.add(Entry("declined", "p", "site", reason="for another reason"))
        journal.add(Entry("kept", "p", "site"))
        journal.add(Entry("rolled-back", "p", "site"))
    assert [entry.outcome for entry in journal] == [
        "declined", "declined", "kept", "rolled-back", "kept", "rolled-back",
    ]  # fmt: skip
    assert [entry.reason for entry in journal.of("declined")] == ["because", "for another reason"]


def test_json_holds_everything_in_a_fixed_order():
    journal = Journal(facts={"model": "m.onnx", "passes": ("a", "b"), "budget": 1 / 3})
    journal.add(Entry("kept", "p:a=1", "y", "fit", "done", 1 / 3, 2 / 3, None, Saving(1, 2, 3, 4)))
    text = journal.to_json()
    assert text.endswith("\n")
    assert json.loads(text) == {
        "facts": {"model": "m.onnx", "passes": ["a", "b"], "budget": 0.333333},
        "entries": [
            {
                "outcome": "kept",
                "pass": "p:a=1",
                "site": "y",
                "variant": "fit",
                "reason": "done",
                "predicted_error": 0.333333,
                "impact": 0.666667,
                "error": None,
                "saving": {"params": 1, "bytes": 2, "flops": 3, "nodes": 4},
            }
        ],
    }
    keys = list(json.loads(text)["entries"][0])
    assert keys == sorted(keys)


def test_the_last_bits_of_a_float_do_not_show():
    texts = set()
    for last in (0.1 + 0.2, 0.3):
        journal = Journal()
        journal.add(Entry("declined", "p", "y", predicted_error=last))
        texts.add(journal.to_json())
    assert len(texts) == 1


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (np.float64(-math.inf), "-inf"),
        ({"a": (1, [np.float64(2)])}, {"a": [1, [2.0]]}),
        (None, None),
        ("text", "text"),
        (1.23456789, 1.23456789),
    ],
)
def test_plain_json_types(value, expected):
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)
    assert json.loads(json.dumps(found, allow_nan=False)) == expected


def test_rounding_is_to_significant_digits():
    assert plain({"a": [123456789.0, 1.23456789e-9]}, 6) == {"a": [123457000.0, 1.23457e-09]}


def test_savings_subtract_and_object():
    assert Saving(5, 4, 3, 2) - Saving(1, 1, 1, 1) == Saving(4, 3, 2, 1)
    assert Saving(params=1, nodes=-9).objection() is None
    assert Saving(nodes=1).objection() is None
    assert Saving().objection() == Saving(nodes=-1).objection() == "would save nothing"
    assert Saving(params=-1000, flops=5).objection() == "would grow the model: params by 1,000"
    assert Saving(bytes=-1, flops=-2).objection() == "would grow the model: bytes by 1, flops by 2"
    assert [Saving(1, 2, 3, 4).of(name) for name in ("params", "bytes", "flops", "nodes")] == [1, 2, 3, 4]
