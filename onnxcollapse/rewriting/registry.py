# SPDX-License-Identifier: Apache-2.0
"""Finds passes by name through entry points, so that a third party's pass is registered as a built-in one is."""

from __future__ import annotations

import functools
import importlib.metadata

from onnxcollapse.errors import OptionError
from onnxcollapse.rewriting.passes import Pass, build, describe_options

GROUP = "onnxcollapse.passes"


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


def parse(spec: str) -> Pass:
    """Makes a pass from ``name[:option=value,...]``.

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
    return build(load(name.strip()), options)


def defaults() -> list[Pass]:
    """Returns every registered pass that runs without options, exact ones first, in order of their names."""
    kinds = [load(name) for name in names()]
    suited = [kind for kind in kinds if all(default != "required" for *_, default in describe_options(kind))]
    return sorted((build(kind, {}) for kind in suited), key=lambda made: (not made.exact, made.name))
