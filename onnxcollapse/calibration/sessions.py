# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime sessions over a Model: weights borrowed, provider stated, outputs by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration import providers
from onnxcollapse.calibration.handover import Handover, hand_over
from onnxcollapse.calibration.providers import Provider
from onnxcollapse.errors import DataError, ModelError
from onnxcollapse.model import edit
from onnxcollapse.model.model import Model

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

logger = logging.getLogger(__name__)

LINE = 300
"""Characters of ONNX Runtime's messages that are passed on."""

# ONNX Runtime gives numpy no such arrays, so these leave the graph as float32.
UNREADABLE = {
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
}


class Session:
    """A model ready to run.

    Attributes:
        provider: What it was asked to run on and what it runs on.
        inputs: Names of the inputs it needs.
        outputs: Names of the outputs it gives.
    """

    def __init__(self, handle: InferenceSession, provider: Provider, handover: Handover) -> None:
        self._handle = handle
        self._handover: Handover | None = handover  # borrowed weights have to outlive the handle
        self.provider = provider
        self.inputs = tuple(i.name for i in handle.get_inputs())
        self.outputs = tuple(o.name for o in handle.get_outputs())
        self._optional = {i.name for i in handle.get_overridable_initializers()}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch.

        Args:
            feeds: Arrays by input name; names the model does not have are ignored.

        Returns:
            Every output by name. bf16 and fp8 outputs come as float32.

        Raises:
            DataError: An input is missing.
            ModelError: ONNX Runtime fails on this batch.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise DataError(f"input {missing[0]!r} is not in the data; add an array of that name")
        wanted = {n: a for n, a in feeds.items() if n in self._optional or n in self.inputs}
        try:
            results = self._handle.run(None, wanted)
        except Exception as error:  # ONNX Runtime has no common base class for its errors
            shapes = ", ".join(f"{n} {tuple(a.shape)}" for n, a in wanted.items())
            reason = _first_line(error)
            raise ModelError(
                f"the model cannot run a batch of {shapes}: {reason}; check model and data"
            ) from error
        return dict(zip(self.outputs, results, strict=True))

    def close(self) -> None:
        """Frees the session and lets go of the weights."""
        self._handle = None
        self._handover = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_session(model: Model, *, provider: str = "auto", outputs: Sequence[str] | None = None) -> Session:
    """Opens a session on a model, which stays as it is.

    Args:
        model: The model. Its weights are handed over by reference.
        provider: "auto" (CUDA if it works, else CPU), "cpu", "cuda", "tensorrt" or an ONNX Runtime name; with a
            device and options as "cuda:1,gpu_mem_limit=4GB".
        outputs: The values to compute, also inner ones of the main graph; what they do not need is left out.
            None for the model's outputs.

    Returns:
        The session.

    Raises:
        ProviderError: The provider's name is unknown, or ONNX Runtime refuses its device or options.
        OptionError: The provider's device or options cannot be read.
        ModelError: ONNX Runtime cannot load the model, or an output does not exist.
    """
    scratch = model.clone()
    if outputs is not None:
        keep_outputs(scratch, outputs)
    return adopt(scratch, provider)


def adopt(scratch: Model, provider: str) -> Session:
    """Opens a session on a clone that nobody else uses (see open_session)."""
    _widen_outputs(scratch.graph)
    names = providers.chain(provider)
    handover = hand_over(scratch)
    try:
        handle = _create(handover, names, provider)
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        where = scratch.path or scratch.graph.name
        raise ModelError(f"ONNX Runtime cannot load {where}: {_first_line(error)}") from error
    handover.release()
    obtained = handle.get_providers()[0]
    if obtained != names[0]:
        providers.warn_fallback(provider, obtained)
    return Session(handle, Provider(provider, obtained, providers.options_of(provider, obtained)), handover)


def keep_outputs(scratch: Model, names: Sequence[str]) -> None:
    """Makes exactly these values the outputs of a clone and removes what they do not need."""
    values = main_values(scratch.graph)
    unknown = [name for name in names if name not in values]
    if unknown:
        raise ModelError(
            f"value {unknown[0]!r} is not in the main graph of {scratch.graph.name!r}; name another"
        )
    scratch.graph.outputs[:] = [values[name] for name in dict.fromkeys(names)]
    edit.prune(scratch)


def main_values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every value of a graph by name, those of its subgraphs excluded."""
    found = {value.name or "": value for value in [*graph.initializers.values(), *graph.inputs]}
    for node in graph:
        found.update((value.name or "", value) for value in node.outputs)
    found.pop("", None)
    return found


def _create(handover: Handover, names: tuple[str, ...], requested: str) -> InferenceSession:
    try:
        return providers.create(handover.skeleton, handover.options(), names, requested)
    except Exception:
        if names[0] != providers.TENSORRT:
            raise
        logger.debug("TensorRT refuses the model", exc_info=True)
    return providers.create(handover.skeleton, handover.options(), names[1:], requested)


def _widen_outputs(graph: ir.Graph) -> None:
    """Casts outputs that numpy cannot hold to float32, keeping their names."""
    for index, value in enumerate(graph.outputs):
        if value.dtype not in UNREADABLE or value.is_graph_input() or value.is_initializer():
            continue
        name = value.name
        value.name = edit.unique_name(graph, f"{name}_narrow")
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].name = name
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:LINE] if lines else type(error).__name__
