# SPDX-License-Identifier: Apache-2.0
"""Finding a model's files, and replacing files on disk all at once or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from onnxcollapse.errors import ModelError

# What lies in a model's folder but is no part of how the model is used: weights, arrays and other formats.
_WEIGHT_ENDINGS = (
    ".onnx", ".onnx_data", ".data", ".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".h5", ".msgpack",
    ".gguf", ".npz", ".npy", ".pb", ".ort", ".tflite", ".engine", ".plan",
)  # fmt: skip

MERGED, ENCODER = "decoder_model_merged.onnx", "encoder_model.onnx"
"""What optimum calls the two parts of an encoder-decoder."""

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "choose a folder, not a file, to write into",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def find_model(source: Path) -> Path:
    """The .onnx file that `source` means: itself, or the one in the folder.

    Of several that is model.onnx, or the merged decoder that optimum exports beside an encoder.

    Raises:
        ModelError: There is no such file, or the folder holds none or several and none has such a name.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise ModelError(f"{source} does not exist; give an .onnx file or a folder that holds one")
    found = sorted(path for path in source.glob("*.onnx") if path.is_file())
    for preferred in (source / "model.onnx", source / MERGED):
        if preferred in found:
            return preferred
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no .onnx file"
        raise ModelError(f"folder {source} holds {names}, and none is called model.onnx; name one file")
    return found[0]


def find_companions(model: Path, weights: set[Path], parts: Sequence[Path] = ()) -> tuple[Path, ...]:
    """The files beside a model that go where it goes: configs, tokenizers, labels.

    Args:
        model: The model's file.
        weights: Files that it refers to.
        parts: Other models that are used with it, and the files that they refer to.
    """
    return tuple(
        path
        for path in sorted(model.parent.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path not in weights
        and (path in parts or not _is_weight(path))
    )


def _is_weight(path: Path) -> bool:
    return path.name.lower().endswith(_WEIGHT_ENDINGS) or ".onnx_data" in path.name


def one_line(error: OSError) -> str:
    """What went wrong and what to do about it."""
    remedy = _REMEDIES.get(error.errno or 0, "check the folder and try again")
    return f"{error.strerror or error}; {remedy}"


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, gone afterwards; an OSError becomes a ModelError."""
    with writing(target):
        folder = Path(tempfile.mkdtemp(prefix=".onnxcollapse-", dir=target.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def commit(staged: Sequence[Path], folder: Path) -> None:
    """Move staged files into `folder` in the given order, replacing those of the same name.

    Each file is replaced in one step. When a later one fails, the earlier ones are put back.
    """
    done: list[tuple[Path, Path | None]] = []
    try:
        for path in staged:
            done.append(_replace(path, folder / path.name))
    except BaseException:
        for target, backup in reversed(done):
            with suppress(OSError):
                if backup is None:
                    target.unlink()
                else:
                    backup.replace(target)
        raise
    _sync_folder(folder)


def _replace(path: Path, target: Path) -> tuple[Path, Path | None]:
    backup = path.with_name(path.name + ".before")
    try:
        os.link(target, backup)
    except OSError:  # nothing there, or a file system without hard links, where the roll-back is given up
        backup_made = False
    else:
        backup_made = True
    path.replace(target)
    return target, backup if backup_made else None


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn OSErrors inside into ModelErrors that name the target."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot write {target}: {one_line(error)}") from error


@contextmanager
def existing(folder: Path) -> Iterator[None]:
    """Make `folder` for what is written inside the block; take back what was made when that fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


def stage(companion: Path, folder: Path, text: str | None = None) -> Path:
    """Copy a companion into the staging folder, or write it with another text."""
    if not companion.is_file():
        raise ModelError(
            f"{companion} has gone since the model was loaded; restore it or load the model again"
        )
    if text is not None:
        staged = folder / companion.name
        staged.write_bytes(text.encode())  # as bytes, so that line ends stay
        return staged
    return Path(shutil.copyfile(companion, folder / companion.name))
