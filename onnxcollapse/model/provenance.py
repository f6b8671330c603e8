# SPDX-License-Identifier: Apache-2.0
"""What was done to a model, kept in the model. No timestamps: the same run writes the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxcollapse.model.model import Model

PREFIX = "onnxcollapse."


def record(model: Model, key: str, value: str) -> None:
    """Set the metadata entry `onnxcollapse.<key>`, which is saved with the model."""
    model.ir.metadata_props[PREFIX + key] = value


def recorded(model: Model) -> dict[str, str]:
    """The entries that `record` has set, by key."""
    return {k.removeprefix(PREFIX): v for k, v in model.ir.metadata_props.items() if k.startswith(PREFIX)}
