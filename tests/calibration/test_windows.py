# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens: what length they may have, and that a text is cut without loss or overlap."""

from __future__ import annotations

import json

import numpy as np
import pytest

from onnxcollapse.calibration import open_data
from onnxcollapse.errors import OptionError

WORDS = 47
LIMIT = 40


@pytest.fixture
def folder(tmp_path):
    """A tokenizer that adds a token before and one after, and that was saved with settings of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["[PAD]", "[CLS]", "[SEP]", *(f"w{index}" for index in range(WORDS))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[PAD]")  # noqa: S106
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_truncation(max_length=5, stride=2, direction="left")
    tokenizer.enable_padding(direction="left", length=5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": LIMIT}))
    (tmp_path / "text.txt").write_text(" ".join(f"w{index}" for index in range(WORDS)))
    return tmp_path


@pytest.fixture
def text(folder, encoder):
    def read(window, model=None, spec=f"text:{folder / 'text.txt'}"):
        model = model or encoder()
        model.path = folder / "model.onnx"
        batches = list(open_data(spec, model, window=window).batches("all"))
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    return read


@pytest.mark.parametrize("window", [3, 7, 16, LIMIT, None])
def test_windows_follow_each_other_without_loss_or_overlap(text, window):
    arrays = text(window)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    assert ids.shape == mask.shape == (-(-WORDS // ((window or LIMIT) - 2)), window or LIMIT)
    assert (ids[:, 0] == 1).all()
    assert (mask[:-1] == 1).all()
    lengths = mask.sum(axis=1)
    assert [row[length - 1] for row, length in zip(ids, lengths, strict=True)] == [2] * len(ids)
    joined = np.concatenate([row[1 : length - 1] for row, length in zip(ids, lengths, strict=True)])
    assert joined.tolist() == list(range(3, WORDS + 3))
    assert (ids[-1, lengths[-1] :] == 0).all()
    assert (mask[-1, lengths[-1] :] == 0).all()


@pytest.mark.parametrize(
    "window, message",
    [
        (LIMIT + 1, f"window 41: max_position_embeddings in config.json is {LIMIT}; give at most that"),
        (2, "window 2: 2 of its tokens are special ones"),
        (1, "window 1: a window has 2 tokens or more"),
        (0, "window 0: a window has 2 tokens or more"),
        (-5, "window -5: a window has 2 tokens or more"),
    ],
)
def test_windows_that_do_not_fit(text, window, message):
    with pytest.raises(OptionError, match=message):
        text(window)


def test_a_fixed_length_is_the_only_window(text, build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[N,6] input_ids) => (int64[N,6] y) { y = Identity(input_ids) }"""
    )
    assert text(6, model)["input_ids"].shape[1] == 6
    for window in (5, 7):
        with pytest.raises(OptionError, match=f"window {window}: .* fixed length of 6; leave it out"):
            text(window, model)


def test_other_data_has_no_windows(text):
    for spec in ("random:4", {"input_ids": np.ones((4, 9), np.int64)}):
        with pytest.raises(OptionError, match=r"window 8: only text:FILE is cut into windows"):
            text(8, spec=spec)
