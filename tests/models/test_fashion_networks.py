# SPDX-License-Identifier: Apache-2.0
"""The torch-trained Fashion-MNIST recipes on a few synthetic images: no download, a step or two of training."""

import json

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from models import (  # noqa: E402
    fashion,
    fashion_data,
    fashion_mlp,
    fashion_networks,
    fashion_training,
    fashion_vgg,
    fashion_vit,
    recipe,
)
from models.fashion_data import Images  # noqa: E402
from onnxcollapse import Model  # noqa: E402
from onnxcollapse.structure import feedforwards, layers  # noqa: E402

SMALL = {  # recipe -> (module, options)
    "mlp": (fashion_mlp, ["--activation", "relu", "--widths", "12,8"]),
    "vgg": (fashion_vgg, []),
    "vit": (fashion_vit, ["--depth", "2", "--width", "16"]),
}


def images(count, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, fashion_data.PIXELS)).astype(np.uint8)
    return Images(pixels, rng.integers(0, fashion_data.CLASSES, count).astype(np.uint8))


@pytest.fixture
def fits(monkeypatch, tmp_path):
    """Synthetic data, a cache of its own, small networks; counts how often one is trained."""
    train, test = images(96, 0), images(40, 1)
    calls = []
    fit = fashion_training.fit
    default = fashion_training.Recipe
    monkeypatch.setenv("ONNXCOLLAPSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_data, "full", lambda: (train, test))
    monkeypatch.setattr(fashion_vgg, "CHANNELS", (4, 0, 6, 0, 8, 0))
    monkeypatch.setattr(fashion_vgg, "HEAD", (16, 12))
    monkeypatch.setattr(
        fashion_training, "Recipe", lambda **options: default(**(options | {"epochs": 2, "batch": 32}))
    )
    monkeypatch.setattr(fashion_training, "fit", lambda *args: calls.append(args[0]) or fit(*args))
    return calls


def build(name, folder, *options):
    module, chosen = SMALL[name]
    status = module.main(["-o", str(folder), "--calibration", "20", *chosen, *options])
    assert status == 0
    return folder


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_builds_trains_once_and_repeats_itself(fits, name, tmp_path, capsys):
    first = build(name, tmp_path / "first")
    second = build(name, tmp_path / "second")
    assert len(fits) == 1
    files = (recipe.MODEL, recipe.CALIBRATION, recipe.EVALUATION, fashion.LABELS)
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()
    for file in (tmp_path / "cache" / "trained").iterdir():
        file.unlink()
    third = build(name, tmp_path / "third")
    assert len(fits) == 2
    assert (first / recipe.MODEL).read_bytes() == (third / recipe.MODEL).read_bytes()
    build(name, tmp_path / "fourth", "--seed", "1")
    assert len(fits) == 3
    assert (first / recipe.MODEL).read_bytes() != (tmp_path / "fourth" / recipe.MODEL).read_bytes()


@pytest.mark.parametrize("name", SMALL)
def test_the_data_keep_training_and_test_images_apart_and_are_measured(fits, name, tmp_path, capsys):
    folder = build(name, tmp_path)
    train, test = fashion_data.full()
    shape = (fashion_data.PIXELS,) if name == "mlp" else (1, 28, 28)
    calibration = recipe.read_npz(folder / recipe.CALIBRATION)[fashion.INPUT]
    evaluation = recipe.read_npz(folder / recipe.EVALUATION)[fashion.INPUT]
    assert calibration.shape == (20, *shape)
    assert {row.tobytes() for row in calibration} < {row.tobytes() for row in train.inputs()}
    np.testing.assert_array_equal(evaluation.reshape(40, -1), test.inputs())
    assert SMALL[name][0].main(["-o", str(folder), "--measure", str(folder / recipe.MODEL)]) == 0
    network = fits[0]
    with torch.no_grad():
        classes = network(torch.from_numpy(test.squares())).argmax(1).numpy()
    found = json.loads(capsys.readouterr().out)
    assert found["measure"] == "accuracy"
    assert found["samples"] == 40
    assert found["value"] == pytest.approx((classes == test.labels).mean(), abs=1.01 / 40)


@pytest.mark.parametrize("name", ["vgg", "vit"])
def test_the_onnx_model_computes_the_torch_network(fits, name, tmp_path):
    folder = build(name, tmp_path)
    onnx.checker.check_model(onnx.load(folder / recipe.MODEL), full_check=True)
    session = recipe.open_session(folder / recipe.MODEL)
    for count in (1, 7):
        x = images(count, 5).squares()
        (found,) = session.run([fashion.OUTPUT], {fashion.INPUT: x})
        with torch.no_grad():
            expected = fits[0](torch.from_numpy(x)).numpy()
        assert np.ptp(expected) > 0.01
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_vgg_keeps_batch_normalization_and_its_head_is_found(fits, tmp_path):
    graph = Model.load(build("vgg", tmp_path) / recipe.MODEL).graph
    ops = [node.op_type for node in graph if node.op_type != "Identity"]
    assert ops == [
        *["Conv", "BatchNormalization", "Relu", "MaxPool"] * 3, "Flatten",
        "Gemm", "Relu", "Gemm", "Relu", "Gemm",
    ]  # fmt: skip
    assert [(site.d_in, site.d_hidden, site.d_out) for site in feedforwards(graph)[0]] == [
        (72, 16, 12),
        (16, 12, 10),
    ]


@pytest.mark.parametrize("depth", [6, 12])
def test_every_layer_and_feed_forward_of_the_vit_is_found(depth, tmp_path):
    torch.manual_seed(0)
    network = fashion_networks.VisionTransformer(depth, 32, 7)
    fashion.export(network, tmp_path / recipe.MODEL)
    graph = Model.load(tmp_path / recipe.MODEL).graph
    sites, refusals = feedforwards(graph)
    assert [(site.d_in, site.d_hidden, site.d_out) for site in sites] == [(32, 128, 32)] * depth
    assert not refusals
    (run,) = layers(graph)
    assert [block.is_residual for block in run] == [True] * depth
    assert not {node.op_type for node in graph} & {"Shape", "Gather", "Slice"}


def test_other_training_or_other_data_is_another_network(fits):
    how = fashion_training.Recipe()
    train, test = fashion_data.full()

    def one(data, way, make=lambda: fashion_networks.mlp((fashion_data.PIXELS, 4, 10))):
        return fashion_training.trained("net", make, data, way, 0)

    one(train, how)
    one(train, how)
    assert len(fits) == 1
    one(train, fashion_training.Recipe(lr=0.1))
    one(test, how)
    one(train, how, lambda: fashion_networks.mlp((fashion_data.PIXELS, 5, 10)))
    assert len(fits) == 4


def test_a_cache_key_ignores_words_and_sees_code():
    code = fashion_training._code
    assert code('def f():\n    """Doc."""\n    return 1  # why\n') == code("def f():\n    return 1\n")
    assert code("def f():\n    return 1\n") != code("def f():\n    return 2\n")


def test_training_stops_when_images_kept_back_are_classed_no_better(monkeypatch):
    found = iter([0.1, 0.3, 0.2, 0.3, 0.25, 0.9])
    kept = []
    monkeypatch.setattr(
        fashion_training, "accuracy", lambda network, held: kept.append(len(held.labels)) or next(found)
    )
    how = fashion_training.Recipe(
        epochs=6, batch=8, lr=0.01, momentum=0.9, softmax=True, validation=10, patience=3
    )
    fashion_training.fit(fashion_networks.mlp((784, 4, 10)), images(40, 0), how, 0)
    assert kept == [10] * 5


def test_a_split_is_a_partition():
    whole = images(30, 0)
    rest, kept = whole.split(8, seed=1)
    assert (len(rest.labels), len(kept.labels)) == (22, 8)
    np.testing.assert_array_equal(kept.pixels, whole.sample(8, seed=1).pixels)
    together = {row.tobytes() for part in (rest, kept) for row in part.pixels}
    assert together == {row.tobytes() for row in whole.pixels}


def test_the_published_training_is_chosen(fits, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(fashion_training, "fit", lambda network, data, how, seed: seen.append(how))
    build("mlp", tmp_path, "--published")
    assert seen == [fashion_training.PUBLISHED_LINEARITY]


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (fashion_mlp, ["--widths", "8,8"], "add --activation relu"),
        (fashion_mlp, ["--published"], "add --activation relu"),
        (fashion_mlp, ["--calibration", "4001"], "from 1 to 4000"),
        (fashion_mlp, ["--activation", "relu", "--calibration", "97"], "from 1 to 96"),
        (fashion_vgg, ["--calibration", "97"], "from 1 to 96"),
        (fashion_vgg, ["--calibration", "0"], "from 1 to 96"),
        (fashion_vit, ["--width", "20"], "multiple of 16"),
    ],
)
def test_options_that_cannot_be_met_are_one_line(fits, module, options, message, tmp_path, capsys):
    assert module.main(["-o", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not fits


def test_fewer_images_of_the_checkout_can_be_calibrated_on(tmp_path):
    assert fashion_mlp.main(["-o", str(tmp_path), "--calibration", "100"]) == 0
    assert recipe.read_npz(tmp_path / recipe.CALIBRATION)[fashion.INPUT].shape == (100, 784)
