# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from onnxcollapse.passes.collapse_ffn import CollapseFfn

from onnxcollapse import Budget, open_data, optimize
from onnxcollapse.calibration import cut_points
from onnxcollapse.model import edit
from onnxcollapse.structure import build_linear, feedforwards
from onnxcollapse.verification import Verifier
from tests.support import LAYERS, WIDTH, file_bytes, residual, rows


@pytest.fixture
def model():
    return residual()


@pytest.fixture
def data(model):
    return open_data({"x": rows(300, WIDTH), "s": rows(300, 3, seed=2)}, model, batch_size=64)


def without_block(model, layer):
    """The model with one block's output set to a constant."""
    changed = model.clone()
    site = next(s for s in feedforwards(changed.graph)[0] if s.name == f"u{layer}")
    zero = np.zeros((site.d_in, site.d_out))
    value = build_linear(changed.graph, site.down.node, site.down, site.input, zero, np.full(site.d_out, 0.3))
    edit.substitute(changed, site.output, value)
    edit.prune(changed)
    return changed


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_running_on_from_a_state_gives_the_error_of_the_whole(model, data, cut, layer):
    points = cut_points(model.graph)
    verifier = Verifier(model, data, "rel-l2", "cpu", points if cut else ())
    changed = without_block(model, layer)
    with verifier.states(model, points, limit=40) as states:
        place = states.place({f"u{layer}"})
        assert place == layer + 1
        for _ in range(2):
            found = verifier.error_from(states, place, changed)
            assert found == pytest.approx(verifier.error(changed, limit=40), rel=1e-6)
            assert found > 1e-3
        assert verifier.error_from(states, 0, changed) == pytest.approx(found, rel=1e-6)


def test_a_net_without_layers_runs_whole(data):
    model = residual()
    verifier = Verifier(model, data, "rel-l2", "cpu")
    with verifier.states(model, ()) as states:
        assert states.place({"u3"}) == 0
        assert verifier.error_from(states, 0, model) == 0.0


def test_little_memory_gives_the_same_model(model, data, tmp_path):
    found = [
        optimize(model, data, budget=Budget(0.3), passes=[CollapseFfn()], provider="cpu", memory=memory)
        for memory in (None, 1)
    ]
    assert found[0].journal.of("kept")
    assert found[0].error == pytest.approx(found[1].error, rel=1e-5)
    assert found[0].after == found[1].after
    again = optimize(model, data, budget=Budget(0.3), passes=[CollapseFfn()], provider="cpu", memory=1)
    assert file_bytes(again.model, tmp_path) == file_bytes(found[1].model, tmp_path)
