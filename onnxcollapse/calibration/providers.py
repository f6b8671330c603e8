# SPDX-License-Identifier: Apache-2.0
"""Execution providers: which one was asked for, which one really runs, and ONNX Runtime's noise kept out."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

from onnxcollapse.calibration.sizes import parse_size
from onnxcollapse.errors import OptionError, ProviderError
from onnxcollapse.quiet import STDERR, quiet

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

logger = logging.getLogger(__name__)

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
SHORT_NAMES = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
SPEC = "NAME[:DEVICE][,option=value...]"
NUMBERED = {
    CUDA, TENSORRT, "NvTensorRTRTXExecutionProvider", "ROCMExecutionProvider", "MIGraphXExecutionProvider",
    "DmlExecutionProvider", "CANNExecutionProvider",
}  # fmt: skip
"""Those whose devices have numbers, given as the option `device_id`."""

SIZES = {"gpu_mem_limit", "migraphx_mem_limit", "npu_mem_limit", "trt_max_workspace_size"}
"""Options in bytes, which may be written as 4GB."""

FATAL = 4  # of ONNX Runtime's log levels; its exceptions say the same again
WARNING = 2  # its default level
LINE = 200
"""Characters of ONNX Runtime's messages that are passed on."""

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


@dataclass(frozen=True)
class Spec:
    """What ``--provider`` asks for.

    Attributes:
        name: "auto" or ONNX Runtime's name.
        device: Number of the device; None where none was given.
        options: The user's own options, as ONNX Runtime takes them.
    """

    name: str
    device: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def options_for(self, provider: str) -> dict[str, str]:
        """The options in force for a provider of the chain: the package's own, overridden by the user's.

        The device is that of all; options are those of the provider that was named.
        """
        device = {} if self.device is None or provider not in NUMBERED else {"device_id": str(self.device)}
        return {**OPTIONS.get(provider, {}), **device, **(self.options if provider == self.name else {})}


@functools.cache
def runtime() -> ModuleType:
    """Imports onnxruntime without the device discovery warnings it writes on hosts without a GPU."""
    try:
        with quiet(STDERR):
            return importlib.import_module("onnxruntime")
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C while native code was being set up
            raise error.__cause__ from None
        raise


def available_providers() -> tuple[str, ...]:
    """ONNX Runtime's names of the providers built into the installed package, best first."""
    return tuple(runtime().get_available_providers())


@functools.cache
def parse(requested: str) -> Spec:
    """Reads ``NAME[:DEVICE][,option=value...]``, as ``cuda:1,gpu_mem_limit=4GB``.

    Raises:
        ProviderError: The name is unknown.
        OptionError: Device or options are not of that form, or the provider takes none.
    """
    head, *pairs = requested.split(",")
    short, colon, device = head.partition(":")
    name = "auto" if short == "auto" else _full_name(short)
    options = _read_options(requested, pairs)
    if name in NUMBERED and "device_id" in options:
        if colon:
            raise OptionError(f"--provider {requested}: gives the device twice; leave 'device_id' out")
        colon, device = ":", options.pop("device_id")
    if name in ("auto", CPU) and (colon or options):
        raise OptionError(
            f"--provider {requested}: {short} takes neither a device nor options; name another provider"
        )
    if not colon:
        return Spec(name, None, options)
    if name not in NUMBERED:
        raise OptionError(f"--provider {requested}: devices of {short} have no numbers; give its own option")
    if not (device.isascii() and device.isdigit()):
        raise OptionError(f"--provider {requested}: device {device!r} is no number; write it as {short}:0")
    return Spec(name, int(device), options)


@functools.cache
def chain(requested: str) -> tuple[str, ...]:
    """The providers to open a session with, best first, each known to work on this host; CPU is last.

    A missing CUDA or TensorRT is warned about once and stood in for by the next best.

    Args:
        requested: "auto", "cpu", "cuda", "tensorrt" or an ONNX Runtime name, with device and options (see parse).

    Raises:
        ProviderError: The name is unknown, a provider other than those is not in the installed package, or ONNX
            Runtime refuses device or options of one that works.
        OptionError: Device or options cannot be read.
    """
    spec = parse(requested)
    name = spec.name
    if name == "auto":
        return (CUDA, CPU) if works(CUDA) else (CPU,)
    wanted = (TENSORRT, CUDA, CPU) if name == TENSORRT else (name, CPU) if name != CPU else (CPU,)
    obtained = tuple(p for p in wanted if p == CPU or works(p))
    if obtained[0] != name:
        _warn(requested, obtained[0])
    if spec.device is not None or spec.options:
        _try_options(requested, spec, obtained[0])
    return obtained


