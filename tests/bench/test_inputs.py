# SPDX-License-Identifier: Apache-2.0
"""What models are timed on: sizes that are asked for, filled as data is, drawn or cut from data."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.bench import Sizes
from onnxcollapse.bench.inputs import make
from onnxcollapse.errors import OptionError
from tests.support import Net, mlp, rows
from tests.verification.decoders import HEADS, VOCABULARY, WIDTH, decoder, windows


def fixed(*shape):
    net = Net()
    net.op("Relu", "x", name="y")
    return net.model({"x": list(shape)}, {"y": list(shape)})


def test_batches_are_as_large_as_asked_for():
    model = mlp([8, 4, 8])
    for batch, rows_made in ((None, 1), (3, 3)):
        case = make(model, Sizes(batch))
        assert (case.feeds["x"].shape, case.batch, case.sequence) == ((rows_made, 8), rows_made, None)
        assert case.feeds["x"].dtype == np.float32


def test_models_are_run_on_the_same_numbers_and_other_seeds_on_others():
    one, other = (make(mlp([8, width, 8]), Sizes(4)).feeds["x"] for width in (4, 16))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, make(mlp([8, 4, 8]), Sizes(4), seed=1).feeds["x"])


def test_what_the_model_fixes_stays():
    assert make(fixed(4, 8), Sizes()).batch == 4
    assert make(fixed(4, 8), Sizes(4)).batch == 4
    with pytest.raises(OptionError, match="--batch 8: the model fixes axis 0 of input 'x' to 4"):
        make(fixed(4, 8), Sizes(8))


def test_one_axis_has_one_size():
    assert make(mlp([8, 4, 8]), Sizes(2, others={"n": 2})).batch == 2
    with pytest.raises(OptionError, match="--batch 2 and --size n=4 name one axis"):
        make(mlp([8, 4, 8]), Sizes(2, others={"n": 4}))


def test_a_decoder_gets_a_prompt_and_an_empty_cache():
    case = make(decoder(masked=True), Sizes(2, 5))
    assert (case.batch, case.sequence) == (2, 5)
    ids = case.feeds["input_ids"]
    assert ids.shape == (2, 5)
    assert 0 <= ids.min() <= ids.max() < VOCABULARY
    assert len(np.unique(ids)) > 2
    assert np.array_equal(case.feeds["position_ids"], np.tile(np.arange(5), (2, 1)))
    assert np.array_equal(case.feeds["attention_mask"], np.ones((2, 5)))
    assert case.feeds["past_key_values.1.key"].shape == (2, HEADS, 0, WIDTH // HEADS)


@pytest.mark.parametrize("name", ["p", "past_key_values.0.key.2"])
def test_a_cache_may_be_given_a_length(name):
    sizes = {"p": 7} if name == "p" else {name: 7}
    feeds = make(decoder((0,), masked=True), Sizes(2, 5, sizes)).feeds
    assert feeds["past_key_values.0.key"].shape == (2, HEADS, 7, WIDTH // HEADS)
    assert feeds["past_key_values.0.value"].shape[2] == (7 if name == "p" else 0)
    assert feeds["attention_mask"].shape == (2, 12)
    assert np.array_equal(feeds["position_ids"][0], np.arange(7, 12))


def test_other_dimensions_are_sized_by_symbol_and_by_axis():
    model = fixed("n", "height", None)
    assert make(model, Sizes(2, None, {"height": 5})).feeds["x"].shape[:2] == (2, 5)
    assert make(model, Sizes(2, None, {"x.1": 6, "x.2": 9})).feeds["x"].shape == (2, 6, 9)
    assert make(model, Sizes(2, 3, {"x.1": 6})).feeds["x"].shape[:2] == (2, 6), "what names the axis counts"
    with pytest.raises(OptionError, match=r"--size width: .*height, n, x\.0, x\.1, x\.2"):
        make(model, Sizes(others={"width": 3}))


def test_a_sequence_needs_an_axis_of_tokens():
    assert make(fixed("n", "s", 8), Sizes(2, 7)).sequence == 7
    with pytest.raises(OptionError, match="--sequence 7: no input has an axis of tokens"):
        make(mlp([8, 4, 8]), Sizes(2, 7))


def test_samples_of_data_are_repeated_to_fill_a_batch():
    x = rows(3, 8)
    case = make(mlp([8, 4, 8]), Sizes(8), {"x": x})
    assert np.array_equal(case.feeds["x"], x[np.arange(8) % 3])
    assert np.array_equal(make(mlp([8, 4, 8]), Sizes(2), {"x": x}).feeds["x"], x[:2])


def test_windows_of_data_are_cut():
    ids = windows(6, 16)
    case = make(decoder(masked=True), Sizes(4, 5), {"input_ids": ids})
    assert np.array_equal(case.feeds["input_ids"], ids[:4, :5])
    assert case.feeds["attention_mask"].shape == (4, 5)
    assert case.feeds["past_key_values.0.key"].shape == (4, HEADS, 0, WIDTH // HEADS)
    with pytest.raises(OptionError, match="--sequence 17: the data has 16 tokens"):
        make(decoder(), Sizes(4, 17), {"input_ids": ids})
    with pytest.raises(OptionError, match="--size p: sizes come from the data"):
        make(decoder(), Sizes(4, 5, {"p": 3}), {"input_ids": ids})
