# SPDX-License-Identifier: Apache-2.0
"""What follows in a model's interface and folder when layers are gone: cache numbers and config files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import onnx_ir as ir

from onnxcollapse.calibration.masks import cache_number, numbered
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit
from onnxcollapse.structure import Block, layers


def settle(original: Model, work: Model, gone: AbstractSet[str]) -> str | None:
    """Numbers caches anew without gaps and notes in `work` which of the original's layers are left.

    Until then caches keep their numbers, because data and the original's outputs go by them.

    Args:
        original: The user's model.
        work: What was made of it; edited.
        gone: Names of the tensors of whole layers that have left, where no caches tell it.

    Returns:
        What the user should know; None when all layers are there.
    """
    numbers = cache_layers(original)
    if numbers:
        before, left = numbers, cache_layers(work)
    else:
        run = max(layers(original.graph), key=len, default=[])
        before, left = list(range(len(run))), _left(run, gone)
    if left == before:
        return None
    count = f"{len(before) - len(left)} of {len(before)} layers are gone"
    try:
        if numbers:
            _settle_caches(work, numbers)
    except ModelError as problem:
        return f"{count}; caches keep their numbers and config files their counts: {problem}"
    known = original.layers_left or tuple(before)
    work.layers_before = original.layers_before or len(before)
    work.layers_left = tuple(known[before.index(number)] for number in left)
    note = f"{count}; config files in the model's folder follow"
    return f"{note}, and caches are numbered anew" if numbers else note


def _settle_caches(work: Model, numbers: Sequence[int]) -> None:
    if list(numbers) != list(range(len(numbers))):
        raise ModelError("the original's have gaps, as where not every layer has a cache")
    renumber(work)


def cache_layers(model: Model) -> list[int]:
    """Numbers of the layers that have a cache among the model's inputs or outputs, in order."""
    return sorted(_numbers(_interface(model)))


def renumber(model: Model) -> dict[int, int]:
    """Closes gaps in the numbers of caches, inputs and outputs alike; their order stays.

    Returns:
        New number by old.

    Raises:
        ModelError: A layer has a cache on one side only, or a new name is taken.
    """
    sides = [_numbers(values) for values in (model.graph.inputs, model.graph.outputs)]
    odd = sorted(sides[0] ^ sides[1])
    if sides[0] and sides[1] and odd:
        raise ModelError(
            f"layer {odd[0]} has a cache on one side of the model only; it cannot be numbered anew"
        )
    numbers = {old: new for new, old in enumerate(sorted(sides[0] | sides[1]))}
    moved = [
        (value, numbered(value.name or "", numbers[number]))
        for value in _interface(model)
        if (number := cache_number(value.name or "")) is not None and numbers[number] != number
    ]
    taken = edit.names_in(model.graph)
    taken -= {value.name for value, _ in moved}
    clash = next((name for _, name in moved if name in taken), None)
    if clash is not None:
        raise ModelError(f"a cache would be called '{clash}', as another tensor is; rename that")
    for value, _ in moved:  # names pass each other, so all are given up first
        value.name = f"{value.name}_before"
    for value, name in moved:
        value.name = name
    return numbers


def _interface(model: Model) -> list[ir.Value]:
    return [*model.graph.inputs, *model.graph.outputs]


def _numbers(values: Iterable[ir.Value]) -> set[int]:
    found = (cache_number(value.name or "") for value in values)
    return {number for number in found if number is not None}


def _left(run: Sequence[Block], gone: AbstractSet[str]) -> list[int]:
    """A layer is gone when most of what its nodes compute has left; what is narrowed or folded is still there."""
    left = []
    for number, block in enumerate(run):
        names = [value.name for node in block.nodes for value in node.outputs]
        if 2 * sum(name in gone for name in names) <= len(names):
            left.append(number)
    return left
