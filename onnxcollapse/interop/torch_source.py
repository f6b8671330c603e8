# SPDX-License-Identifier: Apache-2.0
"""Exports a torch module that `pkg.mod:function` makes."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcollapse.errors import DataError, ModelError, OptionError
from onnxcollapse.interop.agreement import Run
from onnxcollapse.interop.draft import Draft
from onnxcollapse.interop.foreign import first_line, silenced
from onnxcollapse.objects import call_object, load_object

if TYPE_CHECKING:
    import torch

DYNAMO_FROM = 18
"""The first opset that torch's current exporter writes; the one before it writes those below."""

LARGE = 1_500_000_000
"""Bytes of weights from which on they go to a file of their own."""

DRAWS = 4
"""Random inputs that source and export are compared on."""

_AXIS = re.compile(r"(?P<name>.+)\.(?P<axis>\d+)=(?P<symbol>[A-Za-z_]\w*)")

Axes = Mapping[str, Mapping[int, str]]
Tensors = Mapping[str, "torch.Tensor"]


def draft(
    spec: str, folder: Path, *, opset: int | None, dtype: str | None, dynamic: Sequence[str], seed: int
) -> Draft:
    """Exports a module into a folder.

    Args:
        spec: `pkg.mod:function`; the function returns the module and its example inputs.
        folder: Where the model is written.
        opset: The opset; None for the exporter's own choice.
        dtype: fp32, fp16 or bf16; None for the module's own.
        dynamic: Axes of any size, as `name.axis=symbol`; none for axis 0 of every input, `none` for no axis.
        seed: Of the inputs to check the model on.

    Raises:
        DataError: The function fails or returns something else.
        OptionError: An axis is not one of an input's.
        ModelError: The module cannot run or cannot be exported.
    """
    module, inputs = _load(spec)
    axes = _axes(dynamic, inputs)
    sizes = _traced_sizes(axes, inputs)
    traced = _resized(inputs, axes, sizes)
    outputs = list(_run(spec, module, traced))
    path = folder / "model.onnx"
    _export(spec, *_cast(module, traced, dtype), outputs, path, opset=opset, axes=axes)
    return Draft(path, partial(_runs, spec, module, inputs, axes, sizes, seed))


def _load(spec: str) -> tuple[torch.nn.Module, Tensors]:
    """The module, ready for inference, and its example inputs by name."""
    import torch

    made = call_object(load_object(spec), spec)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module)):
        raise DataError(f"{spec}: gives a {type(made).__name__}; return (torch module, example inputs)")
    module, examples = made
    inputs = _named(spec, module, examples)
    wrong = [name for name, value in inputs.items() if not isinstance(value, torch.Tensor)]
    if wrong or not inputs:
        fact = f"example input {wrong[0]!r} is no tensor" if wrong else "there is no example input"
        raise DataError(f"{spec}: {fact}; give a tensor, a tuple of tensors or a dict by input name")
    return module.eval(), inputs


def _named(spec: str, module: torch.nn.Module, examples: object) -> dict[str, Any]:
    """The examples by the names of the parameters of `forward`."""
    signature = inspect.signature(module.forward)
    positional = examples if isinstance(examples, tuple | list) else (examples,)
    try:
        bound = signature.bind(**examples) if isinstance(examples, Mapping) else signature.bind(*positional)
    except TypeError as error:
        raise DataError(
            f"{spec}: the example inputs do not fit forward{signature}: {error}; correct them"
        ) from error
    kinds = {signature.parameters[name].kind for name in bound.arguments}
    if kinds - {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}:
        raise DataError(f"{spec}: forward{signature} does not name its inputs; give each a parameter")
    return dict(bound.arguments)


def _axes(dynamic: Sequence[str], inputs: Tensors) -> Axes:
    if not dynamic:
        return {name: {0: "batch"} for name, value in inputs.items() if value.ndim}
    axes: dict[str, dict[int, str]] = {}
    for item in dynamic if list(dynamic) != ["none"] else ():
        found = _AXIS.fullmatch(item)
        if found is None:
            raise OptionError(f"--dynamic {item}: is not name.axis=symbol, as input_ids.1=sequence")
        name, axis = found["name"], int(found["axis"])
        if name not in inputs or axis >= inputs[name].ndim:
            known = ", ".join(f"{key} {list(value.shape)}" for key, value in inputs.items())
            raise OptionError(f"--dynamic {item}: there is no such axis; the inputs are {known}")
        axes.setdefault(name, {})[axis] = found["symbol"]
    return axes


def _traced_sizes(axes: Axes, inputs: Tensors) -> dict[str, int]:
    """The example's size of each dynamic axis, 2 at least: exporters take a size of 1 for fixed."""
    sizes: dict[str, int] = {}
    for name, named in axes.items():
        for axis, symbol in named.items():
            sizes.setdefault(symbol, max(inputs[name].shape[axis], 2))
    return sizes


