# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

HEAVY = (
    "torch",
    "transformers",
    "matplotlib",
    "onnxruntime",
    "scipy",
    "onnx",
    "onnx_ir",
    "onnx_graphsurgeon",
)

LOADED = f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)\n"


@pytest.mark.parametrize(
    "code",
    [
        "import onnxcollapse\n",
        "from onnxcollapse.cli import main\nmain(['--help'], standalone_mode=False)\n",
        "from onnxcollapse.cli import main\nmain(['--version'], standalone_mode=False)\n",
        "from onnxcollapse.cli import main\nmain(['optimize', '--help'], standalone_mode=False)\n",
        "from onnxcollapse.cli import main\nmain(['compare', '--help'], standalone_mode=False)\n",
        "from onnxcollapse.cli import main\nmain(['sweep', '--help'], standalone_mode=False)\n",
        "from onnxcollapse.cli import main\nmain(['bench', '--help'], standalone_mode=False)\n",
        "from onnxcollapse.cli import main\nmain(['export', '--help'], standalone_mode=False)\n",
    ],
)
def test_starting_is_quick_because_nothing_heavy_is_imported(process, code):
    done = process(prelude="import json, sys\n" + code + LOADED)
    assert done.returncode == 0
    assert json.loads(done.stderr) == []


def test_the_module_is_the_command(process):
    done = process("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: onnxcollapse ")
    for command in ("optimize", "sweep", "analyze", "compare", "bench", "export", "passes", "doctor"):
        assert command in done.stdout
    done = process("optimize", "missing.onnx", "-o", "out.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "onnxcollapse: missing.onnx does not exist; give an .onnx file or a folder that holds one\n"
    )


def test_every_public_name_exists():
    import onnxcollapse

    for name in onnxcollapse.__all__:
        assert getattr(onnxcollapse, name) is not None
    with pytest.raises(AttributeError, match="'onnxcollapse' has no attribute 'missing'"):
        _ = onnxcollapse.missing
