# SPDX-License-Identifier: Apache-2.0
"""What follows when layers are gone: cache numbers, config files."""

from __future__ import annotations

import json

import pytest

from onnxcollapse import Model
from onnxcollapse.calibration.masks import cache_number
from onnxcollapse.errors import ModelError
from onnxcollapse.model import companions
from onnxcollapse.rewriting.settling import cache_layers, renumber, settle
from onnxcollapse.structure import layers
from tests.support import file_bytes, residual
from tests.verification.decoders import decoder

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "layer_types": ["a", "b", "c", "d"],
    "max_window_layers": 9,
}


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
    assert settle(model.clone(), model) is None
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
    assert "caches keep their numbers: layer 2" in settle(decoder((0, 1, 2)), model)


def test_settling_says_which_layers_are_left():
    original, work = decoder((0, 1, 2, 3)), decoder((0, 3))
    assert settle(original, work) == (
        "2 of 4 layers are gone; config files in the model's folder follow, and caches are numbered anew"
    )
    assert (work.layers_before, work.layers_left) == (4, (0, 3))
    assert cache_layers(work) == [0, 1]


def test_layers_without_caches_are_told_by_what_they_compute():
    original, work = residual(), residual()
    run = max(layers(original.graph), key=len)
    gone = {value.name for block in run[1:3] for node in block.nodes for value in node.outputs}
    for node in work.graph:
        for value in node.outputs:
            if value.name in gone:
                value.name = f"{value.name}_gone"
    assert settle(original, original.clone()) is None
    assert settle(original, work) == "2 of 5 layers are gone; config files in the model's folder follow"
    assert work.layers_left == (0, 3, 4)


def folder(tmp_path, config=LLAMA, genai=None):
    source = tmp_path / "source"
    source.mkdir()
    decoder((0, 1, 2, 3)).save(source / "model.onnx")
    (source / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if genai is not None:
        (source / "genai_config.json").write_text(json.dumps(genai, indent=4))
    return source


def test_config_follows_and_keeps_its_form(tmp_path):
    source = folder(tmp_path)
    model = Model.load(source)
    model.layers_before, model.layers_left = 4, (0, 3)
    model.save(tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    expected = {**LLAMA, "num_hidden_layers": 2, "layer_types": ["a", "d"], "max_window_layers": 2}
    assert text == json.dumps(expected, indent=2) + "\n"
    assert json.loads((source / "config.json").read_text()) == LLAMA


def test_config_follows_when_the_source_is_replaced(tmp_path):
    source = folder(tmp_path, {"n_layer": 4, "n_head": 4})
    model = Model.load(source)
    model.layers_before, model.layers_left = 4, (1, 2)
    model.save(source)
    assert json.loads((source / "config.json").read_text()) == {"n_layer": 2, "n_head": 4}


def test_untouched_layers_copy_companions_byte_for_byte(tmp_path):
    source = folder(tmp_path)
    Model.load(source).save(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_genai_config_follows(tmp_path):
    genai = {
        "model": {"decoder": {"num_hidden_layers": 4, "sliding_window": {"layers": [1, 3]}}, "type": "llama"}
    }
    source = folder(tmp_path, genai=genai)
    model = Model.load(source)
    model.layers_before, model.layers_left = 4, (0, 3)
    model.save(tmp_path / "out")
    decoder_part = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder_part == {"num_hidden_layers": 2, "sliding_window": {"layers": [1]}}


def test_a_config_that_is_no_json_is_an_error_and_nothing_is_written(tmp_path):
    source = folder(tmp_path)
    (source / "config.json").write_text("{")
    model = Model.load(source)
    model.layers_before, model.layers_left = 4, (0,)
    with pytest.raises(ModelError, match="is no JSON"):
        model.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_say_nothing_of_layers(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    assert companions.follow(path, 4, (0,)) is None
