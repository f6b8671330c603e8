# SPDX-License-Identifier: Apache-2.0
"""What follows when layers are gone: cache numbers, config files."""

from __future__ import annotations

import pytest

from onnxcollapse.calibration.masks import cache_number
from onnxcollapse.errors import ModelError
from onnxcollapse.rewriting.settling import cache_layers, renumber, settle
from onnxcollapse.structure import layers
from tests.support import file_bytes, residual
from tests.verification.decoders import decoder


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("past_key_values.3.key", 3),
        ("past_key_values.12.decoder.value", 12),
        ("past_3_key", 3),
        ("past_key_7", 7),
        ("present.0.value", 0),
        ("present_key_values.5.key", 5),
        ("key_cache.2", 2),
        ("decoder2.past_key_values.3.key", 3),
        ("layer.3.past_key", 3),
        ("logits", None),
        ("hidden_states.3", None),
    ],
)
def test_cache_names_tell_their_layer(name, number):
    assert cache_number(name) == number


def names(model):
    return [value.name for value in (*model.graph.inputs, *model.graph.outputs)]


@pytest.mark.parametrize(
    "spelling", [("past_key_values.{}.{}", "present.{}.{}"), ("past_{}_{}", "present_{}_{}")]
)
def test_gaps_are_closed_on_both_sides_in_order(spelling):
    past, present = spelling
    model = decoder((0, 2, 5), past=past, present=present)
    wanted = names(decoder((0, 1, 2), past=past, present=present))
    assert renumber(model) == {0: 0, 2: 1, 5: 2}
    assert names(model) == wanted


def test_without_gaps_nothing_changes(tmp_path):
    model = decoder((0, 1, 2))
    before = file_bytes(model, tmp_path)
    assert settle(model.clone(), model, set()) is None
    renumber(model)
    assert file_bytes(model, tmp_path) == before
    assert not model.layers_before


def test_a_cache_on_one_side_only_is_an_error_by_layer():
    model = decoder((0, 2))
    model.graph.outputs[:] = [
        v for v in model.graph.outputs if v.name != "present.2.key" and v.name != "present.2.value"
    ]
    with pytest.raises(ModelError, match="layer 2 has a cache on one side"):
        renumber(model)
    assert settle(decoder((0, 1, 2)), model, set()) == (
        "1 of 3 layers are gone; caches keep their numbers and config files their counts: layer 2 has a cache on one "
        "side of the model only; it cannot be numbered anew"
    )
    assert not model.layers_before


def test_settling_says_which_layers_are_left():
    original, work = decoder((0, 1, 2, 3)), decoder((0, 3))
    assert settle(original, work, set()) == (
        "2 of 4 layers are gone; config files in the model's folder follow, and caches are numbered anew"
    )
    assert (work.layers_before, work.layers_left) == (4, (0, 3))
    assert cache_layers(work) == [0, 1]


def test_layers_without_caches_are_told_by_what_has_left():
    original, work = residual(), residual()
    run = max(layers(original.graph), key=len)
    gone = {value.name for block in run[1:3] for node in block.nodes for value in node.outputs}
    assert settle(original, work, set()) is None
    assert settle(original, work, gone) == "2 of 5 layers are gone; config files in the model's folder follow"
    assert work.layers_left == (0, 3, 4)


def test_what_goes_in_a_second_run_adds_to_the_first():
    first, second = decoder((0, 2, 3, 4)), decoder((0, 1, 3))
    settle(decoder((0, 1, 2, 3, 4)), first, set())
    settle(first, second, set())
    assert (second.layers_before, second.layers_left) == (5, (0, 2, 4))


def test_caches_that_had_gaps_keep_their_numbers():
    original, work = decoder((0, 2, 5)), decoder((0, 5))
    assert settle(original, work, set()) == (
        "1 of 3 layers are gone; caches keep their numbers and config files their counts: the original's have gaps, "
        "as where not every layer has a cache"
    )
    assert cache_layers(work) == [0, 5]


def test_a_name_that_an_initializer_has_is_taken():
    model = decoder((0, 2))
    weight = next(iter(model.graph.initializers.values()))
    del model.graph.initializers[weight.name]
    weight.name = "present.1.key"
    model.graph.initializers["present.1.key"] = weight
    with pytest.raises(ModelError, match=r"a cache would be called 'present\.1\.key', as another tensor is"):
        renumber(model)
