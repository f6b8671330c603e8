# SPDX-License-Identifier: Apache-2.0
"""Names that exporters agree on, and which rows of a batch are padding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

_CACHE = re.compile(
    r"(^|[._/])(past|present|new_past|kv_cache|cache)(_|\.|$|\d)|key_values|(key|value)_cache"
)
_NUMBER = re.compile(r"\d+")
_ROLES = {"past", "present", "new", "in", "out", "input", "output", "cache", "kv", "values"}
"""Words of a cache's name that say whether it comes in or goes out."""


def is_cache_name(name: str) -> bool:
    """Whether a graph input or output is named like a KV cache: past_key_values.0.key, present.3.value ..."""
    return _CACHE.search(name) is not None and name != "use_cache_branch" and name != "cache_position"


def cache_number(name: str) -> int | None:
    """The layer that a cache belongs to: 3 for past_key_values.3.key, past_3_key, present.3.value; None for others."""
    found = _number(name)
    return None if found is None else int(found[0])


def numbered(name: str, number: int) -> str:
    """A cache's name with the number of another layer."""
    found = _number(name)
    return name if found is None else f"{name[: found.start()]}{number}{name[found.end() :]}"


def _number(name: str) -> re.Match[str] | None:
    """The number behind what makes a name one of a cache, or the last one before it: layer.3.past_key."""
    word = _CACHE.search(name) if is_cache_name(name) else None
    if word is None:
        return None
    behind = _NUMBER.search(name, word.start())
    return behind or next(reversed(list(_NUMBER.finditer(name))), None)


def cache_pairs(inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str] | None:
    """Pairs each cache that a model takes with the output that is its next value, by the rest of their names.

    `past_key_values.3.key` goes with `present.3.key`, `past_3_value` with `present_3_value`, whichever layers are
    left.

    Returns:
        Output by input; None when a cache has no partner or more than one, or there are no caches.
    """
    given, made = ([name for name in names if is_cache_name(name)] for names in (inputs, outputs))
    partners: dict[tuple[str, ...], list[str]] = {}
    for name in made:
        partners.setdefault(_rest(name), []).append(name)
    found = {name: partners.get(_rest(name), []) for name in given}
    if not found or any(len(names) != 1 for names in found.values()):
        return None
    pairs = {name: names[0] for name, names in found.items()}
    return pairs if len(set(pairs.values())) == len(pairs) else None


def _rest(name: str) -> tuple[str, ...]:
    """A cache's name without the words for its role: its layer, and whether it holds keys or values."""
    words = re.findall(r"\d+|[a-z]+", name.lower().replace("key_values", "values"))
    return tuple(word for word in words if word not in _ROLES)


def row_mask(batch: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Which tokens of a batch are real.

    The attention mask of a decoder with a cache covers past and present; only its last columns, one for each
    token fed, belong to rows of this batch.

    Args:
        batch: The feeds.

    Returns:
        bool [B, S], or None when there is no two-dimensional attention mask.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return None
    tokens = next((batch[name] for name in ("input_ids", "inputs_embeds") if name in batch), None)
    if tokens is not None and tokens.ndim >= 2:
        mask = mask[:, max(mask.shape[1] - tokens.shape[1], 0) :]
    return mask != 0


def batch_rows(batch: Mapping[str, np.ndarray]) -> int:
    """Samples in a batch: the length of axis 0 of its first input that is no cache and has one."""
    for name, array in batch.items():
        if array.ndim and not is_cache_name(name):
            return array.shape[0]
    return 1
