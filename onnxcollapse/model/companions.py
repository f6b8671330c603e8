# SPDX-License-Identifier: Apache-2.0
"""Config files that tell how many layers a model has, and how they follow when some are gone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

from onnxcollapse.errors import ModelError

CONFIG, GENAI = "config.json", "genai_config.json"

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers")
_LIMITS = ("max_window_layers",)


def follow(companion: Path, before: int, left: tuple[int, ...]) -> str | None:
    """The text of a config file for a model of which some layers are left.

    Args:
        companion: The file as it lies beside the original.
        before: Layers that the original has.
        left: Which of them are left, by their numbers from 0.

    Returns:
        The new text with everything else as it was; None for a file that says nothing of layers.

    Raises:
        ModelError: The file is no JSON.
    """
    edit = _EDITS.get(companion.name)
    if edit is None:
        return None
    text = companion.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{companion} is no JSON ({error}); mend it or take it away") from error
    if not isinstance(content, dict):
        return None
    edit(content, before, left)
    indent = re.search(r"^\{\s*\n([ \t]+)", text)
    shaped = json.dumps(content, indent=indent[1] if indent else None, ensure_ascii=False)
    return shaped + text[len(text.rstrip()) :]


def _edit_config(content: MutableMapping[str, Any], before: int, left: tuple[int, ...]) -> None:
    """Counts that were right before are right again, and lists with an entry a layer keep those left."""
    for key, value in content.items():
        if key in _COUNTS and value == before:
            content[key] = len(left)
        elif key in _LIMITS and isinstance(value, int):
            content[key] = min(value, len(left))
        elif isinstance(value, list) and len(value) == before and "layer" in key:
            content[key] = [value[number] for number in left]
        elif isinstance(value, dict) and key in ("text_config", "decoder"):
            _edit_config(value, before, left)


def _edit_genai(content: MutableMapping[str, Any], before: int, left: tuple[int, ...]) -> None:
    model = content.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if isinstance(decoder, dict):
        _edit_config(decoder, before, left)
        window = decoder.get("sliding_window")
        layers = window.get("layers") if isinstance(window, dict) else None
        if isinstance(window, dict) and isinstance(layers, list):
            window["layers"] = [left.index(number) for number in layers if number in left]


_EDITS: dict[str, Callable[[MutableMapping[str, Any], int, tuple[int, ...]], None]] = {
    CONFIG: _edit_config,
    GENAI: _edit_genai,
}
