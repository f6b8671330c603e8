# SPDX-License-Identifier: Apache-2.0
"""A decoder exported by optimum generates through its KV cache after layers were taken out."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from onnxcollapse.passes.collapse_layers import CollapseLayers

from onnxcollapse import Budget, Model, Target, open_data, optimize
from onnxcollapse.calibration import open_session

torch = pytest.importorskip("torch", reason="needs torch: pip install onnxcollapse[export]")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install onnxcollapse[export]"
)
pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx: pip install onnxcollapse[export]")

VOCABULARY = 61


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of 6 layers as optimum exports it."""
    from optimum.exporters.onnx import onnx_export_from_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about shape checks
        onnx_export_from_model(model, path, task="text-generation-with-past", do_validation=False)
    return path


@pytest.fixture(
    scope="module",
    params=["fit", "parts", *(pytest.param(name, marks=pytest.mark.slow) for name in ("drop", "last"))],
)
def smaller(request, folder, tmp_path_factory):
    """The folder of a model with layers less, or with attention less."""
    model = Model.load(folder)
    ids = np.random.default_rng(0).integers(2, VOCABULARY, (48, 20))
    data = open_data({"input_ids": ids}, model)
    item = CollapseLayers() if request.param == "parts" else CollapseLayers(merge=request.param, parts=False)
    budget = Budget(None, "kl", Target("params", 0.93 if request.param == "parts" else 0.7))
    result = optimize(model, data, budget=budget, passes=[item], provider="cpu")
    assert result.met
    out = tmp_path_factory.mktemp("out")
    result.model.save(out)
    return out


def test_config_follows(folder, smaller):
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, smaller))
    left = after["num_hidden_layers"]
    assert 0 < left < 6
    assert {key: value for key, value in after.items() if key != "num_hidden_layers"} == {
        key: value for key, value in before.items() if key != "num_hidden_layers"
    }
    names = [v.name for v in Model.load(smaller).graph.outputs if v.name.startswith("present")]
    assert sorted(names) == sorted(f"present.{n}.{kind}" for n in range(left) for kind in ("key", "value"))


def test_generation_with_the_cache_is_that_of_full_forward_passes(smaller):
    from optimum.onnxruntime import ORTModelForCausalLM

    prompt = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    model = ORTModelForCausalLM.from_pretrained(smaller, use_cache=True)
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=False
    ).numpy()
    assert generated.shape == (2, 19)
    with open_session(Model.load(smaller), provider="cpu") as session:
        width = 19
        feeds = {
            "input_ids": generated,
            "attention_mask": np.ones_like(generated),
            "position_ids": np.broadcast_to(np.arange(width), generated.shape).copy(),
        }
        empty = {
            value.name: np.zeros((2, 2, 0, 8), np.float32)
            for value in Model.load(smaller).graph.inputs
            if value.name.startswith("past")
        }
        logits = session.run({**feeds, **empty})["logits"]
    np.testing.assert_array_equal(logits[:, 6:-1].argmax(-1), generated[:, 7:])
