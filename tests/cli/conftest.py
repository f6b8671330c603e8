# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging

import onnx
import pytest

from tests.cli.workspace import Workspace, start


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    yield Workspace(tmp_path)
    root.handlers[:] = handlers  # the command line sent the log to a stream that is closed now


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
