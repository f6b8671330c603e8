# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.fashion_data import Images  # noqa: E402
from models.fashion_training import Recipe, train, weights  # noqa: E402
from onnxcollapse.training import Schedule  # noqa: E402

WIDTHS = (16, 24, 24, 24, 4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost these tiny networks more than they gain, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images():
    """Four classes, told apart by which four pixels are bright."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1024).astype(np.uint8)
    pixels = rng.integers(0, 128, (1024, 16)).astype(np.uint8)
    for row, label in zip(pixels, labels, strict=True):
        row[4 * label : 4 * label + 4] += 127
    return Images(pixels, labels)


def accuracy(network, images):
    with torch.no_grad():
        return float((network(torch.from_numpy(images.inputs())).argmax(1).numpy() == images.labels).mean())


def test_chosen_activations_collapse_and_the_task_is_learned(images):
    how = Recipe(
        epochs=12, batch=32, lr=3e-3, alpha_lr=3e-2, collapse=(1, 2), strength=Schedule(1.0, 0.1, 0.4)
    )
    network = train(WIDTHS, images, how, seed=0)
    layers, alphas = weights(network)
    assert accuracy(network, images) > 0.98
    assert len(alphas) == 3
    assert abs(1 - alphas[0]) > 0.5
    assert max(abs(1 - alpha) for alpha in alphas[1:]) < 0.05
    assert [weight.shape for weight, _ in layers] == [(24, 16), (24, 24), (24, 24), (4, 24)]
    assert all(array.dtype == np.float16 for layer in layers for array in layer)


def test_a_relu_network_has_no_alphas_and_a_seed_repeats_it(images):
    how = Recipe(epochs=2, batch=64)
    first, second, other = (weights(train(WIDTHS, images, how, seed))[0] for seed in (3, 3, 4))
    assert weights(train(WIDTHS, images, how, 3))[1] is None
    for (left, _), (right, _) in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(first[0][0], other[0][0])
