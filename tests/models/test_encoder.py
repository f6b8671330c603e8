# SPDX-License-Identifier: Apache-2.0
import argparse

import numpy as np
import onnx
import pytest

from models import encoder, recipe

# Like the real one in what matters: an int64 pass-through comes before the hidden state [batch, sequence, 3].
ENCODER = """
<ir_version: 8, opset_import: ["": 17]>
tiny (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
  => (int64[batch, sequence] ids, float[batch, sequence, 3] hidden)
<float[4, 3] table = {1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1}>
{
  ids = Identity (attention_mask)
  hidden = Gather (table, input_ids)
}
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / recipe.MODEL
    onnx.save(onnx.parser.parse_model(ENCODER), path)
    return path


def test_embeddings_are_means_over_real_tokens_only(model):
    feeds = {
        "input_ids": np.array([[0, 1, 3, 3], [2, 2, 2, 0]]),
        "attention_mask": np.array([[1, 1, 0, 0], [1, 1, 1, 1]]),
    }
    expected = [[0.5, 0.5, 0], [0.25, 0, 0.75]]
    np.testing.assert_allclose(encoder.embed(model, feeds), expected, rtol=1e-12)


def test_correlation_is_one_for_rotated_and_scaled_embeddings():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(20, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert encoder.similarity_correlation(embeddings, 3 * embeddings @ rotation) == pytest.approx(1, abs=1e-9)


def test_correlation_is_near_zero_for_unrelated_embeddings():
    rng = np.random.default_rng(0)
    value = encoder.similarity_correlation(rng.normal(size=(60, 8)), rng.normal(size=(60, 8)))
    assert abs(value) < 0.1


def test_measure_compares_with_the_reference(model, tmp_path):
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(0, 4, (12, 5)), "attention_mask": np.ones((12, 5), np.int64)}
    recipe.write_npz(tmp_path / recipe.EVALUATION, feeds)
    recipe.write_npz(tmp_path / encoder.REFERENCE, {"embeddings": encoder.embed(model, feeds)})
    args = argparse.Namespace(output=tmp_path, measure=model)
    assert encoder.measure(args) == {
        "measure": "similarity-spearman",
        "value": pytest.approx(1),
        "samples": 12,
    }


def test_a_model_without_hidden_state_is_named(tmp_path):
    path = tmp_path / "other.onnx"
    text = '<ir_version: 8, opset_import: ["": 17]> other (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), path)
    with pytest.raises(recipe.RecipeError, match="no floating output"):
        encoder.embed(path, {"x": np.ones((1, 3), np.float32)})
