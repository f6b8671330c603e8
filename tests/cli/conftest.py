# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import onnx
import pytest

from tests.cli.workspace import Workspace, logging_restored, start


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with logging_restored():
        yield Workspace(tmp_path)


@pytest.fixture
def process(tmp_path):
    def run(*arguments, **options):
        return start(*arguments, folder=tmp_path, **options)

    return run


@pytest.fixture
def text_model():
    """Makes a ModelProto from ONNX text."""

    def make(text: str) -> onnx.ModelProto:
        proto = onnx.parser.parse_model(text)
        onnx.checker.check_model(proto)
        return proto

    return make


@pytest.fixture
def external(workspace):
    """Saves the model with its weights at a location of the test's choice."""
    proto = onnx.load(workspace.folder / "model.onnx")
    onnx.save(
        proto, workspace.folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    proto = onnx.load(workspace.folder / "model.onnx", load_external_data=False)

    def move(location: str) -> None:
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        (workspace.folder / "model.onnx").write_bytes(proto.SerializeToString())

    return move
