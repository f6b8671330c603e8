# SPDX-License-Identifier: Apache-2.0
"""Gives a model that went through onnx-graphsurgeon back what was lost on the way.

A three-way merge of protos: where the export of the edited graph equals the export of the untouched one, the
script changed nothing, and the original counts; what graphsurgeon drops, such as metadata, overloads, overridable
inputs and attributes of types unknown to it, is so restored by the name of the thing that it belongs to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import onnx
from google.protobuf.message import Message

T = TypeVar("T", bound=Hashable)

NOTES = ("doc_string", "metadata_props", "producer_name", "producer_version")
"""Fields that no script means to clear; a copy of a graph lacks them."""


def restore(original: onnx.ModelProto, before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Restores what graphsurgeon does not carry, and what it writes differently.

    Args:
        original: The model before it crossed over.
        before: What graphsurgeon exports of the untouched graph.
        after: What it exports of the edited graph; edited in place.

    Raises:
        ValueError: Functions with overloads were added or removed, which graphsurgeon cannot tell apart.
    """
    _check_overloads(original, before, after)
    known = {info.name for info in [*before.graph.input, *after.graph.input]}
    hidden = [info.name for info in original.graph.input if info.name not in known]
    _merge(original, before, after)
    _restore_defaults(hidden, original.graph, after.graph)
    _drop_copies(after.graph, frozenset())


