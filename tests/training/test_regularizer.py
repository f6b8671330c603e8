# SPDX-License-Identifier: Apache-2.0
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from onnxcollapse.errors import OptionError  # noqa: E402
from onnxcollapse.training import (  # noqa: E402
    AlphaRow,
    OneParameterPReLU,
    Schedule,
    alpha_report,
    collapse_penalty,
    parameter_groups,
    pull_alphas,
)


def network(*alphas):
    layers = []
    for alpha in alphas:
        layers += [nn.Linear(3, 3), OneParameterPReLU(alpha)]
    return nn.Sequential(*layers)


def test_the_penalty_is_the_sum_of_squared_distances_to_one():
    modules = [OneParameterPReLU(0.5), OneParameterPReLU(1.0), OneParameterPReLU(-1.0)]
    penalty = collapse_penalty(modules)
    assert penalty.item() == pytest.approx(0.25 + 0 + 4)
    penalty.backward()
    assert [module.alpha.grad.item() for module in modules] == pytest.approx([-1.0, 0.0, -4.0])


def test_a_penalty_of_nothing_is_an_error():
    with pytest.raises(OptionError, match="no activations"):
        collapse_penalty([])


def test_gradient_descent_on_the_penalty_reaches_the_identity():
    module = OneParameterPReLU(0.0)
    optimizer = torch.optim.SGD([module.alpha], lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        collapse_penalty([module]).backward()
        optimizer.step()
    assert module.alpha.item() == pytest.approx(1 - 0.8**40, rel=1e-5)


@pytest.mark.parametrize(
    ("progress", "expected"), [(0, 0), (0.2, 0), (0.3, 0.5), (0.4, 1.0), (0.6, 2.0), (0.61, 2.0), (1, 2.0)]
)
def test_the_schedule_ramps_linearly(progress, expected):
    assert Schedule(peak=2.0, start=0.2, end=0.6)(progress) == pytest.approx(expected)


def test_a_schedule_without_ramp_is_constant():
    schedule = Schedule(peak=0.5, start=0.0, end=0.0)
    assert [schedule(0.0), schedule(1.0)] == [0.5, 0.5]


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.2), (-0.1, 0.5), (0.0, 1.5)])
def test_a_schedule_out_of_order_is_an_error(start, end):
    with pytest.raises(OptionError, match="0 <= start <= end <= 1"):
        Schedule(1.0, start, end)


def test_the_report_names_what_can_be_folded():
    rows = alpha_report(network(0.5, 0.96, 1.04, 1.06))
    assert [row.name for row in rows] == ["1", "3", "5", "7"]
    assert [row.collapsible for row in rows] == [False, True, True, False]
    assert rows[0] == AlphaRow("1", 0.5, False)
    assert [row.collapsible for row in alpha_report(network(0.96), tolerance=0.01)] == [False]


def test_pulling_moves_a_share_of_the_way():
    modules = [OneParameterPReLU(0.0), OneParameterPReLU(3.0)]
    pull_alphas(modules, 0.25)
    assert [module.alpha.item() for module in modules] == pytest.approx([0.25, 2.5])
    with pytest.raises(OptionError, match="share must be in"):
        pull_alphas(modules, 1.5)


def test_the_pull_is_the_gradient_step_of_plain_descent():
    pulled, stepped, lr, strength = OneParameterPReLU(0.2), OneParameterPReLU(0.2), 0.1, 0.7
    pull_alphas([pulled], 2 * lr * strength)
    (strength * collapse_penalty([stepped])).backward()
    torch.optim.SGD([stepped.alpha], lr=lr).step()
    assert pulled.alpha.item() == pytest.approx(stepped.alpha.item(), rel=1e-6)


def test_alphas_have_no_weight_decay():
    model = network(0.9, 0.8)
    others, alphas = parameter_groups(model, weight_decay=0.1, alpha_lr=0.5)
    assert (others["weight_decay"], alphas["weight_decay"], alphas["lr"]) == (0.1, 0.0, 0.5)
    assert len(others["params"]) == 4
    assert [alpha.item() for alpha in alphas["params"]] == pytest.approx([0.9, 0.8])
    assert "lr" not in parameter_groups(model)[1]
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=0.1)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    model[1].alpha.grad = torch.zeros_like(model[1].alpha)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert model[1].alpha.item() == pytest.approx(0.9)
    torch.testing.assert_close(model[0].weight.detach(), before * (1 - 0.1 * 0.5))
