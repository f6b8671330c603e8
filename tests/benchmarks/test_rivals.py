# SPDX-License-Identifier: Apache-2.0
import json
import sys
from itertools import pairwise

import numpy as np
import pytest

from benchmarks import rivals
from benchmarks.rivals import METHODS, RivalError, environment, run, search

ROW = {"error": None, "params_before": 1000, "params_after": 250, "zeros_after": 50}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A Python that takes the rival's place: a script, given the arguments that the driver would get."""

    def install(body):
        script = tmp_path / "driver.py"
        script.write_text(f"import json, sys\nmodel, calib, ratio, method, output = sys.argv[1:6]\n{body}\n")
        monkeypatch.setattr(rivals, "_DRIVER", script)
        monkeypatch.setattr(rivals, "environment", lambda: sys.executable)

    return install


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "model.onnx", tmp_path / "calib.npz", tmp_path / "out" / "small.onnx"


def ran(method, paths, ratio=0.5, **options):
    model, calibration, output = paths
    return run(method, model, calibration, ratio, output, **options)


def test_the_driver_gets_the_arguments_and_its_row_comes_back(stand_in, paths):
    stand_in(f"print('noise'); print(json.dumps({ROW!r} | {{'got': sys.argv[1:]}}))")
    row = ran("wanda", paths, 0.25, samples=8)
    model, calibration, output = map(str, paths)
    assert row["got"] == [model, calibration, "0.25", "wanda", output, "--samples", "8"]
    assert row["ratio"] == 0.25 and row["error"] is None
    assert row["share"] == 0.25


def test_zeros_count_as_removed_only_where_nothing_shrinks(stand_in, paths):
    stand_in(f"print(json.dumps({ROW!r}))")
    assert ran("magnitude", paths)["share"] == 0.25
    assert ran("magnitude-mask", paths)["share"] == 0.2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit('cannot import onnxsim')", "ended with status 1: cannot import onnxsim"),
        ("import os; os.abort()", "ended with status -6"),
        ("print('not json')", "printed no result"),
        ("", "printed no result: no message"),
        ("import time; time.sleep(60)", "not done after 0.5 seconds"),
        ("print(json.dumps({'error': 'RivalError: matches nothing'}))", "RivalError: matches nothing"),
    ],
)
def test_a_rival_that_fails_is_a_row_with_the_reason(stand_in, paths, body, reason):
    stand_in(body)
    row = ran("wanda", paths, timeout=0.5 if "sleep" in body else 60)
    assert row["error"].startswith(reason)
    assert row["method"] == "wanda" and row["share"] is None


def test_a_python_that_is_not_there_is_a_reason(tmp_path, monkeypatch, paths):
    monkeypatch.setattr(rivals, "environment", lambda: tmp_path / "no-python")
    assert "cannot be run" in ran("wanda", paths)["error"]


def test_an_environment_that_cannot_be_made_is_a_reason(monkeypatch, paths):
    def fail():
        raise RivalError("pip could not install onnxsim: no network")

    monkeypatch.setattr(rivals, "environment", fail)
    assert ran("wanda", paths)["error"] == "pip could not install onnxsim: no network"


@pytest.mark.parametrize(
    ("method", "ratio", "share"),
    [("nonsense", 0.5, None), ("wanda", None, None), ("wanda", 0.5, 0.5), ("wanda", 0.0, None), ("wanda", 1.5, None),
     ("wanda", None, -0.1)],
)  # fmt: skip
def test_wrong_arguments_are_errors(stand_in, paths, method, ratio, share):
    stand_in("")
    with pytest.raises(ValueError, match=r"nonsense|either|ratio|params_share"):
        ran(method, paths, ratio, params_share=share)


def mlp_share(ratio, widths=(784, 512, 512, 512, 512, 512, 10)):
    def params(sizes):
        return sum(i * o + o for i, o in pairwise(sizes))

    cut = [widths[0], *(max(1, round(w * ratio)) for w in widths[1:-1]), widths[-1]]
    return params(cut) / params(widths)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.25, 0.16, 0.05])
