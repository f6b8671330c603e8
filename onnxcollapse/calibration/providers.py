# SPDX-License-Identifier: Apache-2.0
"""Execution providers: which one was asked for, which one really runs, and ONNX Runtime's noise kept out."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

from onnxcollapse.errors import ProviderError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

logger = logging.getLogger(__name__)

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
SHORT_NAMES = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
FATAL = 4  # of ONNX Runtime's log levels; its exceptions say the same again
WARNING = 2  # its default level

# TF32 would put a relative noise of 1e-3 under every error measured; exhaustive search picks other cuDNN
# algorithms from run to run.
OPTIONS: dict[str, dict[str, str]] = {
    CUDA: {
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    },
}


@dataclass(frozen=True)
class Provider:
    """What a session runs on.

    Attributes:
        requested: The name asked for, as given.
        obtained: ONNX Runtime's name of the provider that really runs.
        options: The provider options in force.
    """

    requested: str
    obtained: str
    options: Mapping[str, str] = field(default_factory=dict, compare=False)


@functools.cache
def runtime() -> ModuleType:
    """Imports onnxruntime without the device discovery warnings it writes on hosts without a GPU."""
    with _quiet_stderr():
        return importlib.import_module("onnxruntime")


def available_providers() -> tuple[str, ...]:
    """ONNX Runtime's names of the providers built into the installed package, best first."""
    return tuple(runtime().get_available_providers())


@functools.cache
def chain(requested: str) -> tuple[str, ...]:
    """The providers to open a session with, best first, each known to work on this host; CPU is last.

    A missing CUDA or TensorRT is warned about once and stood in for by the next best.

    Args:
        requested: "auto", "cpu", "cuda", "tensorrt" or an ONNX Runtime name.

    Raises:
        ProviderError: The name is unknown, or a provider other than those is not in the installed package.
    """
    if requested == "auto":
        return (CUDA, CPU) if works(CUDA) else (CPU,)
    name = _full_name(requested)
    wanted = (TENSORRT, CUDA, CPU) if name == TENSORRT else (name, CPU) if name != CPU else (CPU,)
    obtained = tuple(p for p in wanted if p == CPU or works(p))
    if obtained[0] != name:
        warn_fallback(requested, obtained[0])
    return obtained


def device_of(provider: Provider) -> tuple[str, int]:
    """Where a provider's tensors live, as IO binding names it."""
    return ("cuda", 0) if provider.obtained in (CUDA, TENSORRT) else ("cpu", 0)


def warn_fallback(requested: str, obtained: str) -> None:
    """Says in one line that a provider asked for is not the one that runs, and what to do."""
    remedy = "run `onnxcollapse doctor` to see why"
    if requested in ("cuda", CUDA):
        remedy = "`pip install onnxcollapse[cuda]` and a recent NVIDIA driver are needed"
    elif requested in ("tensorrt", TENSORRT):
        remedy = "`pip install tensorrt onnxcollapse[cuda]` and a recent NVIDIA driver are needed"
    logger.warning("provider %r does not work here, using %s instead; %s", requested, obtained, remedy)


@functools.cache
def works(name: str) -> bool:
    """Whether a provider is built in and really runs a one-node model on this host."""
    if name not in available_providers():
        return False
    if name in (CUDA, TENSORRT):
        _preload()
    try:
        session = create(_probe_model(), runtime().SessionOptions(), (name,))
    except Exception:  # of any kind: ONNX Runtime raises RuntimeError, EPFail, ValueError ...
        logger.debug("provider %s does not work", name, exc_info=True)
        return False
    return session.get_providers()[0] == name


def create(model: bytes, options: SessionOptions, providers: tuple[str, ...]) -> InferenceSession:
    """Opens an InferenceSession quietly: no fall-back of its own, nothing printed.

    Args:
        model: A serialised ModelProto.
        options: SessionOptions.
        providers: ONNX Runtime's names, best first.

    Returns:
        The onnxruntime.InferenceSession.
    """
    ort = runtime()
    options.log_severity_level = FATAL
    entries = [(name, OPTIONS.get(name, {})) for name in providers]
    ort.set_default_logger_severity(FATAL)
    try:
        return ort.InferenceSession(model, options, providers=entries, enable_fallback=0)
    finally:
        ort.set_default_logger_severity(WARNING)


def _full_name(requested: str) -> str:
    name = SHORT_NAMES.get(requested, requested)
    if name in available_providers() or name in SHORT_NAMES.values():
        return name
    known = ", ".join(["auto", *SHORT_NAMES, *available_providers()])
    raise ProviderError(f"execution provider {requested!r} is not available; choose one of {known}")


def _preload() -> None:
    """Makes the CUDA libraries that pip installs beside onnxruntime-gpu loadable; prints nothing."""
    preload = getattr(runtime(), "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            preload()


def _probe_model() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Sends the process's stderr to nowhere: native code does not go through sys.stderr."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, AttributeError):  # no stderr to silence, as under pythonw
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
