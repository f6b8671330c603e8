# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime sessions over a Model: weights borrowed, provider stated, outputs by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration import providers
from onnxcollapse.calibration.handover import Handover, hand_over
from onnxcollapse.calibration.providers import Provider
from onnxcollapse.errors import DataError, ModelError
from onnxcollapse.model import edit
from onnxcollapse.model.model import Model

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue, RunOptions, SessionOptions

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


@dataclass(frozen=True, eq=False)
class State:
    """A tensor that stays on the device from run to run: what an output is, an input is in the next run.

    Attributes:
        output: The output that gives its next value.
        initial: Its value before the first run; an operator that broadcasts makes it grow from [1, 1].
        kept: Whether reading it leaves it as it is; else it starts anew.
    """

    output: str
    initial: np.ndarray
    kept: bool = False


class Session:
    """A model ready to run.

    Attributes:
        provider: What it was asked to run on and what it runs on.
        inputs: Names of the inputs it needs.
        outputs: Names of the outputs it gives.
    """

    def __init__(
        self,
        handle: InferenceSession,
        provider: Provider,
        handover: Handover,
        states: Mapping[str, State] | None = None,
    ) -> None:
        self._handle = handle
        self._handover: Handover | None = handover  # borrowed weights have to outlive the handle
        self._states = dict(states or {})
        self._values: dict[str, Any] = {name: state.initial for name, state in self._states.items()}
        self.provider = provider
        self.inputs = tuple(i.name for i in handle.get_inputs() if i.name not in self._states)
        returned = {state.output: name for name, state in self._states.items()}
        self.outputs = tuple(o.name for o in handle.get_outputs() if o.name not in returned)
        self._order = [*self.outputs, *returned]
        self._optional = {i.name for i in handle.get_overridable_initializers()}
        self._device = providers.device_of(provider.requested, provider.obtained)
        # ONNX Runtime binds tensors of numbers only; a plain run on the CPU needs no binding.
        tensors = [*handle.get_inputs(), *handle.get_outputs()]
        bindable = all(t.type.startswith("tensor(") and t.type != "tensor(string)" for t in tensors)
        self._bound = bindable and (bool(self._states) or self._device[0] != "cpu")

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch.

        Args:
            feeds: Arrays by input name; names the model does not have are ignored.

        Returns:
            Every output but the states' by name. bf16 and fp8 outputs come as float32.

        Raises:
            DataError: An input is missing.
            ModelError: ONNX Runtime fails on this batch.
        """
        wanted = self._wanted(feeds)
        try:
            results = self._run_bound(wanted) if self._bound else self._run_plain(wanted)
        except Exception as error:  # ONNX Runtime has no common base class for its errors
            shapes = ", ".join(f"{n} {tuple(a.shape)}" for n, a in wanted.items())
            reason = first_line(error)
            raise ModelError(
                f"the model cannot run a batch of {shapes}: {reason}; check model and data"
            ) from error
        return dict(zip(self.outputs, results, strict=True))

    def prepared(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Puts a batch where the model runs and returns what runs it there, for timing.

        Nothing crosses between host and device in a call, which is over when the outputs are there; the states stay
        as they are.

        Args:
            feeds: Arrays by input name; names the model does not have are ignored.

        Raises:
            DataError: An input is missing.
        """
        wanted, handle = {**self._wanted(feeds), **self._values}, self._handle
        if not self._bound:
            return lambda: handle.run(self._order, wanted)
        binding, make = handle.io_binding(), providers.runtime().OrtValue.ortvalue_from_numpy
        for name, value in wanted.items():
            there = isinstance(value, np.ndarray)
            binding.bind_ortvalue_input(
                name, make(np.asarray(value, order="C"), *self._device) if there else value
            )
        for name in self._order:
            binding.bind_output(name, *self._device)
        return lambda: handle.run_with_iobinding(binding)

    def put(self, feeds: Mapping[str, np.ndarray]) -> dict[str, OrtValue]:
        """Puts arrays where the model runs; names it does not have are ignored."""
        make = providers.runtime().OrtValue.ortvalue_from_numpy
        return {
            name: make(np.asarray(array, order="C"), *self._device)
            for name, array in feeds.items()
            if name in self._optional or name in self.inputs
        }

    def run_there(self, values: Mapping[str, OrtValue]) -> dict[str, OrtValue]:
        """Runs on tensors that lie where the model runs, and leaves every output there.

        Args:
            values: By input name, from `put` or an earlier run.

        Returns:
            The outputs by name.
        """
        binding = self._handle.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, *self._device)
        self._handle.run_with_iobinding(binding)
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))

    def captured(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """As `prepared`, but what runs is a CUDA graph; the session has `enable_cuda_graph=1`.

        A graph replays addresses: inputs and outputs stay in the buffers that a first run, which is not captured, has
        been given. A session has one graph, of one size.

        Args:
            feeds: Arrays by input name.
        """
        handle, (plain, graph) = self._handle, map(_graph_options, (-1, 1))
        binding = handle.io_binding()
        for name, value in self.put(self._wanted(feeds)).items():
            binding.bind_ortvalue_input(name, value)
        for name in self._order:
            binding.bind_output(name, *self._device)
        handle.run_with_iobinding(binding, plain)
        for name, value in zip(self._order, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, value)
        return lambda: handle.run_with_iobinding(binding, graph)

    def read(self, *, restart: bool = False) -> dict[str, np.ndarray]:
        """Takes the states off the device, by the names of their inputs; those that are not kept start anew.

        Args:
            restart: Those that are kept start anew, too.
        """
        values = {
            name: value if isinstance(value, np.ndarray) else value.numpy()
            for name, value in self._values.items()
        }
        for name, state in self._states.items():
            if restart or not state.kept:
                self._values[name] = state.initial
        return values

    def _wanted(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What of the feeds the model takes."""
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise DataError(f"input {missing[0]!r} is not in the data; add an array of that name")
        return {n: a for n, a in feeds.items() if n in self._optional or n in self.inputs}

    def _run_plain(self, feeds: Mapping[str, np.ndarray]) -> list[Any]:
        results = self._handle.run(self._order, {**feeds, **self._values})
        self._keep_states(results[len(self.outputs) :])
        return results[: len(self.outputs)]

    def _run_bound(self, feeds: Mapping[str, np.ndarray]) -> list[Any]:
        """Runs with IO binding: only what is fed and what is asked for crosses between host and device."""
        binding = self._handle.io_binding()
        for name, value in {**feeds, **self._values}.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.asarray(value, order="C"))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name)
        for state in self._states.values():
            binding.bind_output(state.output, *self._device)
        self._handle.run_with_iobinding(binding)
        results = binding.get_outputs()
        self._keep_states(results[len(self.outputs) :])
        return [result.numpy() for result in results[: len(self.outputs)]]

    def _keep_states(self, values: Sequence[Any]) -> None:
        self._values = dict(zip(self._states, values, strict=True))

    def close(self) -> None:
        """Frees the session and lets go of the weights."""
        self._values = {}
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
    scratch = model.alone().clone()
    if outputs is not None:
        keep_outputs(scratch, outputs)
    return adopt(scratch, provider)


def adopt(scratch: Model, provider: str, states: Mapping[str, State] | None = None) -> Session:
    """Opens a session on a clone that nobody else uses (see open_session).

    Args:
        scratch: The clone.
        provider: See open_session.
        states: Tensors that stay on the device, by the names of their inputs.
    """
    _widen_outputs(scratch.graph)
    names = providers.chain(provider)
    handover = hand_over(scratch)
    try:
        handle = _create(handover.skeleton, handover.options, names, provider)
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        where = scratch.path or scratch.graph.name
        raise ModelError(f"ONNX Runtime cannot load {where}: {first_line(error)}") from error
    handover.release()
    return _opened(handle, names, provider, handover, states)


def _opened(
    handle: InferenceSession,
    names: tuple[str, ...],
    provider: str,
    handover: Handover,
    states: Mapping[str, State] | None = None,
) -> Session:
    """Says what the session really runs on."""
    obtained = handle.get_providers()[0]
    if obtained != names[0]:
        providers.warn_fallback(provider, obtained)
    options = providers.options_of(provider, obtained)
    return Session(handle, Provider(provider, obtained, options), handover, states)


def open_file(
    path: Path,
    provider: str = "auto",
    threads: int | None = None,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> Session:
    """Opens a session on a file as it is, with ONNX Runtime's own defaults: what a deployment does.

    Args:
        path: The .onnx file.
        provider: See open_session.
        threads: Threads that share one operator; None for what ONNX Runtime chooses.
        sizes: Free dimensions to fix, by symbol: what follows from shapes is then constant.

    Raises:
        ProviderError, OptionError, ModelError: See open_session.
    """

    def options() -> SessionOptions:
        made = providers.runtime().SessionOptions()
        made.intra_op_num_threads = threads or 0
        for symbol, size in sizes.items():
            made.add_free_dimension_override_by_name(symbol, size)
        return made

    names = providers.chain(provider)
    try:
        handle = _create(str(path), options, names, provider)
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        raise ModelError(f"ONNX Runtime cannot load {path}: {first_line(error)}") from error
    return _opened(handle, names, provider, Handover())


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


def _create(
    model: bytes | str, options: Callable[[], SessionOptions], names: tuple[str, ...], requested: str
) -> InferenceSession:
    try:
        return providers.create(model, options(), names, requested)
    except Exception:
        if names[0] != providers.TENSORRT:
            raise
        logger.debug("TensorRT refuses the model", exc_info=True)
    return providers.create(model, options(), names[1:], requested)


def _graph_options(number: int) -> RunOptions:
    """Run options that capture and replay the CUDA graph of a number; -1 is a plain run."""
    options = providers.runtime().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


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


def first_line(error: Exception) -> str:
    """The first line of what ONNX Runtime says, as far as it is passed on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:LINE] if lines else type(error).__name__
