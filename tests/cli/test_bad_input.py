# SPDX-License-Identifier: Apache-2.0
"""Everything a user can get wrong ends in one line that says what and how to mend it, and loses nothing."""

from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.cli.workspace import mentions, one_line
from tests.support import rows

OPTIMIZE = ("optimize", "model.onnx", "-o", "out.onnx")
WITH_DATA = (*OPTIMIZE, "--calib", "calib.npz")


# The model


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["empty"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", ["not an ONNX model"]),
        (b"this is a text, not a model\n", ["not an ONNX model"]),
        (b'{"json": true}', ["text file"]),
        (b"PK\x03\x04rest of a zip archive", ["zip archive"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS"]),
    ],
)
def test_files_that_are_no_model(workspace, content, words):
    (workspace.folder / "model.onnx").write_bytes(content)
    mentions(workspace.refused(*WITH_DATA), "model.onnx", *words)


def test_a_model_that_is_missing(workspace):
    (workspace.folder / "model.onnx").unlink()
    mentions(workspace.refused(*WITH_DATA), "model.onnx does not exist", ".onnx file")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_model(workspace, share):
    path = workspace.folder / "model.onnx"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    mentions(workspace.refused(*WITH_DATA), "model.onnx", "again")


def test_a_model_with_a_name_too_long_for_the_file_system(workspace):
    mentions(workspace.refused("optimize", "m" * 300, "-o", "out.onnx"), "File name too long")
    mentions(workspace.refused("optimize", "model.onnx", "-o", "m" * 300), "too long")


def test_a_model_that_must_not_be_read(workspace, monkeypatch):
    real = Path.open

    def closed(path, *arguments, **options):
        if path.name == "model.onnx":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    result = workspace.run(*WITH_DATA)
    mentions(one_line(result.stderr, result.exit_code), "model.onnx", "Permission denied")


def test_folders_without_a_model_or_with_several(workspace):
    (workspace.folder / "empty").mkdir()
    mentions(workspace.refused("optimize", "empty", "-o", "made"), "empty", "no .onnx file")
    for name in ("a.onnx", "b.onnx"):
        (workspace.folder / "empty" / name).write_bytes(b"x")
    mentions(workspace.refused("optimize", "empty", "-o", "made"), "a.onnx, b.onnx")


def test_a_model_that_no_runtime_takes(workspace, text_model):
    proto = text_model(
        '<ir_version: 8, opset_import: ["": 17, "nobody": 1]> net (float[n,8] x) => (float[n,8] y) '
        "{ y = nobody.Knows(x) }"
    )
    onnx.save(proto, workspace.folder / "model.onnx")
    mentions(workspace.refused(*WITH_DATA), "cannot load", "Knows")


@pytest.mark.parametrize(
    "body, words",
    [
        ("y = Add(x, nobody)", ["'nobody'", "nothing makes"]),
        ("a = Add(x, b) b = Relu(a) y = Relu(b)", ["cycle"]),
        ("y = Relu(x) y = Neg(x)", ["'y'"]),
        ("z = Relu(x)", ["'y'"]),
        ("y = Gemm(x)", ["onnx.checker refuses the model", "Gemm"]),
    ],
)
def test_models_whose_graph_is_broken(workspace, body, words):
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> net (float[n,8] x) => (float[n,8] y) {{ {body} }}'
    )
    onnx.save(proto, workspace.folder / "model.onnx")
    mentions(workspace.refused(*WITH_DATA), *words)


def test_external_data_that_is_missing_or_too_short(workspace, external):
    (workspace.folder / "w.bin").write_bytes(b"short")
    mentions(workspace.refused(*WITH_DATA), "w.bin", "the file has 5", "download it again")
    (workspace.folder / "w.bin").unlink()
    mentions(workspace.refused(*WITH_DATA), "w.bin", "missing", "beside the model")


