# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse.errors import ModelError
from onnxcollapse.model import edit
from onnxcollapse.rewriting.transaction import Transaction, extent
from tests.rewriting.branches import BRANCH, branches
from tests.support import mlp


def mutilate(model) -> None:
    model.graph.name = "another"
    model.ir.metadata_props["new"] = "entry"
    model.graph[0].replace_input_with(
        1, edit.add_initializer(model.graph, "w", np.zeros((8, 8)), ir.DataType.FLOAT)
    )


def test_without_a_commit_everything_is_undone():
    model = branches(1.0, 1.0)
    before = model.to_bytes()
    with Transaction(model):
        mutilate(model)
    assert model.to_bytes() == before


def test_an_error_undoes_everything_and_goes_on():
    model = branches(1.0)
    before = model.to_bytes()
    with pytest.raises(KeyboardInterrupt), Transaction(model) as transaction:
        mutilate(model)
        transaction.commit()
        transaction.undo()
        raise KeyboardInterrupt
    assert model.to_bytes() == before


def test_a_commit_keeps_the_edits_and_removes_what_is_dead():
    model = branches(1.0, 1.0)
    with Transaction(model) as transaction:
        mutilate(model)
        transaction.commit()
    assert "w" in model.graph.initializers
    assert "c0" not in model.graph.initializers


def test_a_commit_can_still_be_undone():
    model = branches(1.0)
    before = model.to_bytes()
    with Transaction(model) as transaction:
        mutilate(model)
        transaction.commit()
        transaction.undo()
    assert model.to_bytes() == before


def test_a_commit_of_a_broken_graph_fails_and_undoes_everything():
    model = branches(1.0)
    before = model.to_bytes()
    with pytest.raises(ModelError, match="cycle"), Transaction(model) as transaction:
        model.graph[0].replace_input_with(0, model.graph.outputs[0])
        transaction.commit()
    assert model.to_bytes() == before


def test_the_weights_of_a_snapshot_are_shared():
    model = branches(1.0)
    tensor = model.graph.initializers["c0"].const_value
    with Transaction(model):
        mutilate(model)
    assert model.graph.initializers["c0"].const_value is tensor


def test_extent_is_all_that_can_be_saved():
    whole = extent(mlp([8, 64, 8]), {"x": (3, 8)})
    assert (whole.params, whole.bytes, whole.nodes) == (8 * 64 + 64 + 64 * 8 + 8, 4 * (2 * 8 * 64 + 72), 3)
    assert whole.flops == 3 * 2 * 2 * 8 * 64
    assert extent(branches(1.0)).params == BRANCH
