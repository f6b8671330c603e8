# SPDX-License-Identifier: Apache-2.0
"""Recipes that build real models, their calibration and evaluation data, and their quality measure."""
