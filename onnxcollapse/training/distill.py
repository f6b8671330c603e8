# SPDX-License-Identifier: Apache-2.0
"""The loss for training a collapsing model beside its original (arXiv 2311.17943)."""

from __future__ import annotations

import torch
from torch.nn import functional


def distillation_loss(
    logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """0.5 CE(student, labels) + 0.5 KL(teacher || student), to which lc sum (1 - alpha)^2 is added.

    Args:
        logits: the student's [batch, classes].
        labels: class indices [batch].
        teacher_logits: the original model's [batch, classes]; no gradient flows into them.
        temperature: softens both distributions; the KL term is scaled by its square so that its gradient
            keeps its size.

    Returns:
        The loss as a scalar, the mean over the batch.
    """
    student = functional.log_softmax(logits / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return 0.5 * functional.cross_entropy(logits, labels) + 0.5 * temperature**2 * divergence
