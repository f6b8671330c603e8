# SPDX-License-Identifier: Apache-2.0
"""The built-in passes, one rewrite a file; installed as ``onnxcollapse.passes``."""
