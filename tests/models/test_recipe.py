# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from models import recipe
from models.recipe import RecipeError


def test_npz_is_byte_identical(tmp_path):
    arrays = {"a": np.arange(5), "b": np.ones((2, 3), np.float32)}
    recipe.write_npz(tmp_path / "one.npz", arrays)
    recipe.write_npz(tmp_path / "two.npz", arrays)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    read = recipe.read_npz(tmp_path / "one.npz")
    assert list(read) == ["a", "b"]
    np.testing.assert_array_equal(read["b"], arrays["b"])


def test_a_failed_write_keeps_the_old_file(tmp_path):
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(RuntimeError), recipe.replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_missing_file_says_to_build(tmp_path):
    with pytest.raises(RecipeError, match="build the recipe into"):
        recipe.read_npz(tmp_path / "eval.npz")


def test_a_missing_package_comes_with_its_pip_command():
    with pytest.raises(RecipeError, match=r"needs no_such_package, no_such\.module: pip install thing"):
        recipe.require("json", "no_such_package", "no_such.module", install="thing")


def test_a_missing_or_broken_model_is_a_recipe_error(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        recipe.open_session(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(RecipeError, match="cannot load"):
        recipe.open_session(tmp_path / "model.onnx")


class Builder:
    """Counts builds and writes the files of a recipe."""

    def __init__(self):
        self.builds = 0

    def __call__(self, args):
        self.builds += 1
        for name in (recipe.MODEL, recipe.CALIBRATION, recipe.EVALUATION):
            with recipe.replacing(args.output / name) as temporary:
                temporary.write_text(args.flavour)


def run(builder, folder, *extra):
    parser = recipe.arguments("test", "A test.")
    parser.add_argument("--flavour", default="plain")
    arguments = ["-o", str(folder), *extra]
    return recipe.run(parser.parse_args(arguments), builder, lambda args: {"measure": "m", "value": 0.5})


def test_a_finished_build_is_skipped(tmp_path):
    builder = Builder()
    assert [run(builder, tmp_path / "out") for _ in range(2)] == [0, 0]
    assert builder.builds == 1


@pytest.mark.parametrize("change", ["option", "force", "file"])
def test_a_build_is_repeated_when_it_must_be(change, tmp_path):
    builder = Builder()
    run(builder, tmp_path)
    if change == "file":
        (tmp_path / recipe.EVALUATION).unlink()
    extra = {"option": ["--flavour", "other"], "force": ["--force"], "file": []}[change]
    run(builder, tmp_path, *extra)
    assert builder.builds == 2


def test_an_interrupted_build_is_not_taken_for_a_finished_one(tmp_path):
    builder = Builder()
    run(builder, tmp_path)

    def failing(args):
        raise RecipeError("no luck: try again")

    assert run(failing, tmp_path, "--force") == 2
    run(builder, tmp_path)
    assert builder.builds == 2


def test_measuring_prints_one_json_line_and_builds_nothing(tmp_path, capsys):
    builder = Builder()
    assert run(builder, tmp_path, "--measure", "some.onnx") == 0
    assert json.loads(capsys.readouterr().out) == {"measure": "m", "value": 0.5}
    assert builder.builds == 0


def test_an_error_is_one_line_on_stderr(tmp_path, capsys):
    def failing(args):
        raise RecipeError("no luck: try again")

    assert run(failing, tmp_path) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: no luck: try again\n"


def test_an_output_that_is_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert run(Builder(), tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_source_and_model_are_built_apart(tmp_path):
    parser = recipe.arguments("thing", None)
    recipe.add_source(parser)
    whole, source = (parser.parse_args(["-o", str(tmp_path), *extra]) for extra in ([], ["--source"]))

    def build(args):
        for name in (recipe.CALIBRATION, recipe.EVALUATION, *([] if args.source else [recipe.MODEL])):
            (tmp_path / name).touch()
        if args.source:
            with recipe.filling(tmp_path / recipe.SOURCE) as folder:
                (folder / "config.json").touch()

    assert recipe.run(source, build) == 0
    assert (recipe.is_built(source), recipe.is_built(whole)) == (True, False)
    assert recipe.run(whole, build) == 0
    assert recipe.is_built(whole)
    assert "source" not in json.loads((tmp_path / recipe.STAMP).read_text()), (
        "folders built before stay built"
    )


def test_a_folder_is_filled_at_the_end_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), recipe.filling(tmp_path / "a") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
