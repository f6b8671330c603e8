# SPDX-License-Identifier: Apache-2.0
"""Config files that tell how many layers a model has, and how they follow when some are gone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from onnxcollapse.model.jsontext import Edit, Part, apply, keeping, parse

logger = logging.getLogger(__name__)

CONFIG, GENAI = "config.json", "genai_config.json"

_COUNTS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_transformer_layers", "decoder_layers",
    "num_decoder_layers",
)  # fmt: skip
_LIMITS = ("max_window_layers",)
_BY_LAYER = (
    "layer_types", "block_types", "layers_block_type", "attention_layers", "no_rope_layers", "num_kv_heads",
    "num_query_heads", "ffn_multipliers", "sliding_window_pattern_per_layer", "layer_head_dims",
)  # fmt: skip
_NUMBERS = ("mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "moe_layers", "attn_layer_indices")
_OF_DECODER = ("decoder_layers", "num_decoder_layers")
_SCOPES = ("text_config", "decoder")


def follow(
    companion: Path, before: int, left: tuple[int, ...], *, decoder_of_two: bool = False
) -> str | None:
    """The text of a config file for a model of which some layers are left.

    Only what says something of layers changes, and only in an object whose own count of layers is that of the
    original: a file that has followed already stays as it is. What cannot follow is left and logged.

    Args:
        companion: The file as it lies beside the original.
        before: Layers that the original has.
        left: Which of them are left, by their numbers from 0.
        decoder_of_two: Whether the model is the decoder beside an encoder, whose layers the config counts, too.

    Returns:
        The new text; None for a file that stays as it is.
    """
    changes = _EDITS.get(companion.name)
    if changes is None:
        return None
    try:
        text = companion.read_bytes().decode()
        root = parse(text)
    except ValueError as error:
        logger.warning("%s is no JSON (%s): it is copied as it is and does not follow", companion, error)
        return None
    if _is_double(root) and changes is _config and decoder_of_two:
        changes = _decoder_config
    elif _is_double(root):
        logger.warning(
            "%s is of an encoder and a decoder and does not say which of its counts is this model's: it is copied as "
            "it is; set that count from %d layers to %d by hand",
            companion, before, len(left),
        )  # fmt: skip
        return None
    edits = list(changes(text, root, before, left))
    if not edits:
        logger.warning("%s names no count of %d layers: it is copied as it is", companion, before)
        return None
    return apply(text, edits)


def _is_double(part: Part) -> bool:
    """Whether a config, or that of its text model, counts the layers of an encoder and of a decoder."""
    told = part.members.get("is_encoder_decoder")
    inner = (part.members[name] for name in _SCOPES if name in part.members)
    return (told is not None and told.value is True) or any(map(_is_double, inner))


def _config(text: str, scope: Part, before: int, left: tuple[int, ...]) -> Iterator[Edit]:
    members = scope.members
    for name in _SCOPES:
        if name in members:
            yield from _config(text, members[name], before, left)
    if any(members[name].value == before for name in _COUNTS if name in members):
        yield from _counted(text, members, before, left)


def _decoder_config(text: str, scope: Part, before: int, left: tuple[int, ...]) -> Iterator[Edit]:
    """Edits of a config of two models, in what it says of the decoder by name."""
    for key, part in scope.members.items():
        if key in _OF_DECODER and part.value == before:
            yield Edit(part, str(len(left)))
        elif key == "decoder":
            yield from _config(text, part, before, left)


def _counted(text: str, members: dict[str, Part], before: int, left: tuple[int, ...]) -> Iterator[Edit]:
    """Edits of an object whose count of layers is the original's."""
    for key, part in members.items():
        if key in _COUNTS and part.value == before:
            yield Edit(part, str(len(left)))
        elif key in _LIMITS and isinstance(part.value, int):
            yield Edit(part, str(sum(number < part.value for number in left)))
        elif key in _BY_LAYER and len(part.items) == before:
            yield keeping(text, part, left)
        elif key in _NUMBERS and part.items:
            yield _renumbered(part, left)
        elif key == "attention_types" and part.items:  # GPT-Neo: [[[types], times], ...]
            yield from _repeated(part, before, left)


def _renumbered(part: Part, left: tuple[int, ...]) -> Edit:
    """Numbers of layers, as they are now."""
    return Edit(part, json.dumps([left.index(item.value) for item in part.items if item.value in left]))


def _repeated(part: Part, before: int, left: tuple[int, ...]) -> Iterator[Edit]:
    types: list[object] = []
    for group in part.items:
        if len(group.items) == 2 and isinstance(group.items[1].value, int):
            types += [item.value for item in group.items[0].items] * group.items[1].value
    if len(types) == before:
        yield Edit(part, json.dumps([[[types[number] for number in left], 1]]))


def _genai(text: str, root: Part, before: int, left: tuple[int, ...]) -> Iterator[Edit]:
    model = root.members.get("model")
    decoder = model.members.get("decoder") if model is not None else None
    edits = [] if decoder is None else list(_config(text, decoder, before, left))
    yield from edits
    window = decoder.members.get("sliding_window") if edits and decoder is not None else None
    if window is not None and "layers" in window.members:
        yield _renumbered(window.members["layers"], left)


_EDITS: dict[str, Callable[[str, Part, int, tuple[int, ...]], Iterator[Edit]]] = {
    CONFIG: _config,
    GENAI: _genai,
}
