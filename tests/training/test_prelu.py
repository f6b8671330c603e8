# SPDX-License-Identifier: Apache-2.0
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from onnxcollapse.errors import OptionError  # noqa: E402
from onnxcollapse.training import OneParameterPReLU, activations, swap_activations  # noqa: E402


def is_gelu(name, child):
    return isinstance(child, nn.GELU)


def test_the_formula():
    z = torch.tensor([-2.0, -0.5, 0.0, 3.0], dtype=torch.float64)
    module = OneParameterPReLU(0.25).double()
    torch.testing.assert_close(module(z), torch.tensor([-0.5, -0.125, 0.0, 3.0], dtype=torch.float64))


def test_it_is_relu_at_zero_and_the_identity_at_one():
    z = torch.linspace(-3, 3, 13).reshape(1, 13, 1)
    assert torch.equal(OneParameterPReLU(0.0)(z), z.relu())
    assert torch.equal(OneParameterPReLU(1.0)(z), z)


def test_the_slope_s_gradient_is_the_sum_of_the_negative_part():
    module = OneParameterPReLU(0.1)
    module(torch.tensor([-2.0, 1.0, -3.0])).sum().backward()
    assert module.alpha.grad.item() == pytest.approx(-5)


def test_the_default_slope_is_the_paper_s():
    assert OneParameterPReLU().alpha.item() == pytest.approx(0.01)


def test_only_selected_activations_are_swapped():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.ReLU()))
    swapped = swap_activations(model, lambda name, child: is_gelu(name, child) and name.startswith("2."))
    assert list(swapped) == ["2.1"]
    assert model[2][1] is swapped["2.1"]
    assert isinstance(model[1], nn.GELU)
    assert isinstance(model[2][2], nn.ReLU)
    assert dict(activations(model)) == swapped


def test_a_shared_activation_becomes_one_for_each_place():
    shared = nn.GELU()
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    swapped = swap_activations(model, is_gelu, alpha=0.5)
    assert list(swapped) == ["1", "3"]
    assert swapped["1"].alpha is not swapped["3"].alpha
    assert len(list(activations(model))) == 2


def test_swapping_relu_at_zero_keeps_the_function():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 4)
    before = model(x)
    swap_activations(model, lambda _, child: isinstance(child, nn.ReLU), alpha=0.0)
    assert torch.equal(model(x), before)


def test_the_new_activation_has_the_model_s_dtype():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).double()
    assert swap_activations(model, is_gelu)["1"].alpha.dtype == torch.float64


def test_selecting_nothing_is_an_error():
    with pytest.raises(OptionError, match="no submodule was selected"):
        swap_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), is_gelu)


def test_it_exports_as_one_prelu(tmp_path):
    import onnx

    model = nn.Sequential(nn.Linear(4, 4), OneParameterPReLU(0.25), nn.Linear(4, 2))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.ones(1, 4),), str(path), dynamo=False, opset_version=17)
    assert [node.op_type for node in onnx.load(path).graph.node if node.op_type != "Constant"].count(
        "PRelu"
    ) == 1
