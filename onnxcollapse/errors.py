# SPDX-License-Identifier: Apache-2.0
"""The errors that users meet: each names the object, the fact and the remedy in one line."""

from __future__ import annotations


class OnnxCollapseError(Exception):
    """Bad usage or input. The command line prints it in one line and exits with status 2."""

    exit_status = 2


class ModelError(OnnxCollapseError):
    """A model cannot be read, written or rewritten."""


class DataError(OnnxCollapseError):
    """Calibration data does not fit the model or says nothing about it."""


class OptionError(OnnxCollapseError):
    """An option, a pass or a target is unknown or has a value out of range."""


class ProviderError(OnnxCollapseError):
    """An execution provider is unknown or cannot run the model."""


class MetricError(OnnxCollapseError):
    """A metric is unknown or cannot be computed from the outputs."""


class BudgetNotMetError(OnnxCollapseError):
    """The budget or target could not be met; exit status 1."""

    exit_status = 1


class ExportError(OnnxCollapseError):
    """An exported model is not what its source is; exit status 1."""

    exit_status = 1
