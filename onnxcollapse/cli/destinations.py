# SPDX-License-Identifier: Apache-2.0
"""Whether results can be written where they are wanted, found out before the work is done."""

from __future__ import annotations

import os
from pathlib import Path

from onnxcollapse.errors import OptionError


def check_model(target: str, source: str, data: str | None) -> None:
    """Checks that a model can be written.

    Args:
        target: Where to; a file, or for a folder as source a folder, which is made when it is missing.
        source: The model that is read, a file or a folder.
        data: The calibration data, which must not be overwritten.

    Raises:
        OptionError: It cannot.
    """
    path, of_folder = Path(target), Path(source).is_dir()
    if not target or (path.is_dir() and not of_folder):
        raise OptionError(f"output '{target}' is a folder; name a file in it, as {path / 'small.onnx'}")
    if of_folder and path.is_file() and path.suffix != ".onnx":
        raise OptionError(f"output '{target}' is a file, but the model is a folder; name a folder")
    if data is not None and path.exists() and Path(data).exists() and path.samefile(data):
        raise OptionError(f"output '{target}' is the calibration data; name another file")
    if of_folder and path.suffix != ".onnx":
        check_folder(target)
    elif not path.parent.is_dir():
        fact = "is a file" if path.parent.exists() else "does not exist"
        raise OptionError(f"output '{target}': '{path.parent}' {fact}; create the folder or choose another")
    else:
        _check_rights(path.parent, target)


def check_folder(target: str) -> None:
    """Checks that files can be written into a folder, which is made when it is missing.

    Raises:
        OptionError: They cannot.
    """
    path = Path(target)
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), Path())
    if not target or not nearest.is_dir():
        raise OptionError(f"output folder '{target}': '{nearest}' is a file; choose another folder")
    _check_rights(nearest, target)


def _check_rights(folder: Path, target: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(
            f"output '{target}': '{folder}' is not writable; choose a folder that you may write to"
        )
