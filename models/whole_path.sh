#!/bin/sh
# The whole path of a real model: its weights, the export, optimization, comparison and latency.
#
#   sh models/whole_path.sh minilm_l6 out        a sentence encoder, minutes
#   sh models/whole_path.sh smollm2 out          a decoder with KV cache; takes 4 GB of memory and much longer
#
# Needs pip install -e ".[export]" -r models/requirements.txt. PYTHON names the interpreter, SHARE the share of the
# parameters to keep. Run it from the checkout.
set -eu

[ $# -eq 2 ] || { echo "usage: sh models/whole_path.sh minilm_l6|smollm2 FOLDER" >&2; exit 2; }
name=$1 out=$2 python=${PYTHON:-python} share=${SHARE:-0.8}
case $name in
  minilm_l6) metric=rel-l2 ;;
  smollm2) metric=kl ;;
  *) echo "no recipe '$name'; give minilm_l6 or smollm2" >&2; exit 2 ;;
esac
onnxcollapse() { "$python" -m onnxcollapse "$@"; }

"$python" -m "models.$name" -o "$out" --source
onnxcollapse export "$out/source" -o "$out/original"
onnxcollapse optimize "$out/original" -o "$out/optimized" --calib "$out/calib.npz" --metric "$metric" \
  --target "params=$share" --report "$out/report"
onnxcollapse compare "$out/original" "$out/optimized" --data "$out/eval.npz"
onnxcollapse bench "$out/original" "$out/optimized"