def _check_overloads(original: onnx.ModelProto, before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    counts = [Counter((f.domain, f.name) for f in model.functions) for model in (before, after)]
    for function in original.functions:
        key = (function.domain, function.name)
        if function.overload and counts[0][key] != counts[1][key]:
            raise ValueError(
                f"function {key[0]}.{key[1]} has overloads, which graphsurgeon cannot tell apart; keep all of them"
            )


# Messages and fields


def _merge(old: Message, before: Message, after: Message) -> None:
    if before == after:
        after.CopyFrom(old)
        return
    for field in old.DESCRIPTOR.fields:
        if _is_open(field.name, before, after):
            _merge_field(field, old, before, after)


def _is_open(name: str, before: Any, after: Any) -> bool:
    """Whether a field still means the same: attributes of a node do not when its operator was replaced."""
    if after.DESCRIPTOR.full_name != "onnx.NodeProto" or name not in ("attribute", "overload"):
        return True
    return (before.op_type, before.domain) == (after.op_type, after.domain)


def _merge_field(field: Any, old: Message, before: Message, after: Message) -> None:
    name = field.name
    untouched = _get(field, before) == _get(field, after)
    if untouched or (name in NOTES and not getattr(after, name)):
        after.ClearField(name)
        _copy(field, old, after)
    elif field.message_type is not None and not field.has_presence:
        identify = IDENTITIES.get(field.message_type.full_name)
        if identify is not None:
            items = _merge_list(getattr(old, name), getattr(before, name), getattr(after, name), identify)
            after.ClearField(name)
            getattr(after, name).extend(items)
    elif field.message_type is not None and all(message.HasField(name) for message in (old, before, after)):
        _merge(getattr(old, name), getattr(before, name), getattr(after, name))


def _get(field: Any, message: Message) -> Any:
    """The value of a field, None when it is absent."""
    if not field.has_presence:
        return list(getattr(message, field.name))
    return getattr(message, field.name) if message.HasField(field.name) else None


def _copy(field: Any, source: Message, target: Message) -> None:
    value = getattr(source, field.name)
    if not field.has_presence:
        getattr(target, field.name).extend(value)
    elif source.HasField(field.name):
        if field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


# Lists of things that have names

Identify = Callable[[Any], tuple[Hashable, ...]]


def _node(node: onnx.NodeProto) -> tuple[Hashable, ...]:
    output = next(filter(None, node.output), None)
    named = ((node.name, output), ("name", node.name)) if node.name else ()
    return (*named, ("output", output))


IDENTITIES: dict[str, Identify] = {
    "onnx.NodeProto": _node,
    "onnx.TensorProto": lambda tensor: (tensor.name,),
    "onnx.SparseTensorProto": lambda tensor: (tensor.values.name,),
    "onnx.ValueInfoProto": lambda info: (info.name,),
    "onnx.AttributeProto": lambda attribute: (attribute.name,),
    "onnx.FunctionProto": lambda function: (function.SerializeToString(), (function.domain, function.name)),
    "onnx.OperatorSetIdProto": lambda imported: (imported.domain,),
    "onnx.StringStringEntryProto": lambda entry: (entry.key,),
    "onnx.TensorAnnotation": lambda annotation: (annotation.tensor_name,),
}
"""By what the items of a list are known again; the first that fits counts."""


def _merge_list(
    old: Sequence[Any], before: Sequence[Any], after: Sequence[Any], identify: Identify
) -> list[Message]:
    """Merges item by item; what only graphsurgeon wrote goes, and what it dropped returns to its place."""
    to_before, to_old = _pair(after, before, identify), _pair(before, old, identify)
    items: dict[tuple[str, int], Message] = {}
    for index, item in enumerate(after):
        partner = to_before.get(index)
        if partner is None:
            items["new", index] = item
        elif partner in to_old:
            _merge(old[to_old[partner]], before[partner], item)
            items["old", to_old[partner]] = item
    order = list(items)
    taken = set(_pair(old, after, identify)) | set(to_old.values())
    items.update({("old", index): item for index, item in enumerate(old) if index not in taken})
    first = sorted(key for key in items if key[0] == "old")
    kept = [to_before[index] for index in range(len(after)) if index in to_before]
    sequences = (first, order) if kept == sorted(kept) else (order, first)
    return [items[key] for key in _weave(*sequences)]


def _pair(items: Sequence[Any], others: Sequence[Any], identify: Identify) -> dict[int, int]:
    """Maps the index of each item to that of the other that it is; each other is given away once."""
    pairs: dict[int, int] = {}
    given: set[int] = set()
    keys, other_keys = [identify(item) for item in items], [identify(other) for other in others]
    for level in range(max(map(len, keys), default=0)):
        free: dict[Hashable, list[int]] = {}
        for index, names in enumerate(other_keys):
            if index not in given:
                for name in names:
                    free.setdefault(name, []).insert(0, index)
        for index, names in enumerate(keys):
            waiting = free.get(names[level], []) if index not in pairs and level < len(names) else []
            while waiting and waiting[-1] in given:
                waiting.pop()
            if waiting:
                pairs[index] = waiting.pop()
                given.add(pairs[index])
    return pairs


def _weave(base: Sequence[T], other: Iterable[T]) -> list[T]:
    """Puts what only `other` has into `base`, each behind the item that it follows in `other`."""
    woven, known, place = list(base), set(base), 0
    for item in other:
        if item in known:
            place = woven.index(item, 0) + 1
        else:
            woven.insert(place, item)
            place += 1
    return woven


# Graphs


def _restore_defaults(hidden: Iterable[str], old: onnx.GraphProto, after: onnx.GraphProto) -> None:
    """Gives inputs with a default, which graphsurgeon shows as constants, their default back where it went."""
    defaults = {tensor.name: tensor for tensor in old.initializer}
    held = {tensor.name for tensor in after.initializer}
    made = {name for node in after.node for name in node.output}
    for name in hidden:
        if name in made:  # the script computes it now
            kept = [info for info in after.input if info.name != name]
            after.ClearField("input")
            after.input.extend(kept)
        elif name not in held and name in defaults:
            after.initializer.append(defaults[name])


def _drop_copies(graph: onnx.GraphProto, outer: frozenset[str]) -> None:
    """Takes out the copies that graphsurgeon makes of outer initializers which a subgraph reads."""
    own = [tensor for tensor in graph.initializer if tensor.name not in outer]
    if len(own) < len(graph.initializer):
        graph.ClearField("initializer")
        graph.initializer.extend(own)
    names = outer.union(
        (tensor.name for tensor in own),
        (info.name for info in graph.input),
        (name for node in graph.node for name in node.output),
    )
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                _drop_copies(inner, names)
