# SPDX-License-Identifier: Apache-2.0
import math

import pytest

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402

from onnxcollapse.training import distillation_loss  # noqa: E402

LABELS = torch.tensor([0, 1])


def test_it_is_half_cross_entropy_for_a_perfect_student():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    expected = 0.5 * functional.cross_entropy(logits, LABELS)
    torch.testing.assert_close(distillation_loss(logits, LABELS, logits.clone()), expected)


def test_the_formula_by_hand():
    student, teacher = torch.zeros(1, 2), torch.log(torch.tensor([[0.9, 0.1]]))
    divergence = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    expected = 0.5 * math.log(2) + 0.5 * divergence
    assert distillation_loss(student, LABELS[:1], teacher).item() == pytest.approx(expected, rel=1e-6)


def test_temperature_softens_and_rescales():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2), torch.randn(2, 2)
    soft = functional.kl_div((student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="batchmean")
    expected = 0.5 * functional.cross_entropy(student, LABELS) + 0.5 * 9 * soft
    torch.testing.assert_close(distillation_loss(student, LABELS, teacher, temperature=3.0), expected)


def test_no_gradient_reaches_the_teacher():
    student, teacher = (torch.randn(2, 2, requires_grad=True) for _ in range(2))
    distillation_loss(student, LABELS, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
