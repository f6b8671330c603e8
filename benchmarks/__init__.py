# SPDX-License-Identifier: Apache-2.0
"""What is measured, against whom; every benchmark is a command and writes JSON with the machine named."""