def _resized(inputs: Tensors, axes: Axes, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The inputs with their dynamic axes cut or repeated to the sizes of their symbols."""
    import torch

    resized = dict(inputs)
    for name, named in axes.items():
        for axis, symbol in named.items():
            rows = torch.arange(sizes[symbol]) % resized[name].shape[axis]
            resized[name] = resized[name].index_select(axis, rows)
    return resized


def _run(spec: str, module: torch.nn.Module, inputs: Tensors) -> dict[str, torch.Tensor]:
    """The module's outputs by name."""
    import torch

    try:
        with torch.no_grad():
            made = module(**{name: value.clone() for name, value in inputs.items()})  # it may write to them
    except Exception as error:  # the user's code: anything may come
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise ModelError(
            f"{spec}: the module cannot run {shapes}: {first_line(error)}; correct it, or name with --dynamic only "
            "axes that may have any size"
        ) from error
    return _flat(spec, made)


def _flat(spec: str, made: object, name: str = "") -> dict[str, torch.Tensor]:
    """Tensors by name: keys of dicts, `output` for one alone and `output_0`, ... for several."""
    import torch

    if isinstance(made, torch.Tensor):
        return {name or "output": made}
    if isinstance(made, Mapping):
        parts = [(f"{name}.{key}" if name else str(key), value) for key, value in made.items()]
    elif isinstance(made, tuple | list):
        parts = [(f"{name}.{i}" if name else f"output_{i}", value) for i, value in enumerate(made)]
    elif made is None:
        return {}
    else:
        raise ModelError(
            f"{spec}: the module gives a {type(made).__name__}; return tensors, tuples or dicts of them"
        )
    return {key: tensor for part, value in parts for key, tensor in _flat(spec, value, part).items()}


def _cast(module: torch.nn.Module, inputs: Tensors, dtype: str | None) -> tuple[torch.nn.Module, Tensors]:
    """A copy of the module and its inputs in another type; both as they are for None."""
    import torch

    if dtype is None:
        return module, inputs
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    cast = {name: value.to(wanted) if value.is_floating_point() else value for name, value in inputs.items()}
    return copy.deepcopy(module).to(wanted), cast


def _export(
    spec: str,
    module: torch.nn.Module,
    inputs: Tensors,
    outputs: Sequence[str],
    path: Path,
    *,
    opset: int | None,
    axes: Axes,
) -> None:
    import torch

    weights = module.state_dict().values()
    options: dict[str, Any]
    if opset is None or opset >= DYNAMO_FROM:
        options = {
            "dynamo": True,
            "dynamic_shapes": {name: dict(axes.get(name, {})) for name in inputs},
            "external_data": sum(value.nbytes for value in weights) > LARGE,
            "optimize": all(
                value.dtype is not torch.bfloat16 for value in weights
            ),  # it would make fp32 of some
            "verbose": False,
        }
    else:
        options = {"dynamo": False, "dynamic_axes": {name: dict(named) for name, named in axes.items()}}
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": list(outputs)}
    try:
        with silenced(), torch.no_grad():
            torch.onnx.export(
                module, (), str(path), kwargs=dict(inputs), opset_version=opset, **names, **options
            )
    except Exception as error:  # exporters raise anything
        cause = first_line(error.__cause__ or error)
        raise ModelError(f"{spec}: torch cannot export the module: {cause}; -v shows more") from error


def _runs(
    spec: str, module: torch.nn.Module, inputs: Tensors, axes: Axes, sizes: Mapping[str, int], seed: int
) -> Iterator[Run]:
    """Runs on random inputs whose dynamic axes have other sizes than those that were traced."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    other = {symbol: _other_size(size) for symbol, size in sizes.items()}
    examples = _resized(inputs, axes, other)
    for _ in range(DRAWS):
        drawn = {name: _random(value, generator) for name, value in examples.items()}
        yield Run(_arrays(drawn), _arrays(_run(spec, module, drawn)))


def _other_size(size: int) -> int:
    """Half the size where it can be halved, so that what divided it still does; else one more."""
    return size // 2 if size >= 4 and size % 2 == 0 else size + 1


def _random(example: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers of the example's mean and deviation, or integers between its smallest and largest.

    Of a constant, as ones and zeros are, numbers of mean 0 and deviation 1.
    """
    import torch

    if example.numel() == 0:
        return example
    if example.is_floating_point():
        wide = example.float()
        spread, center = float(wide.std(correction=0)), float(wide.mean())
        if spread == 0:
            spread, center = 1.0, 0.0
        return (torch.randn(example.shape, generator=generator) * spread + center).to(example.dtype)
    whole = example.long()
    drawn = torch.randint(int(whole.min()), int(whole.max()) + 1, example.shape, generator=generator)
    return drawn.to(example.dtype)


def _arrays(tensors: Tensors) -> dict[str, Any]:
    import torch

    return {
        name: (value.float() if value.dtype is torch.bfloat16 else value).detach().numpy()
        for name, value in tensors.items()
    }