def options_of(requested: str, obtained: str) -> dict[str, str]:
    """The options in force where `requested` was asked for and `obtained` runs."""
    return parse(requested).options_for(obtained)


def device_of(requested: str, obtained: str) -> tuple[str, int]:
    """ONNX Runtime's name and number of the device to bind inputs and outputs to.

    Args:
        requested: What was asked for.
        obtained: The provider that really runs.

    Returns:
        ("cuda", number) where CUDA or TensorRT runs, else ("cpu", 0), from which every provider copies.
    """
    if obtained not in (CUDA, TENSORRT):
        return "cpu", 0
    return "cuda", parse(requested).device or 0


@functools.cache
def warn_fallback(requested: str, obtained: str) -> None:
    """Says once, in one line, that a provider asked for is not the one that runs, and what to do."""
    _warn(requested, obtained)


@functools.cache
def works(name: str) -> bool:
    """Whether a provider is built in and really runs a one-node model on this host."""
    if name not in available_providers():
        return False
    if name in (CUDA, TENSORRT):
        _preload()
    try:
        session = _open(_probe_model(), runtime().SessionOptions(), [(name, OPTIONS.get(name, {}))])
    except Exception:  # of any kind: ONNX Runtime raises RuntimeError, EPFail, ValueError ...
        logger.debug("provider %s does not work", name, exc_info=True)
        return False
    return session.get_providers()[0] == name


def create(
    model: bytes | str, options: SessionOptions, providers: tuple[str, ...], requested: str
) -> InferenceSession:
    """Opens an InferenceSession quietly: no fall-back of its own, nothing printed.

    Args:
        model: A serialised ModelProto, or the path of a file.
        options: SessionOptions.
        providers: ONNX Runtime's names, best first.
        requested: What was asked for: device and options come from it.

    Returns:
        The onnxruntime.InferenceSession.
    """
    return _open(model, options, [(name, options_of(requested, name)) for name in providers])


def _open(
    model: bytes | str, options: SessionOptions, entries: Sequence[tuple[str, Mapping[str, str]]]
) -> InferenceSession:
    ort = runtime()
    options.log_severity_level = FATAL
    ort.set_default_logger_severity(FATAL)
    try:
        return ort.InferenceSession(model, options, providers=list(entries), enable_fallback=0)
    finally:
        ort.set_default_logger_severity(WARNING)


def _read_options(requested: str, pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (equals and key and value):
            raise OptionError(f"--provider {requested}: {pair!r} is no option=value; write {SPEC}")
        if key in found:
            raise OptionError(f"--provider {requested}: gives {key!r} twice; leave one out")
        found[key] = str(parse_size(value, f"--provider option {key}")) if key in SIZES else value
    return found


def _try_options(requested: str, spec: Spec, name: str) -> None:
    """Opens the one-node model with device and options, so that what is wrong with them is not said of a model."""
    if name == CPU:
        return
    try:
        session = _open(_probe_model(), runtime().SessionOptions(), [(name, spec.options_for(name))])
        reason = "" if session.get_providers()[0] == name else "it runs on the CPU instead"
    except Exception as error:  # of any kind, as in works
        logger.debug("provider %s is refused", requested, exc_info=True)
        reason = _reason(error)
    if reason:
        raise ProviderError(
            f"ONNX Runtime refuses --provider {requested}: {reason}; correct its device or options"
        )


def _reason(error: Exception) -> str:
    """ONNX Runtime's own words, without the file, function and condition that it puts before them."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.split(r" was (?:true|false)\. ", line)[-1][-LINE:]


def _warn(requested: str, obtained: str) -> None:
    remedy = "run `onnxcollapse doctor` to see why"
    name = parse(requested).name
    if name == CUDA:
        remedy = "`pip install onnxcollapse[cuda]` and a recent NVIDIA driver are needed"
    elif name == TENSORRT:
        remedy = "`pip install tensorrt onnxcollapse[cuda]` and a recent NVIDIA driver are needed"
    logger.warning("provider %r does not work here, using %s instead; %s", requested, obtained, remedy)


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
