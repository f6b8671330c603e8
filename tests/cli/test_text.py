# SPDX-License-Identifier: Apache-2.0
"""Text as data on the command line, with the tokenizer in the model's folder."""

from __future__ import annotations

import json

import onnx
import pytest

from tests.cli.workspace import mentions

WORDS = 60


@pytest.fixture
def with_text(workspace, text_model):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, **{f"w{index}": index + 1 for index in range(WORDS)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(workspace.folder / "tokenizer.json"))
    (workspace.folder / "config.json").write_text(json.dumps({"max_position_embeddings": 32}))
    (workspace.folder / "text.txt").write_text(" ".join(f"w{index}" for index in range(WORDS)))
    proto = text_model(
        '<ir_version: 8, opset_import: ["": 17]> net (int64[n,s] input_ids) => (float[n,s] y) '
        "{ f = Cast<to = 1>(input_ids) a = Identity(f) y = Relu(a) }"
    )
    onnx.save(proto, workspace.folder / "model.onnx")
    return workspace


def test_the_window_decides_how_many_samples_a_text_is(with_text):
    for window, samples in (([], 2), (["--window", "8"], 8)):
        arguments = ["--data", "text:text.txt", *window, "--json"]
        result = with_text.run("compare", "model.onnx", "model.onnx", *arguments)
        assert json.loads(result.stdout)["samples"] == samples
        with_text.summary(*window, "--report", "rep", calib="text:text.txt")
        journal = json.loads((with_text.folder / "rep" / "journal.json").read_text())
        assert journal["facts"]["data"]["samples"] == samples


def test_a_window_too_long_for_the_model(with_text):
    arguments = ("--window", 33)
    line = with_text.refused(
        "optimize", "model.onnx", "-o", "out.onnx", "--calib", "text:text.txt", *arguments
    )
    mentions(line, "window 33", "max_position_embeddings", "32")
    line = with_text.refused("compare", "model.onnx", "model.onnx", "--data", "random:4", *arguments)
    mentions(line, "window 33", "text:FILE")
