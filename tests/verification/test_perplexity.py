# SPDX-License-Identifier: Apache-2.0
"""Perplexity over the data's own next tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse import open_data
from onnxcollapse.calibration import cut_points
from onnxcollapse.errors import MetricError
from onnxcollapse.verification import Trials, Variant, Verifier, compare, metric
from tests.verification.decoders import decoder, windows

rng = np.random.default_rng(17)


def surprise(logits, ids, pairs):
    """Negative log-likelihoods of the next tokens at (row, position) pairs."""
    scores = logits.astype(np.float64)
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return np.array([-log_p[row, place, ids[row, place + 1]] for row, place in pairs])


def measured(got, want, ids, batches=1, **feeds):
    one = metric("perplexity")
    for part in np.array_split(np.arange(len(ids)), batches):
        more = {name: array[part] for name, array in feeds.items()}
        one.update({"logits": got[part]}, {"logits": want[part]}, {"input_ids": ids[part], **more})
    return one


@pytest.mark.parametrize("width", [7, 5000])
@pytest.mark.parametrize("batches", [1, 3])
def test_exact_values(width, batches):
    ids = rng.integers(0, width, (4, 6))
    want = rng.standard_normal((4, 6, width)).astype(np.float32)
    got = (2 * want).astype(np.float32)
    pairs = [(row, place) for row in range(4) for place in range(5)]
    both = [np.exp(surprise(logits, ids, pairs).mean()) for logits in (want, got)]
    one = measured(got, want, ids, batches)
    assert one.perplexities == pytest.approx(both, rel=1e-6)
    assert one.value() == pytest.approx(max(both[1] / both[0] - 1, 0), rel=1e-5)
    assert measured(want.copy(), want, ids).value() == 0


def test_values_by_hand():
    """Uniform logits have the vocabulary as perplexity; 3/4 for the right token has 4/3."""
    ids = np.array([[0, 1, 0]])
    right = np.log(np.array([[[0.25, 0.75], [0.75, 0.25], [0.5, 0.5]]], np.float32))
    uniform = np.zeros((1, 3, 2), np.float32)
    one = measured(uniform, right, ids)
    assert one.perplexities == pytest.approx((4 / 3, 2))
    assert one.value() == pytest.approx(0.5)
    assert measured(right, uniform, ids).value() == 0  # better is no error


def test_padding_is_left_out_as_row_and_as_target():
    ids, want = rng.integers(0, 7, (3, 5)), rng.standard_normal((3, 5, 7))
    got = want + rng.standard_normal(want.shape)
    mask = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]])
    pairs = [(0, 0), (0, 1), (1, 2), (1, 3)]
    both = [np.exp(surprise(logits, ids, pairs).mean()) for logits in (want, got)]
    for logits in (got, want):
        logits[mask == 0] = np.nan
    assert measured(got, want, ids, attention_mask=mask).perplexities == pytest.approx(both)
    with pytest.raises(MetricError, match="at least 2 tokens"):
        measured(got[2:], want[2:], ids[2:], attention_mask=mask[2:]).value()


def test_what_does_not_suit_it():
    ids, want = rng.integers(0, 7, (2, 4)), rng.standard_normal((2, 4, 7))
    one = metric("perplexity")
    assert one.value() == 0
    with pytest.raises(MetricError, match=r"no input 'input_ids'.*choose another"):
        one.update({"logits": want}, {"logits": want}, {"x": want})
    with pytest.raises(MetricError, match=r"no output has scores .* \[2, 4\] \(there is 'y' \[2, 7\]\)"):
        one.update({"y": want[:, 0]}, {"y": want[:, 0]}, {"input_ids": ids})
    with pytest.raises(MetricError, match="'logits' is missing"):
        one.update({}, {"logits": want}, {"input_ids": ids})
    with pytest.raises(MetricError, match=r"has shape \[2, 4, 6\] instead of \[2, 4, 7\]"):
        measured(want[..., :6], want, ids)
    with pytest.raises(MetricError, match="has 7 entries a row and token 9 is none of them"):
        measured(want, want, np.full((2, 4), 9))
    bad = want.copy()
    bad[0, 0, 2] = np.nan
    assert measured(bad, want, ids).value() == np.inf
    with pytest.raises(MetricError, match="of the reference is NaN or infinite"):
        measured(want, bad, ids)


def test_logits_are_found_among_outputs():
    ids, want = rng.integers(0, 7, (2, 4)), rng.standard_normal((2, 4, 7))
    more = {"hidden": rng.standard_normal((2, 4, 3)), "present.0.key": rng.standard_normal((2, 4, 9))}
    one = metric("perplexity")
    one.update({"scores": want, **more}, {"scores": want, **more}, {"input_ids": ids})
    assert one.perplexities[0] == pytest.approx(measured(want, want, ids).perplexities[0])


def turned(model):
    """Turns the feed-forward block of layer 1 around."""
    node = next(node for node in model.graph if node.outputs[0].name == "h1")
    value = node.inputs[1].producer().inputs[1]
    model.graph.initializers[value.name].const_value = ir.tensor(-value.const_value.numpy())
    return None, None


def test_variants_in_segments_have_the_error_of_the_whole_model():
    model = decoder((0, 1, 2))
    data = open_data({"input_ids": windows()}, model, batch_size=4)
    verifier = Verifier(model, data, "perplexity", "cpu")
    points = cut_points(model.graph)
    assert points
    trials = Trials(model, data, verifier, points, provider="cpu")
    changed = model.clone()
    turned(changed)
    list(trials.run({"one": Variant(frozenset({"h1"}), turned)}))
    error = verifier.error(changed)
    assert error > 0.01
    assert trials.outcomes["one"].error == pytest.approx(error, rel=1e-4)
    assert verifier.error(model) == 0


def test_compare_shows_it_for_tokens_and_logits_only():
    model = decoder()
    data = open_data({"input_ids": windows()}, model)
    found = compare(model, model.clone(), data, provider="cpu")
    assert found.overall["perplexity"] == 0
    assert found.perplexities[0] == found.perplexities[1]
    assert compare(model, model.clone(), data, ["kl"], provider="cpu").perplexities is None
    masked = decoder(masked=True)
    padding = open_data({"input_ids": windows(), "attention_mask": np.eye(24, 16, dtype=np.int64)}, masked)
    assert "perplexity" not in compare(masked, masked.clone(), padding, provider="cpu").overall
    next(v for v in model.graph.outputs if v.name == "logits").name = "scores"
    assert "perplexity" not in compare(model, model.clone(), data, provider="cpu").overall