@pytest.mark.parametrize(
    "location", ["../w.bin", "sub/../../w.bin", "{folder}/w.bin", "link.bin", "linked/w.bin"]
)
def test_external_data_outside_the_models_folder(workspace, external, location, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    for place in (outside / "w.bin", workspace.folder.parent / "w.bin"):
        place.write_bytes((workspace.folder / "w.bin").read_bytes())
    (workspace.folder / "link.bin").symlink_to(outside / "w.bin")
    (workspace.folder / "linked").symlink_to(outside)
    location = location.format(folder=outside)
    external(location)
    mentions(workspace.refused(*WITH_DATA), location, "outside the model's folder", "move the file")


# The calibration data


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({}, ["'x' is missing"]),
        ({"z": rows(20, 8)}, ["'z' is no input", "(x)"]),
        ({"x": rows(20, 8), "extra": rows(20, 1)}, ["'extra' is no input"]),
        ({"x": rows(20, 7)}, ["axis 1 of input 'x' is 7", "wants 8"]),
        ({"x": rows(20, 8)[0]}, ["shape [8]", "reshape"]),
        ({"x": rows(16, 8).reshape(2, 2, 2, 2, 8)}, ["shape [2, 2, 2, 2, 8]"]),
        ({"x": rows(20, 8).astype(np.float64)}, ["float64", "astype('float32')"]),
        ({"x": np.where(np.arange(160).reshape(20, 8) == 9, np.nan, rows(20, 8)).astype(np.float32)},
         ["NaN", "first at [1, 1]"]),
        ({"x": np.full((20, 8), np.inf, np.float32)}, ["infinity"]),
        ({"x": rows(0, 8)}, ["no samples"]),
        ({"x": rows(1, 8)}, ["at least 2 samples"]),
        ({"x": np.array([{"an": "object"}] * 4)}, ["'x' holds Python objects"]),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(workspace, arrays, words):
    np.savez(workspace.folder / "calib.npz", **arrays)
    mentions(workspace.refused(*WITH_DATA), "calib.npz", *words)


def test_a_pickle_is_never_executed(workspace):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)

    np.savez(workspace.folder / "calib.npz", x=np.array([Bomb()]))
    workspace.refused(*WITH_DATA)
    assert not (workspace.folder / "exploded").exists()


@pytest.mark.parametrize(
    "content", [b"", b"some text", b"\x89PNG\r\n", b"PK\x03\x04 broken", b"\x93NUMPY\x01\x00"]
)
def test_files_that_are_no_npz(workspace, content):
    (workspace.folder / "calib.npz").write_bytes(content)
    line = workspace.refused(*WITH_DATA)
    mentions(line, "calib.npz", ".npz", "np.savez")
    assert "allow_pickle" not in line


