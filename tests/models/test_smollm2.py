# SPDX-License-Identifier: Apache-2.0
import numpy as np
import onnx
import pytest

from models import recipe, smollm2

# A decoder over 4 tokens whose state after each token is the sum of the embeddings so far, kept in its cache.
DECODER = """
<ir_version: 8, opset_import: ["": 17]>
tiny (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
      int64[batch, sequence] position_ids, float[batch, 1, past, 4] "past_key_values.0.key")
  => (float[batch, sequence, 4] logits, float[batch, 1, total, 4] "present.0.key")
<float[4, 4] table = {{table}}, int64[1] heads = {1}, int64 axis = {2},
 int64[1] last = {9223372036854775807}, int64[1] two = {2}>
{
  embedded = Gather (table, input_ids)
  states = Unsqueeze (embedded, heads)
  "present.0.key" = Concat <axis = 2> ("past_key_values.0.key", states)
  sums = CumSum ("present.0.key", axis)
  length = Shape <start = 1, end = 2> (input_ids)
  start = Neg (length)
  tail = Slice (sums, start, last, two)
  logits = Squeeze (tail, heads)
}
"""


@pytest.fixture
def decoder(tmp_path):
    def make(table):
        path = tmp_path / "model.onnx"
        numbers = ", ".join(f"{number:.6f}" for number in np.ravel(table))
        onnx.save(onnx.parser.parse_model(DECODER.replace("{table}", numbers)), path)
        return recipe.open_session(path)

    return make


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(decoder):
    windows = {"input_ids": np.array([[0, 1, 2, 3], [3, 3, 0, 1]])}
    assert smollm2.perplexity(decoder(np.zeros((4, 4))), windows) == pytest.approx(4, rel=1e-6)


def test_perplexity_is_of_the_next_token(decoder):
    table = np.log([[0.1, 0.7, 0.1, 0.1]] * 4)
    window = {"input_ids": np.array([[2, 1]])}
    assert smollm2.perplexity(decoder(table), window) == pytest.approx(1 / 0.7, rel=1e-5)


def test_generation_through_the_cache_equals_full_passes(decoder):
    table = np.random.default_rng(1).normal(size=(4, 4)).round(6)
    prompt, expected = np.array([2, 0, 1]), []
    for _ in range(8):
        expected.append(int(table[[*prompt, *expected]].sum(0).argmax()))
    assert len(set(expected)) > 1
    assert smollm2.generate(decoder(table), prompt, 8) == expected


class Words:
    """A tokenizer whose tokens are the numbers of the text."""

    def __call__(self, text, **options):
        return {"input_ids": np.array([[int(word) for word in text.split()]])}


def test_windows_are_consecutive_tokens_from_the_whole_text():
    paragraphs = [" ".join(map(str, range(start, start + 100))) for start in range(0, 1100, 100)]
    feeds = smollm2._windows(Words(), paragraphs, 2)
    assert list(feeds) == ["input_ids", "attention_mask", "position_ids"]
    np.testing.assert_array_equal(feeds["input_ids"][:, [0, -1]], [[0, 255], [512, 767]])
    np.testing.assert_array_equal(feeds["position_ids"], [range(256)] * 2)
    assert all(array.dtype == np.int64 for array in feeds.values())
    with pytest.raises(recipe.RecipeError, match="has 4 windows, 5 are wanted"):
        smollm2._windows(Words(), paragraphs, 5)
