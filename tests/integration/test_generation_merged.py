# SPDX-License-Identifier: Apache-2.0
"""An encoder-decoder exported by optimum generates through its caches after layers of its decoder were taken out."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from onnxcollapse.passes.collapse_layers import CollapseLayers

from onnxcollapse import Budget, Model, Target, open_data, optimize
from onnxcollapse.calibration import open_session
from onnxcollapse.interop.export import export
from tests.interop.sources import VOCABULARY, save_t5

torch = pytest.importorskip("torch", reason="needs torch: pip install onnxcollapse[export]")
pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx: pip install onnxcollapse[export]")

LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about shape checks
        export(str(save_t5(path / "source", LAYERS, weak=(1,))), path / "exported")
    return path / "exported"


def calibration(folder):
    """Tokens for the encoder, its states, and tokens for the decoder."""
    random = np.random.default_rng(0)
    ids, mask = random.integers(2, VOCABULARY, (64, 7)), np.ones((64, 7), np.int64)
    with open_session(Model.load(folder / "encoder_model.onnx"), provider="cpu") as session:
        states = session.run({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    tokens = random.integers(2, VOCABULARY, (64, 9))
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask, "input_ids": tokens}


@pytest.mark.parametrize("merge", ["fit", pytest.param("last", marks=pytest.mark.slow)])
def test_generation_with_and_without_caches(folder, tmp_path, merge):
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    model = Model.load(folder)
    data = open_data(calibration(folder), model)
    budget = Budget(None, "kl", Target("params", 0.8))
    result = optimize(
        model,
        data,
        budget=budget,
        passes=[CollapseLayers(merge=merge, parts=False, longest=1)],
        provider="cpu",
    )
    assert result.met
    result.model.save(tmp_path / "out")
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    left = after["num_decoder_layers"]
    assert 0 < left < LAYERS and after == before | {"num_decoder_layers": left}
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    smaller = ORTModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    found = [smaller.generate(ids, use_cache=cache, **told).numpy() for cache in (True, False)]
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (2, 13) and len(np.unique(found[0])) > 3
    if merge == "fit":
        original = ORTModelForSeq2SeqLM.from_pretrained(folder).generate(ids, **told).numpy()
        assert (original == found[0]).mean() > 0.5
