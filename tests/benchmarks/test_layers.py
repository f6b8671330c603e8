# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole layers: its rows and its table."""

from __future__ import annotations

from benchmarks import layers
from onnxcollapse.rewriting import registry


def test_every_method_names_passes_that_exist():
    for specs in layers.METHODS.values():
        passes = registry.chosen([spec.format(threshold=0.5) for spec in specs])
        assert passes[0].name == "collapse-layers"


def test_a_model_has_a_row_for_every_method_and_count():
    found = list(layers.jobs(["smollm2"], [], []))
    assert len({job.key for job in found}) == len(found)
    counted = [job for job in found if job.method == "fit"]
    assert [job.layers for job in counted] == [1, 2, 4, 7, 10]
    assert [job.threshold for job in found if job.method == "laco rdsc"] == list(layers.THRESHOLDS)
    assert [job.layers for job in layers.jobs(["smollm2"], ["drop"], [4])][1:] == [4]


def test_the_table_leaves_empty_what_a_row_has_not():
    rows = [
        {"model": "vit12", "method": "original", "layers": None, "threshold": None, "quality": 0.9},
        {"model": "vit12", "method": "fit", "layers": 2, "threshold": None, "quality": 0.89, "removed": 2},
    ]
    text = layers.table(rows)
    assert text.startswith("vit12\nmethod")
    assert "None" not in text