def test_the_search_arrives_within_four_tries(share):
    rows = search(lambda ratio: {"ratio": ratio, "share": mlp_share(ratio), "error": None}, share)
    assert rows[-1]["share"] == pytest.approx(share, rel=0.02)
    assert len(rows) <= 4


def test_the_search_gives_up_after_six_tries_where_the_share_is_out_of_reach():
    rows = search(lambda ratio: {"ratio": ratio, "share": 0.6 + 0.4 * ratio, "error": None}, 0.3)
    assert len(rows) == rivals.TRIES
    assert min(row["share"] for row in rows) < 0.62


def test_the_search_handles_steps():
    blocks = 12
    rows = search(lambda r: {"share": 0.4 + 0.6 * round(blocks * r) / blocks, "error": None}, 0.7)
    assert min(abs(row["share"] - 0.7) for row in rows) < 0.6 / blocks


def test_a_share_is_searched_without_the_recovery_and_reached_with_it(stand_in, paths, tmp_path):
    log = tmp_path / "log"
    stand_in(
        f"open({str(log)!r}, 'a').write(method + '\\n')\n"
        "after = round(1000 * float(ratio) ** 2)\n"
        "print(json.dumps({'error': None, 'params_before': 1000, 'params_after': after, 'zeros_after': 0}))"
    )
    row = ran("wanda+finetune", paths, None, params_share=0.25)
    assert row["share"] == pytest.approx(0.25, rel=0.02)
    *plain, last = log.read_text().split()
    assert set(plain) == {"wanda"} and last == "wanda+finetune"
    assert row["tries"] == len(plain)


def test_a_search_that_fails_names_the_method_asked_for(stand_in, paths):
    stand_in("print(json.dumps({'error': 'no', 'method': method}))")
    row = ran("wanda+train", paths, None, params_share=0.5)
    assert row["error"] == "no" and row["method"] == "wanda+train" and row["tries"] == 1


def test_the_command_prints_a_line_for_each(stand_in, paths, tmp_path, capsys):
    stand_in(f"print(json.dumps({ROW!r}))")
    model, calibration, _ = map(str, paths)
    out = str(tmp_path / "models")
    options = ["--methods", "wanda", "magnitude", "--ratios", "0.5", "0.25", "-o", out]
    assert rivals.main([model, "--calib", calibration, *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["method"], r["ratio"]) for r in rows] == [
        ("wanda", 0.5), ("wanda", 0.25), ("magnitude", 0.5), ("magnitude", 0.25)
    ]  # fmt: skip
    assert rows[0]["output"] == f"{out}/wanda-ratio-0.5.onnx"


@pytest.mark.parametrize("options", [[], ["--ratios", "0"], ["--params-shares", "2"], ["--methods", "none"]])
def test_the_command_refuses_wrong_arguments(options, capsys):
    with pytest.raises(SystemExit) as ended:
        rivals.main(["m.onnx", "--calib", "c.npz", "-o", "out", *options])
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_environment_is_made_once_and_anew_when_incomplete(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXCOLLAPSE_CACHE", str(tmp_path))
    calls = []

    def command(arguments, failure):
        calls.append(arguments)
        if "venv" in arguments:
            python = tmp_path / "rivals" / "onnxsim" / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()

    monkeypatch.setattr(rivals, "_command", command)
    python = environment()
    assert environment() == python == tmp_path / "rivals" / "onnxsim" / "bin" / "python"
    assert len(calls) == 2 and calls[1][-2:] == list(rivals.REQUIREMENTS)
    (python.parents[1] / "ready.json").unlink()
    environment()
    assert len(calls) == 4


def test_a_failed_installation_says_why_and_is_not_taken_for_done(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXCOLLAPSE_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho first >&2; echo no space >&2; exit 3\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RivalError, match=r"no virtual environment could be made in .*: no space"):
        environment()
    assert not (tmp_path / "rivals" / "onnxsim" / "ready.json").exists()


def test_methods_say_what_they_remove():
    assert set(METHODS) >= {"wanda", "wanda+finetune", "magnitude", "blocks"}
    assert np.all([("mask" in name) != rivals._ONNXSIM[name].shrinks for name in METHODS])
