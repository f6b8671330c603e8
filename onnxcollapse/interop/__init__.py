# SPDX-License-Identifier: Apache-2.0
"""Boundaries to other tools; each imports its tool when it is used."""
