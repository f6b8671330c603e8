# SPDX-License-Identifier: Apache-2.0
"""Readers for files, folders and Python objects; `read` picks the reader for a DATA argument."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from onnxcollapse.calibration import images, synthetic, text
from onnxcollapse.calibration.data import Chunk
from onnxcollapse.calibration.signature import data_signature
from onnxcollapse.errors import DataError
from onnxcollapse.model.model import Model, Signature
from onnxcollapse.objects import call_object, is_object, load_object

FORMS = "an .npz file, a folder of .npz or test_data_set_*, pkg.mod:reader, text:FILE, images:DIR or random:N"


def read(spec: str, model: Model, seed: int, window: int | None = None) -> list[Chunk]:
    """Reads what a DATA argument names.

    Args:
        spec: The argument; see open_data.
        model: The model the data is for.
        seed: Of random:N.
        window: Tokens a window of text:FILE; None for what the model takes.

    Returns:
        The samples in chunks, not yet checked against the model.

    Raises:
        DataError: It does not exist or cannot be read.
        OptionError: The window does not fit the model.
    """
    kind, _, rest = spec.partition(":")
    if kind == "text":
        return text.read(_existing(rest, spec), model, window)
    if kind == "images":
        return images.read(_existing(rest, spec), model)
    if kind == "random":
        return synthetic.read(rest, model, seed)
    path = Path(spec)
    if not path.exists() and is_object(spec):
        return _read_object(spec)
    path = _existing(spec, spec)
    return (
        _read_folder(path, data_signature(model)) if path.is_dir() else [Chunk.of(path.name, load_npz(path))]
    )


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .npz file, never unpickling.

    Raises:
        DataError: It is no .npz file, is damaged, or holds Python objects.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            single = file.read(6) == b"\x93NUMPY"
        fact = "is a single array, not an .npz" if single else "is no .npz file, or a damaged one"
        raise DataError(f"{path}: {fact}; write it with np.savez, arrays by input name")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: _member(archive, name, path) for name in archive.files}
    except DataError:
        raise
    except Exception as error:  # numpy, zipfile and zlib each have errors of their own
        raise DataError(f"{path}: cannot be read as .npz ({error}); write it again with np.savez") from error


def _member(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    try:
        array = archive[name]
    except ValueError as error:
        if "bject array" not in str(error):
            raise
        raise DataError(
            f"{path}: array {name!r} holds Python objects, never loaded; save plain numbers"
        ) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: {name!r} is no array; write the file with np.savez")
    return array


def _existing(name: str, spec: str) -> Path:
    path = Path(name).expanduser()
    if not name or not path.exists():
        raise DataError(f"calibration data {spec!r} does not exist; give {FORMS}")
    return path


def _read_folder(folder: Path, signature: Signature) -> list[Chunk]:
    sets = sorted((p for p in folder.glob("test_data_set_*") if p.is_dir()), key=_natural)
    if not sets and (folder / "input_0.pb").exists():
        sets = [folder]
    if sets:
        return [Chunk.of(path.name, _load_test_set(path, signature), whole=True) for path in sets]
    files = sorted(folder.glob("*.npz"), key=_natural)
    if not files:
        raise DataError(f"{folder}: holds neither .npz files nor test_data_set_* folders; give {FORMS}")
    return [Chunk(f"{folder.name}/{path.name}", partial(load_npz, path)) for path in files]


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _load_test_set(folder: Path, signature: Signature) -> dict[str, np.ndarray]:
    """input_N.pb of an ONNX test set, by the tensor's name, or by position where it has none."""
    import onnx
    from google.protobuf.message import DecodeError

    names = [spec.name for spec in signature.inputs]
    arrays: dict[str, np.ndarray] = {}
    for place, path in enumerate(sorted(folder.glob("input_*.pb"), key=_natural)):
        try:
            tensor = onnx.TensorProto.FromString(path.read_bytes())
            array = onnx.numpy_helper.to_array(tensor)
        except (DecodeError, ValueError, TypeError, OSError) as error:
            raise DataError(
                f"{path}: is no readable TensorProto ({error}); write it with onnx.save_tensor"
            ) from error
        if tensor.name not in names and place >= len(names):
            raise DataError(f"{path}: the model has only {len(names)} inputs; remove the file")
        arrays[tensor.name if tensor.name in names else names[place]] = array
    return arrays


def _read_object(spec: str) -> list[Chunk]:
    reader = _reader(spec)
    chunks: list[Chunk] = []
    while (batch := _next(reader, spec)) is not None:
        if not isinstance(batch, Mapping):
            raise DataError(
                f"{spec}: get_next() gave a {type(batch).__name__}; return a dict by input name, or None"
            )
        arrays = {str(name): np.asarray(array) for name, array in batch.items()}
        chunks.append(Chunk.of(f"{spec} batch {len(chunks)}", arrays, whole=True))
    if not chunks:
        raise DataError(f"{spec}: get_next() gave no batch; return at least 2 before None")
    return chunks


def _next(reader: object, spec: str) -> object:
    try:
        return reader.get_next()  # type: ignore[attr-defined]
    except (Exception, SystemExit) as error:  # the user's code: anything may come
        raise DataError(
            f"{spec}: get_next() fails with {type(error).__name__}: {error}; correct it"
        ) from error


def _reader(spec: str) -> object:
    """The reader itself, or what the class or function of that name makes."""
    found = load_object(spec)
    if isinstance(found, type) or not hasattr(found, "get_next"):
        found = call_object(found, spec)
    if not hasattr(found, "get_next"):
        raise DataError(f"{spec}: is no CalibrationDataReader; give an object with get_next()")
    return found
