# SPDX-License-Identifier: Apache-2.0
"""The benchmark of planning: what is timed, and how calls become rows."""

from __future__ import annotations

import pytest

from benchmarks import planning
from benchmarks.planning import Moment, Watch


def test_every_stage_is_a_method():
    for owner, name in planning.STAGES.values():
        assert callable(getattr(owner, name))


def test_a_call_inside_another_counts_for_the_outer_one():
    class Work:
        def outer(self):
            return self.inner() + 1

        def inner(self):
            return 1

    watch = Watch()
    with watch.on({"a": (Work, "outer"), "b": (Work, "inner")}):
        assert (Work().outer(), Work().inner()) == (2, 1)
    assert [stage for stage, _, _ in watch.calls] == ["a", "b"]
    Work().inner()
    assert len(watch.calls) == 2


def test_the_plan_ends_with_the_measurement_of_what_was_chosen():
    def call(stage, start, stop):
        return stage, Moment(start, 2 * start), Moment(stop, 2 * stop)

    calls = [
        call("exact", 0, 2),
        call("measure", 2, 3),
        call("fit", 4, 5),
        call("measure", 5, 6),
        call("repair", 6, 10),
        call("measure", 10, 11),
    ]
    found = planning.rows(calls, (Moment(0, 0), Moment(12, 24)), Moment(2.0, 4.0))
    by_stage = {row.pop("stage"): row for row in found}
    assert by_stage["forward"] == {"cpu": 2.0, "wall": 4.0}
    assert by_stage["plan"] == {"cpu": 3.0, "wall": 3.0}
    assert by_stage["all"] == {"cpu": 6.0, "wall": 6.0}
    assert by_stage["plan: measure"] == {"cpu": 1.0, "wall": 1.0}
    assert by_stage["behind it: measure"] == {"cpu": 0.5, "wall": 0.5}
    assert by_stage["rest"] == {"cpu": 1.0, "wall": 1.0}
    assert sum(row["cpu"] for stage, row in by_stage.items() if stage not in ("forward", "plan", "all")) == (
        pytest.approx(6.0)
    )


def test_the_table_has_a_line_for_each_row():
    text = planning.table([{"stage": "prices", "cpu": 2.5, "wall": 2.6}])
    assert text.splitlines() == ["stage   cpu  wall", "prices  2.5  2.6"]
