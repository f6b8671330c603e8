# SPDX-License-Identifier: Apache-2.0
"""Fills the inputs that data rarely holds and that have one obvious value: masks, positions, empty caches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.masks import is_cache_name
from onnxcollapse.errors import DataError
from onnxcollapse.model.model import Signature, TensorSpec

TOKENS = ("input_ids", "inputs_embeds")
_COUNTED = ("attention_mask", "token_type_ids", "position_ids")


def check_missing(given: set[str], signature: Signature, label: str) -> None:
    """Raises DataError for the first input that is not given and cannot be filled."""
    for spec in signature.inputs:
        if spec.name not in given and not is_fillable(spec, given, signature):
            names = ", ".join(sorted(given)) or "nothing"
            raise DataError(f"{label}: input {spec.name!r} is missing (there is {names}); add it to the data")


def complete(batch: Mapping[str, np.ndarray], signature: Signature) -> dict[str, np.ndarray]:
    """Adds what is missing.

    attention_mask is 1, token_type_ids 0, position_ids count the mask, use_cache_branch is False and caches
    (past_key_values.0.key, past_0_key ...) have length 0.

    Args:
        batch: The feeds that the data holds.
        signature: The model's inputs.

    Returns:
        Feeds for every input.
    """
    feeds = dict(batch)
    missing = [spec for spec in signature.inputs if spec.name not in feeds]
    for spec in sorted(missing, key=lambda spec: spec.name == "position_ids"):  # these need the mask
        feeds[spec.name] = _fill(spec, feeds, signature)
    return feeds


def step(
    signature: Signature, tokens: np.ndarray, past: int, cache: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The feeds of one step of a decoder over tokens that follow those in its cache.

    Args:
        signature: The model's inputs; besides tokens only those that have one obvious value.
        tokens: Token ids [B, n].
        past: Tokens in the cache.
        cache: The caches by input name; those missing are left empty.
    """
    specs = {spec.name: spec for spec in signature.inputs}
    rows, length = tokens.shape[:2]
    positions = np.arange(past, past + length)
    known = {
        tokens_name(signature) or TOKENS[0]: tokens,
        "attention_mask": np.ones((rows, past + length)),
        "position_ids": np.tile(positions, (rows, 1)),
        "cache_position": positions,
    }
    feeds = {
        name: array.astype((specs[name].dtype or ir.DataType.INT64).numpy())
        for name, array in known.items()
        if name in specs
    }
    if past and "use_cache_branch" in specs:
        feeds["use_cache_branch"] = np.ones((len(specs["use_cache_branch"].shape or ()) and 1) or (), bool)
    return complete({**feeds, **cache}, signature)


def tokens_name(signature: Signature) -> str | None:
    """The input of tokens, as ids or embedded; None where there is none."""
    names = {spec.name for spec in signature.inputs}
    return next((name for name in TOKENS if name in names), None)


def is_fillable(spec: TensorSpec, given: set[str], signature: Signature) -> bool:
    """Whether `complete` has a value for an input, given the names of the others."""
    rank = len(spec.shape or ())
    if spec.name == "use_cache_branch":
        return True
    if not given.intersection(TOKENS):
        return False
    if spec.name in _COUNTED:
        return rank == 2
    empty = is_cache_name(spec.name) and rank >= 3 and 0 in _empty_shape(spec, 1, signature)
    return empty and not _is_of_data(spec, signature)


def _is_of_data(spec: TensorSpec, signature: Signature) -> bool:
    """Whether a cache is as long as an input that only data can give, as that of an encoder's states is.

    Where the model is told to use no cache, any length will do.
    """
    specs = [s for s in signature.inputs if not is_cache_name(s.name)]
    if any(other.name == "use_cache_branch" for other in specs):
        return False
    batch = {other.shape[0] for other in specs if other.shape}
    known = (*TOKENS, *_COUNTED)
    lengths = {dim for other in specs if other.name not in known for dim in other.shape or ()} - batch
    return any(isinstance(dim, str) and dim in lengths for dim in spec.shape or ())


def _fill(spec: TensorSpec, feeds: Mapping[str, np.ndarray], signature: Signature) -> np.ndarray:
    dtype = (spec.dtype or ir.DataType.INT64).numpy()
    if spec.name == "use_cache_branch":
        return np.zeros((len(spec.shape or ()) and 1) or (), dtype)
    tokens = next(feeds[name] for name in TOKENS if name in feeds)
    rows, length = tokens.shape[:2]
    if spec.name == "attention_mask":
        return np.ones((rows, _past_length(feeds) + length), dtype)
    if spec.name == "token_type_ids":
        return np.zeros((rows, length), dtype)
    if spec.name == "position_ids":
        return _positions(feeds, rows, length).astype(dtype)
    return np.zeros(_empty_shape(spec, rows, signature), dtype)


def _positions(feeds: Mapping[str, np.ndarray], rows: int, length: int) -> np.ndarray:
    mask = feeds.get("attention_mask")
    if mask is None or mask.ndim != 2:
        past = _past_length(feeds)
        return np.tile(np.arange(past, past + length), (rows, 1))
    positions: np.ndarray = np.cumsum(mask != 0, axis=1)[:, -length:] - 1
    return np.maximum(positions, 0)


def _past_length(feeds: Mapping[str, np.ndarray]) -> int:
    return next((a.shape[-2] for n, a in feeds.items() if is_cache_name(n) and a.ndim >= 3), 0)


def _empty_shape(spec: TensorSpec, rows: int, signature: Signature) -> tuple[int, ...]:
    """Fixed dims stay, the batch dim (axis 0, or the tokens' symbol) is `rows`, the other free ones are 0."""
    symbols = [s.shape[0] for s in signature.inputs if s.name in TOKENS and s.shape]
    batch = next((s for s in symbols if isinstance(s, str)), None)
    shape = []
    for axis, dim in enumerate(spec.shape or ()):
        if isinstance(dim, int):
            shape.append(dim)
        else:
            shape.append(rows if axis == 0 or (batch is not None and dim == batch) else 0)
    return tuple(shape)
