# SPDX-License-Identifier: Apache-2.0
"""Greedy continuations, through a KV cache and without."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from onnxcollapse.passes.narrow_ffn import NarrowFfn

from onnxcollapse import Budget, Target, open_data, optimize
from onnxcollapse.calibration import open_session
from onnxcollapse.calibration.masks import cache_pairs
from onnxcollapse.errors import MetricError
from onnxcollapse.verification import Verifier, compare, metric
from onnxcollapse.verification.generation import Continuations, Decoder, agreement
from tests.support import mlp, rows
from tests.verification.decoders import decoder, windows


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def naive(model, prompts, count):
    """Every prompt by itself, the whole sequence run anew for each token."""
    found = []
    with open_session(model, provider="cpu") as session:
        for prompt in prompts:
            tokens = prompt.tolist()
            for _ in range(count):
                ids = np.array([tokens])
                feeds = {"input_ids": ids, "position_ids": np.arange(len(tokens))[None]}
                tokens.append(int(session.run(feeds)["logits"][0, -1].argmax()))
            found.append(tokens[len(prompt) :])
    return np.array(found)


@pytest.mark.parametrize(
    ("layers", "past", "present"),
    [
        ((0, 1), "past_key_values.{}.{}", "present.{}.{}"),
        ((0, 1, 5), "past_key_values.{}.{}", "present.{}.{}"),
        ((1, 10, 11), "past_{}_{}", "present_{}_{}"),
        ((2, 0), "past_key_values_{}_{}", "present_key_values_{}_{}"),
    ],
)
def test_a_cache_gives_the_tokens_of_the_growing_sequence(layers, past, present):
    cached, plain = decoder(layers, past=past, present=present), decoder(layers, cached=False)
    prompts = windows(5, 7)
    expected = naive(plain, prompts, 12)
    assert len(np.unique(expected)) > 3
    with Decoder(cached, "cpu") as one, Decoder(plain, "cpu") as other:
        assert (one.cached, other.cached) == (True, False)
        np.testing.assert_array_equal(one.greedy(prompts, 12), expected)
        np.testing.assert_array_equal(other.greedy(prompts, 12), expected)


def test_a_cache_that_is_not_given_back_is_left_empty():
    model, plain = decoder((0, 1)), decoder((0, 1), cached=False)
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name != "present.1.key"]
    prompts = windows(3, 6)
    with Decoder(model, "cpu") as one:
        assert not one.cached
        np.testing.assert_array_equal(one.greedy(prompts, 8), naive(plain, prompts, 8))


def test_caches_are_paired_by_name():
    assert cache_pairs(["past_key_self_3", "input_ids"], ["logits", "present_key_self_3"]) == {
        "past_key_self_3": "present_key_self_3"
    }
    assert cache_pairs(["past.1.key", "past.11.key"], ["present.11.key", "present.1.key"]) == {
        "past.1.key": "present.1.key",
        "past.11.key": "present.11.key",
    }
    assert cache_pairs(["past_key_values.0.key"], ["present.1.key"]) is None
    assert cache_pairs(["input_ids"], ["logits"]) is None


def test_agreement_ends_at_the_first_token_that_differs():
    truth = np.array([[1, 2, 3, 4]] * 4)
    found = np.array([[1, 2, 3, 4], [1, 2, 0, 4], [0, 2, 3, 4], [1, 2, 3, 0]])
    assert agreement(found, truth).tolist() == [1.0, 0.5, 0.0, 0.75]


def test_the_error_is_of_the_first_prompts_of_the_held_out_part(monkeypatch):
    reference, changed = decoder((0, 1)), decoder((0, 1), broken=0.03)
    data = open_data({"input_ids": windows(60)}, reference, batch_size=5)
    held = np.concatenate([batch["input_ids"] for batch in data.batches("heldout", 8)])[:8, :8]
    truth, found = naive(decoder(cached=False), held, 32), naive(decoder(cached=False, broken=0.03), held, 32)
    expected = 1 - np.logical_and.accumulate(truth == found, axis=1).mean()
    assert 0 < expected < 1
    generated, real = [], Decoder.greedy

    def watch(self, prompts, count):
        generated.append(self)
        return real(self, prompts, count)

    monkeypatch.setattr(Decoder, "greedy", watch)
    with Verifier(reference, data, "continuation", "cpu") as verifier:
        assert verifier.error(changed) == pytest.approx(expected)
        assert verifier.error(reference) == 0
        assert verifier.provider.obtained == "CPUExecutionProvider"
        assert verifier.pricing_metric == "kl"
    assert len(set(map(id, generated))) <= 3  # the reference generates once
    assert len(generated) == 3 * 2


def test_windows_that_begin_with_padding_are_passed_over(monkeypatch):
    reference = decoder(masked=True)
    ids, mask = windows(6), np.ones((6, 16), np.int64)
    mask[1, :3] = mask[4, 10:] = mask[5, 2:] = 0
    data = open_data({"input_ids": ids, "attention_mask": mask}, reference)
    given, real = [], Decoder.greedy
    monkeypatch.setattr(
        Decoder, "greedy", lambda self, prompts, n: given.append(prompts) or real(self, prompts, n)
    )
    assert Continuations(reference, data, "all", "cpu").error(reference) == 0
    np.testing.assert_array_equal(np.concatenate(given[: len(given) // 2]), ids[[0, 2, 3, 4], :8])
    short = open_data({"input_ids": windows(8, 1)}, decoder())
    with pytest.raises(MetricError, match="give longer windows"):
        Continuations(decoder(), short, "all", "cpu").error(decoder())


def test_what_cannot_generate_says_why():
    model = mlp([8, 16, 4])
    data = open_data({"x": rows(20, 8)}, model)
    for name in ("continuation", "perplexity"):
        with pytest.raises(
            MetricError, match=f"'{name}': the model has no input 'input_ids'.*choose another"
        ):
            Verifier(model, data, name, "cpu")
    with pytest.raises(MetricError, match="about what models generate"):
        metric("continuation")


def test_compare_generates_on_request_only():
    a, b = decoder(), decoder(broken=0.03)
    data = open_data({"input_ids": windows(12)}, a)
    found = compare(a, b, data, provider="cpu")
    assert "continuation" not in found.overall
    reference, candidate = found.perplexities
    assert found.overall["perplexity"] == pytest.approx(max(candidate / reference - 1, 0))
    assert found.to_dict()["perplexity"] == {"a": reference, "b": candidate}
    assert compare(a, b, data, ["continuation"], provider="cpu").overall["continuation"] > 0
    assert compare(a, a.clone(), data, ["continuation"], provider="cpu").overall == {"continuation": 0}


@pytest.mark.parametrize("target", [None, Target("params", 0.85)])
@pytest.mark.parametrize("name", ["continuation", "perplexity"])
def test_a_model_is_made_smaller_under_a_budget_of_it(name, target):
    model = decoder((0, 1), hidden=48)
    data = open_data({"input_ids": windows(36)}, model, batch_size=12)
    budget = Budget(0.3 if name == "continuation" else 0.02, name, target)
    passes = [NarrowFfn(skip=False)]
    result = optimize(model, data, budget=budget, passes=passes, provider="cpu")
    assert result.journal.of("kept")
    assert result.after.params < result.before.params
    assert result.error == pytest.approx(Verifier(model, data, name, "cpu").error(result.model))
    assert result.error <= budget.error
    if name == "continuation":
        assert not any("over the budget" in e.reason for e in result.journal.of("declined"))
