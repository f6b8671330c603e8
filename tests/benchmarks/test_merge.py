# SPDX-License-Identifier: Apache-2.0
"""The benchmark of shared weights: its rows and its table."""

from __future__ import annotations

from benchmarks import merge
from onnxcollapse.rewriting import registry


def test_every_method_is_a_way_to_tie_of_its_own():
    passes = [registry.parse(f"merge-ffn:window=2,{spec}") for spec in merge.METHODS.values() if spec]
    assert len(set(passes)) == len(merge.METHODS) - 1
    assert all(item.name == "merge-ffn" for item in passes)


def test_a_model_has_a_row_for_every_method_and_window():
    found = list(merge.jobs(["minilm_l6"], [], []))
    assert found[0] == ("minilm_l6", "none", None)
    assert len(set(found)) == len(found) == 1 + len(merge.WINDOWS) * (len(merge.METHODS) - 1)
    assert list(merge.jobs(["vit12"], ["fit"], [3]))[1:] == [("vit12", "fit", 3)]


def test_the_table_leaves_empty_what_a_row_has_not():
    rows = [
        {"model": "vit12", "method": "none", "window": None, "quality": 0.9},
        {"model": "vit12", "method": "fit", "window": 2, "quality": 0.89, "block_error": [0.3]},
    ]
    text = merge.table(rows)
    assert text.startswith("vit12\nmethod")
    assert "None" not in text
    assert "[0.3]" in text