def test_single_arrays_and_damaged_archives(workspace):
    np.save(workspace.folder / "calib.npy", rows(20, 8))
    mentions(workspace.refused(*OPTIMIZE, "--calib", "calib.npy"), "single array")
    path = workspace.folder / "calib.npz"
    path.write_bytes(path.read_bytes()[:-200])
    mentions(workspace.refused(*WITH_DATA), "calib.npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"no array")
    mentions(workspace.refused(*WITH_DATA), "calib.npz")


@pytest.mark.parametrize(
    "spec, words",
    [
        ("missing.npz", ["'missing.npz' does not exist", "random:N"]),
        ("", ["does not exist"]),
        ("random:0", ["random:0"]),
        ("random:-3", ["random:-3"]),
        ("random:many", ["random:many"]),
        ("random:", ["random:"]),
        ("text:missing.txt", ["does not exist"]),
        ("images:missing", ["does not exist"]),
        ("no_such_module:reader", ["no_such_module"]),
        ("json:nothing", ["nothing"]),
        ("json:dumps", ["json:dumps"]),
        (".", ["neither .npz files nor"]),
    ],
)
def test_data_that_is_not_there(workspace, spec, words):
    (workspace.folder / "calib.npz").rename(workspace.folder / "elsewhere")
    mentions(workspace.refused(*OPTIMIZE, "--calib", spec), *words)


def test_a_bad_file_in_a_folder_of_data(workspace):
    (workspace.folder / "data").mkdir()
    np.savez(workspace.folder / "data" / "a.npz", x=rows(20, 8))
    np.savez(workspace.folder / "data" / "b.npz", x=np.full((20, 8), np.nan, np.float32))
    mentions(workspace.refused(*OPTIMIZE, "--calib", "data"), "b.npz", "NaN")


# Options


@pytest.mark.parametrize(
    "options, words",
    [
        (["--pass", "no-such-pass"], ["unknown pass 'no-such-pass'", "collapse-ffn"]),
        (["--pass", ""], ["unknown pass ''"]),
        (["--pass", "cleanup:depth=3"], ["no option 'depth'", "none"]),
        (["--pass", "collapse-ffn:method"], ["'method' is no option=value"]),
        (["--pass", "collapse-ffn:method=guess"], ["'guess'", "auto|fold|fit"]),
        (["--pass", "collapse-ffn:tolerance=much"], ["'much'", "float"]),
        (["--pass", "collapse-ffn:tolerance=nan"], ["tolerance nan"]),
        (["--pass", "collapse-ffn:ranks=perhaps"], ["'perhaps'", "bool"]),
        (["--pass", "graphsurgeon"], ["needs the option 'script'"]),
        (["--provider", "abacus"], ["'abacus' is not available", "cpu"]),
        (["--provider", "cuda:one"], ["device 'one' is no number", "cuda:0"]),
        (["--provider", "cuda,use_tf32"], ["'use_tf32' is no option=value", "NAME[:DEVICE]"]),
        (["--provider", "cuda,gpu_mem_limit=much"], ["gpu_mem_limit much", "4GB"]),
        (["--provider", "cpu:1"], ["cpu takes neither a device nor options"]),
        (["--window", "1"], ["--window", "1", "--help"]),
        (["--window", "64"], ["window 64", "text:FILE"]),
        (["--metric", "l3"], ["'l3' is unknown", "rel-l2"]),
        (["--metric", "missing.py:f"], ["no file missing.py"]),
        (["--metric", "broken.py:f"], ["broken.py", "RuntimeError"]),
        (["--metric", "leaves.py:f"], ["leaves.py", "SystemExit"]),
        (["--metric", "empty.py:f"], ["no function 'f'"]),
        (["--budget", "-0.1"], ["-0.1", "0 or more"]),
        (["--budget", "nan"], ["nan", "0 or more"]),
        (["--budget", "inf"], ["inf", "0 or more"]),
        (["--budget", "little"], ["'little'", "--budget", "--help"]),
        (["--target", "params"], ["'params'", "params=0.75"]),
        (["--target", ""], ["params=0.75"]),
        (["--target", "beauty=0.5"], ["'beauty' is no measure", "flops"]),
        (["--target", "params=0"], ["between 0 and 1"]),
        (["--target", "params=1.5"], ["between 0 and 1"]),
        (["--target", "params=half"], ["between 0 and 1"]),
        (["--target", "params=nan"], ["between 0 and 1"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--seed", "x"], ["--seed", "'x'"]),
        (["--no-such-option"], ["--no-such-option", "optimize --help"]),
        (["surplus"], ["surplus"]),
    ],
)
@pytest.mark.parametrize("data", [[], ["--calib", "calib.npz"]], ids=["exact", "calib"])
def test_bad_options(workspace, data, options, words):
    (workspace.folder / "broken.py").write_text("raise RuntimeError('no good')")
    (workspace.folder / "leaves.py").write_text("raise SystemExit(0)")
    (workspace.folder / "empty.py").write_text("")
    mentions(workspace.refused(*OPTIMIZE, *data, *options), *words)


@pytest.mark.parametrize(
    "body, words",
    [
        ("raise KeyError('gone')", ["KeyError", "gone"]),
        ("return 'far'", ["ValueError", "far"]),
        ("return None", ["TypeError"]),
    ],
)
def test_metrics_that_fail_while_they_run(workspace, body, words):
    (workspace.folder / "mine.py").write_text(f"def f(outputs, reference, batch):\n    {body}\n")
    mentions(workspace.refused(*WITH_DATA, "--metric", "mine.py:f"), "mine.py:f", *words)


def test_missing_arguments_and_unknown_commands(workspace):
    mentions(workspace.refused("optimize"), "MODEL", "optimize --help")
    mentions(workspace.refused("optimize", "model.onnx"), "-o")
    mentions(workspace.refused("shrink"), "'shrink'", "--help")
    mentions(workspace.refused("--frobnicate"), "--frobnicate")
    mentions(workspace.refused("compare", "model.onnx", "model.onnx"), "--data")


def test_json_of_a_failed_run_is_nothing_on_stdout(workspace):
    workspace.refused(*OPTIMIZE, "--json", "--calib", "missing.npz")
