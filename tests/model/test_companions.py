# SPDX-License-Identifier: Apache-2.0
"""Config files follow when layers are gone, and keep every character that says nothing of layers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcollapse import Model
from onnxcollapse.model import companions
from onnxcollapse.model.jsontext import apply, keeping, parse
from tests.verification.decoders import decoder

LLAMA = """{
  "model_type": "llama", "rms_norm_eps": 1e-5,\r
  "num_hidden_layers": 4,
  "layer_types": ["a", "b",  "c", "d"],
  "max_window_layers": 9, "name": "\\u00e9",
  "eos_token_id": [1, 2, 3, 4]
}
"""


def folder(tmp_path, config=LLAMA, genai=None):
    source = tmp_path / "source"
    source.mkdir()
    decoder((0, 1, 2, 3)).save(source / "model.onnx")
    (source / "config.json").write_bytes(config.encode())
    if genai is not None:
        (source / "genai_config.json").write_text(json.dumps(genai, indent=4))
    return source


def shortened(source, left=(0, 3)):
    model = Model.load(source)
    model.layers_before, model.layers_left = 4, left
    return model


def followed(tmp_path, config, left=(0, 3), name="config.json", **options):
    path = tmp_path / name
    path.write_text(json.dumps(config))
    text = companions.follow(path, 4, left, **options)
    return None if text is None else json.loads(text)


# Files


def test_config_follows_and_keeps_every_other_character(tmp_path):
    source = folder(tmp_path)
    shortened(source).save(tmp_path / "out")
    expected = LLAMA.replace('_layers": 4', '_layers": 2').replace('["a", "b",  "c", "d"]', '["a", "d"]')
    expected = expected.replace('_layers": 9', '_layers": 2')
    assert (tmp_path / "out" / "config.json").read_bytes() == expected.encode()
    assert (source / "config.json").read_bytes() == LLAMA.encode()


def test_config_follows_once_when_the_source_is_replaced(tmp_path):
    source = folder(tmp_path, '{"n_layer": 4, "n_head": 4}')
    model = shortened(source, (1, 2))
    for _ in range(2):
        model.save(source)
        assert json.loads((source / "config.json").read_text()) == {"n_layer": 2, "n_head": 4}
    assert not model.layers_before


def test_untouched_layers_copy_companions_byte_for_byte(tmp_path):
    source = folder(tmp_path)
    Model.load(source).save(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == LLAMA.encode()


@pytest.mark.parametrize("config", ["{", "", "[1]", '{"hidden_size": 4}', '{"num_hidden_layers": 5}'])
def test_what_cannot_follow_is_copied_and_logged(tmp_path, caplog, config):
    source = folder(tmp_path, config)
    shortened(source).save(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == config
    assert "copied as it is" in caplog.text


def test_other_files_say_nothing_of_layers(tmp_path):
    assert followed(tmp_path, {"num_hidden_layers": 4}, name="tokenizer.json") is None


# What follows


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"block_types": ["r", "r", "a", "r"]}, {"block_types": ["r", "r"]}),
        ({"mlp_only_layers": [1, 3]}, {"mlp_only_layers": [1]}),
        ({"num_kv_heads": [1, 2, 3, 4]}, {"num_kv_heads": [1, 4]}),
        ({"num_kv_heads": 4}, {"num_kv_heads": 4}),
        ({"attention_types": [[["g", "l"], 2]]}, {"attention_types": [[["g", "l"], 1]]}),
        ({"max_window_layers": 1}, {"max_window_layers": 1}),
        ({"hidden_layers_names": [1, 2, 3, 4]}, {"hidden_layers_names": [1, 2, 3, 4]}),
    ],
)
def test_lists_keep_the_layers_left_where_their_key_is_known(tmp_path, before, after):
    found = followed(tmp_path, {"num_hidden_layers": 4, **before})
    assert found == {"num_hidden_layers": 2, **after}


def test_an_object_with_another_count_stays(tmp_path):
    vision = {"num_hidden_layers": 12, "max_window_layers": 4, "layer_types": [1, 2, 3, 4]}
    config = {"vision_config": vision, "text_config": {"num_hidden_layers": 4}, "max_window_layers": 4}
    found = followed(tmp_path, config)
    assert found == {**config, "text_config": {"num_hidden_layers": 2}}


def test_a_config_of_encoder_and_decoder_is_left_to_the_user(tmp_path, caplog):
    assert followed(tmp_path, {"is_encoder_decoder": True, "num_layers": 4, "num_decoder_layers": 4}) is None
    (record,) = caplog.records
    assert record.message == (
        f"{tmp_path / 'config.json'} is of an encoder and a decoder and does not say which of its counts is this "
        "model's: it is copied as it is; set that count from 4 layers to 2 by hand"
    )


@pytest.mark.parametrize(
    "before, after",
    [
        ({"num_layers": 4, "num_decoder_layers": 4}, {"num_decoder_layers": 2}),
        ({"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4}, {"decoder_layers": 2}),
        ({"decoder": {"n_layer": 4}, "encoder": {"num_hidden_layers": 4}}, {"decoder": {"n_layer": 2}}),
    ],
)
def test_of_two_models_the_decoder_follows_by_name(tmp_path, before, after):
    config = {"is_encoder_decoder": True, **before}
    assert followed(tmp_path, config, decoder_of_two=True) == config | after


def test_a_decoder_whose_count_is_another_stays(tmp_path, caplog):
    config = {"is_encoder_decoder": True, "num_layers": 4, "num_decoder_layers": 6}
    assert followed(tmp_path, config, decoder_of_two=True) is None
    assert "names no count of 4 layers" in caplog.text


def test_genai_config_follows(tmp_path):
    window = {"window_size": 8, "layers": [1, 3]}
    genai = {"model": {"decoder": {"num_hidden_layers": 4, "sliding_window": window}, "type": "llama"}}
    found = followed(tmp_path, genai, name="genai_config.json")
    assert found["model"]["decoder"] == {
        "num_hidden_layers": 2,
        "sliding_window": {"window_size": 8, "layers": [1]},
    }
    genai["model"]["decoder"]["num_hidden_layers"] = 2
    assert followed(tmp_path, genai, name="genai_config.json") is None


# Text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def plain(part):
    """What a part says, without places."""
    if isinstance(part.value, dict):
        return {key: plain(member) for key, member in part.members.items()}
    return [plain(item) for item in part.items] if isinstance(part.value, list) else part.value


@given(VALUES, st.sampled_from([None, 0, 2, "\t"]), st.booleans())
def test_parts_say_what_json_says_and_stand_where_it_is_said(value, indent, ascii):
    text = f" {json.dumps(value, indent=indent, ensure_ascii=ascii)}\n"
    part = parse(text)
    assert plain(part) == value
    assert json.loads(text[part.start : part.end]) == value
    for item in part.items:
        assert json.loads(text[item.start : item.end]) == plain(item)


@given(st.lists(VALUES, min_size=1, max_size=6), st.sampled_from([None, 2]), st.data())
def test_a_list_keeps_what_is_kept(values, indent, data):
    kept = data.draw(st.lists(st.sampled_from(range(len(values))), unique=True).map(sorted))
    text = json.dumps({"a": values, "b": 1}, indent=indent)
    edited = apply(text, [keeping(text, parse(text).members["a"], kept)])
    assert json.loads(edited) == {"a": [values[place] for place in kept], "b": 1}
    if kept:
        assert edited == json.dumps({"a": [values[place] for place in kept], "b": 1}, indent=indent)
