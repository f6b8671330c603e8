# SPDX-License-Identifier: Apache-2.0
"""text:FILE: a text cut into windows of tokens by the tokenizer that lies beside the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.data import Chunk
from onnxcollapse.calibration.signature import data_signature
from onnxcollapse.errors import DataError, OptionError
from onnxcollapse.model.model import Model, Signature

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

WINDOW = 128
"""Tokens a window where neither the model's input shape nor its configuration says less."""


def read(path: Path, model: Model, window: int | None = None) -> list[Chunk]:
    """Tokenises a text file.

    The windows follow each other without overlap, each with the special tokens that the tokenizer adds; only
    the last one is padded, at its end, and its attention mask says so.

    Args:
        path: The text, UTF-8.
        model: Has the input `input_ids` and a tokenizer.json in its folder or the one above.
        window: Tokens a window, special tokens included; None for what the model takes, at most WINDOW.

    Returns:
        One chunk.

    Raises:
        DataError: `tokenizers` is not installed, a file cannot be read, or the model takes no tokens.
        OptionError: The window does not fit the model.
    """
    signature = data_signature(model)
    specs = {spec.name: spec for spec in signature.inputs}
    if "input_ids" not in specs:
        raise DataError(f"text:{path}: the model has no input 'input_ids'; give its inputs as .npz")
    folder = model_folder(model, "tokenizer.json", "text")
    tokenizer = _load(folder / "tokenizer.json")
    length = _window(signature, folder) if window is None else _checked(window, signature, folder)
    special = tokenizer.num_special_tokens_to_add(False)
    if length <= special:
        raise OptionError(f"window {length}: {special} of its tokens are special ones; it takes a longer one")
    encoded = _encode(tokenizer, _text(path), length, _pad_id(folder))
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    arrays: dict[str, np.ndarray] = {
        name: np.array(
            [getattr(window, field) for window in encoded], (specs[name].dtype or ir.DataType.INT64).numpy()
        )
        for name, field in columns.items()
        if name in specs
    }
    return [Chunk.of(path.name, arrays)]


def model_folder(model: Model, wanted: str, form: str) -> Path:
    """The model's folder, or the one above (optimum's onnx/ subfolder), that holds a companion file.

    Raises:
        DataError: Neither does.
    """
    if model.path is not None:
        for folder in (model.path.parent, model.path.parent.parent):
            if (folder / wanted).is_file():
                return folder
    raise DataError(f"{form}: needs {wanted} beside the model; copy it there or give the inputs as .npz")


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file.

    Raises:
        DataError: It is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no readable JSON ({error}); restore it") from error
    return content if isinstance(content, dict) else {}


def _load(path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError("text: needs the tokenizers package; `pip install onnxcollapse[text]`") from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path}: is no readable tokenizer ({error}); restore it") from error


def _text(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); convert it") from error
    if not content.strip():
        raise DataError(f"{path}: holds no text; give some paragraphs")
    return content


def _encode(tokenizer: Tokenizer, content: str, length: int, pad_id: int) -> list[Encoding]:
    tokenizer.enable_truncation(max_length=length)
    tokenizer.enable_padding(direction="right", length=length, pad_id=pad_id)
    first = tokenizer.encode(content)
    return [first, *first.overflowing]


def _window(signature: Signature, folder: Path) -> int:
    fixed = _fixed_length(signature)
    if fixed is not None:
        return fixed
    usual = load_json(folder / "tokenizer_config.json").get("model_max_length")
    return min([WINDOW, *_positions(folder).values(), *_numbers([usual])])


def _checked(window: int, signature: Signature, folder: Path) -> int:
    """A window that the user wants, if the model takes it."""
    if window < 2:
        raise OptionError(f"window {window}: a window has 2 tokens or more; give a larger number")
    fixed = _fixed_length(signature)
    if fixed not in (None, window):
        raise OptionError(
            f"window {window}: the model's input_ids has a fixed length of {fixed}; leave it out"
        )
    for key, limit in _positions(folder).items():
        if window > limit:
            raise OptionError(f"window {window}: {key} in config.json is {limit}; give at most that")
    return window


def _fixed_length(signature: Signature) -> int | None:
    shape = next((spec.shape for spec in signature.inputs if spec.name == "input_ids"), None)
    return shape[1] if shape is not None and len(shape) == 2 and isinstance(shape[1], int) else None


def _positions(folder: Path) -> dict[str, int]:
    """How many positions the model has, by the keys that its configuration says it under."""
    config = load_json(folder / "config.json")
    keys = ("max_position_embeddings", "n_positions")
    return {key: limit for key in keys for limit in _numbers([config.get(key)])}


def _numbers(limits: Sequence[object]) -> list[int]:
    return [int(limit) for limit in limits if isinstance(limit, int | float) and limit > 0]


def _pad_id(folder: Path) -> int:
    config = load_json(folder / "config.json")
    for key in ("pad_token_id", "eos_token_id"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return 0
