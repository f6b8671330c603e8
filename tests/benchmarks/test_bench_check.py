# SPDX-License-Identifier: Apache-2.0
"""The check of the bench: what it times, and what it says of it."""

from __future__ import annotations

import pytest

from benchmarks import bench_check, machine
from onnxcollapse.bench import BenchReport, Latency, Ratio


def test_half_of_the_stack_has_half_of_the_flops(tmp_path):
    whole, half = (bench_check.build(tmp_path, layers) for layers in (4, 2))
    assert bench_check._flops(half) / bench_check._flops(whole) == 0.5


@pytest.mark.parametrize(("missed", "half", "status"), [(1, 0.52, 0), (2, 0.52, 1), (0, 0.56, 1)])
def test_it_fails_where_intervals_miss_or_the_half_takes_too_long(
    tmp_path, monkeypatch, missed, half, status
):
    ratios = iter(
        [Ratio(1.1, 1.05, 1.2)] * missed + [Ratio(1.0, 0.9, 1.1)] * (20 - missed) + [Ratio(half, 0.4, 0.6)]
    )

    def bench(models, *_, **__):
        first, second = (
            Latency(number, str(model), "run", 1, None, 1.0, 1.0, 1.0, 1, 1, next(ratios) if number else None)
            for number, model in enumerate(models)
        )
        return BenchReport((), (first, second), {})

    monkeypatch.setattr(bench_check, "bench", bench)
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    assert bench_check.main(["-o", str(tmp_path / "models")]) == status
    rows = machine.read("bench_check")
    assert (len(rows), sum(row["holds"] for row in rows[:-1])) == (21, 20 - missed)
