# SPDX-License-Identifier: Apache-2.0
"""Finds passes by name through entry points, so that a third party's pass is registered as a built-in one is."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from onnxcollapse.errors import OptionError
from onnxcollapse.rewriting.passes import Pass, build, describe_options, takes_integer

GROUP = "onnxcollapse.passes"

_NOTHING: Mapping[str, int] = MappingProxyType({})

STORED = ("params", "bytes")
"""Measures that passes which only save what is stored lower."""


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in sorted(importlib.metadata.entry_points(group=GROUP))}


def names() -> list[str]:
    """Returns the names of all registered passes, sorted."""
    return list(_entry_points())


def load(name: str) -> type[Pass]:
    """Imports a registered pass.

    Raises:
        OptionError: No such pass, or it cannot be imported or is no pass.
    """
    point = _entry_points().get(name)
    if point is None:
        raise OptionError(f"unknown pass '{name}'; registered are: {', '.join(names()) or 'none'}")
    try:
        loaded = point.load()
    except Exception as error:
        raise OptionError(
            f"pass '{name}' ({point.value}) cannot be imported: {error}; mend or remove its package"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise OptionError(f"pass '{name}' ({point.value}) is no subclass of onnxcollapse.Pass")
    if loaded.name != name:
        raise OptionError(
            f"pass '{name}' ({point.value}) calls itself '{loaded.name}'; give its class name = '{name}'"
        )
    return loaded


def parse(spec: str, fallback: Mapping[str, int] = _NOTHING) -> Pass:
    """Makes a pass from ``name[:option=value,...]``.

    Args:
        spec: The text.
        fallback: Values of options that the text does not set, for passes that have such options.

    Raises:
        OptionError: The pass or an option is unknown, or a value is not of its option's type.
    """
    name, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"--pass {spec}: '{part}' is no option=value")
        options[key.strip()] = value.strip()
    kind = load(name.strip())
    return build(kind, {**_known(kind, fallback), **options})


def defaults(fallback: Mapping[str, int] = _NOTHING, measure: str | None = None) -> list[Pass]:
    """Returns every registered pass that runs without options, exact ones first, in order of their names.

    Args:
        fallback: Values of options for passes that have such options.
        measure: What a target names; passes that only save what is stored run where that is params or bytes.
    """
    kinds = [load(name) for name in names()]
    kinds = [kind for kind in kinds if not kind.storage or measure in STORED]
    suited = [kind for kind in kinds if all(default != "required" for *_, default in describe_options(kind))]
    made = [build(kind, _known(kind, fallback)) for kind in suited]
    return sorted(made, key=lambda item: (not item.exact, item.name))


def chosen(
    specs: Sequence[str], fallback: Mapping[str, int] = _NOTHING, measure: str | None = None
) -> list[Pass]:
    """Returns the passes that a user named, in that order, or those that run by default; see `parse`, `defaults`."""
    return [parse(spec, fallback) for spec in specs] or defaults(fallback, measure)


def _known(kind: type[Pass], fallback: Mapping[str, int]) -> dict[str, str]:
    """Those of some options that a pass has."""
    return {option: str(value) for option, value in fallback.items() if takes_integer(kind, option)}
