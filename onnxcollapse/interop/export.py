# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models and torch modules become ONNX, and are written only if they compute what their source does.

source -> exporter -> files beside the target -> check against the source -> target
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcollapse.errors import ExportError, ModelError, OptionError
from onnxcollapse.interop import hugging_face, torch_source
from onnxcollapse.interop.agreement import Agreement, Difference, check
from onnxcollapse.interop.draft import Draft
from onnxcollapse.interop.foreign import need
from onnxcollapse.model import Model, files, size, walk
from onnxcollapse.objects import is_object

logger = logging.getLogger(__name__)

TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2}
"""Largest relative L2 distance of any output, by the model's type."""

STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""What torch's exporter notes down with each node."""

_TYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        opset: The opset; None for what the exporter advises.
        dtype: fp32, fp16 or bf16; None for fp32, or a torch module's own.
        task: Of a Hugging Face model: a task of optimum's, or "auto".
        cache: Of a decoder: whether it has a KV cache; None for what the task says.
        dynamic: Of a torch module: axes of any size, as `name.axis=symbol`; none for axis 0 of every input.
        tolerance: Largest relative L2 distance of any output; None for that of the type.
        allow_difference: Write the model even when the check fails.
        seed: Of the inputs that both are run on.
        provider: Where the exported model runs.
    """

    opset: int | None = None
    dtype: str | None = None
    task: str = hugging_face.AUTO
    cache: bool | None = None
    dynamic: tuple[str, ...] = ()
    tolerance: float | None = None
    allow_difference: bool = False
    seed: int = 0
    provider: str = "auto"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        source: Where it came from.
        model: The file or folder written.
        opset: Its opset.
        dtype: The type of most of its weights.
        task: What it was exported for; None for a torch module.
        seconds: How long export and check took.
        bytes: Bytes of its constants.
        params: Its parameters.
        outputs: How far each output is from the source's.
    """

    source: str
    model: str
    opset: int
    dtype: str
    task: str | None
    seconds: float
    bytes: int
    params: int
    outputs: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


def export(source: str, target: str | Path, options: ExportOptions | None = None) -> Exported:
    """Exports a source and checks the model against it; nothing is written when that fails.

    Args:
        source: A Hugging Face folder or id, or `pkg.mod:function` that returns a torch module and its example inputs.
        target: A folder for a Hugging Face source, an .onnx file for a torch module.
        options: How.

    Raises:
        ExportError: The model differs from its source.
        OptionError: An option does not suit the source, or a package is missing.
        DataError: The function of a torch module fails.
        ModelError: The source cannot be read or exported, or the target not be written.
    """
    options, target = options or ExportOptions(), Path(target)
    _check(source, options)
    if is_torch(source):
        need("torch", "onnxscript")
        return _export_file(source, target, options)
    need("torch", "transformers", "optimum.exporters.onnx")
    return _export_folder(source, target, options)


def is_torch(source: str) -> bool:
    """Whether a source is a torch module rather than a Hugging Face model."""
    return is_object(source) and not Path(source).exists()


def _check(source: str, options: ExportOptions) -> None:
    if is_torch(source):
        if options.task != hugging_face.AUTO or options.cache is not None:
            raise OptionError(f"{source} is a torch module; --task and --cache are for Hugging Face models")
        return
    if options.dynamic:
        raise OptionError(f"{source} is a Hugging Face model, its axes are optimum's; leave out --dynamic")
    path = Path(source)
    if path.is_file() or (not path.exists() and _looks_like_a_path(source)):
        fact = "is a file" if path.exists() else "does not exist"
        raise ModelError(f"{source} {fact}; give a Hugging Face folder or id, or pkg.mod:function")


def _looks_like_a_path(source: str) -> bool:
    return not source or source[0] in "./~\\" or source.count("/") > 1 or source.endswith("/")


def _export_file(source: str, target: Path, options: ExportOptions) -> Exported:
    began = time.perf_counter()
    with files.staging(target) as folder:
        draft = torch_source.draft(
            source,
            folder,
            opset=options.opset,
            dtype=options.dtype,
            dynamic=options.dynamic,
            seed=options.seed,
        )
        model = Model.load(draft.model)
        _forget_machine(model)
        found = _agreement(source, draft, model, options)
        model.save(target)
        return _summary(source, target, draft, model, found, began)


def _forget_machine(model: Model) -> None:
    """Takes out torch's stack traces, which name folders of this machine."""
    for graph in walk.graphs(model.ir):
        for node in graph:
            node.metadata_props.pop(STACK_TRACE, None)


def _export_folder(source: str, target: Path, options: ExportOptions) -> Exported:
    began = time.perf_counter()
    with files.existing(target), files.staging(target / "model.onnx") as folder:
        draft = hugging_face.draft(
            source,
            folder,
            opset=options.opset,
            dtype=options.dtype or "fp32",
            task=options.task,
            cache=options.cache,
            seed=options.seed,
        )
        model = Model.load(draft.model)
        found = _agreement(source, draft, model, options)
        summary = _summary(source, target, draft, model, found, began)
        for other in draft.beside:
            summary = _with(summary, source, other, options)
        files.commit(sorted(folder.iterdir()), target)
        return summary


def _agreement(source: str, draft: Draft, model: Model, options: ExportOptions) -> Agreement:
    opset = model.ir.graph.opset_imports[""]
    if options.opset not in (None, opset):
        raise ModelError(
            f"{source}: the exporter writes opset {opset} instead of {options.opset}; ask for another"
        )
    tolerance = options.tolerance if options.tolerance is not None else TOLERANCES[dtype_of(model)]
    found = check(model, draft.runs(), tolerance, options.provider)
    if found.problem is not None:
        if not options.allow_difference:
            raise ExportError(
                f"{source}: {found.problem}; nothing was written (--allow-difference writes it all the same)"
            )
        logger.warning("%s: %s; written all the same", source, found.problem)
    return found


def _summary(
    source: str, target: Path, draft: Draft, model: Model, found: Agreement, began: float
) -> Exported:
    counted = size(model)
    return Exported(
        source=source,
        model=str(target),
        opset=model.ir.graph.opset_imports[""],
        dtype=dtype_of(model),
        task=draft.task,
        seconds=time.perf_counter() - began,
        bytes=counted.bytes,
        params=counted.params,
        outputs=found.outputs,
    )


def _with(summary: Exported, source: str, draft: Draft, options: ExportOptions) -> Exported:
    """Checks what was exported beside the model and counts it in."""
    model = Model.load(draft.model)
    found, counted = _agreement(source, draft, model, options), size(model)
    return replace(
        summary,
        bytes=summary.bytes + counted.bytes,
        params=summary.params + counted.params,
        outputs={**found.outputs, **summary.outputs},
    )


def dtype_of(model: Model) -> str:
    """The type of most of a model's weights, fp32 where it has none."""
    totals: dict[str, int] = {"fp32": 0}
    for value in model.graph.initializers.values():
        name = _TYPES.get(value.dtype) if value.dtype is not None else None
        if name is not None and value.const_value is not None:
            totals[name] = totals.get(name, 0) + value.const_value.size
    return max(totals, key=lambda name: totals[name])
