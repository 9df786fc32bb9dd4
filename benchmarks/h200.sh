#!/usr/bin/env bash
# Everything that is measured on a GPU, in under ten minutes: JSON files and logs in the folder $1 (runs/h200).
# A part that fails or runs out of its time leaves its log, and the others go on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT="${1:-runs/h200}"
PYTHON="${PYTHON:-python}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
failed=0

part() { # name, seconds, arguments of speed.py
    local name="$1" limit="$2"
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$limit" "$PYTHON" benchmarks/speed.py --device cuda "$@" --output "$OUT/$name.json" \
        2>&1 | tee "$OUT/$name.log" || { echo "== $name: failed or out of time" | tee -a "$OUT/$name.log"; failed=1; }
}

row=(--recipe cifar10-wrn402-wrn162-k5 --student cifar/wrn16_2)
"$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' | tee "$OUT/machine.txt"
if "$PYTHON" -c 'import pytest' 2> /dev/null; then
    echo "== tests"
    timeout --kill-after=5 60 "$PYTHON" -m pytest -q tests/test_cuda.py 2>&1 | tail -40 | tee "$OUT/tests.log"
else
    echo "pytest is not installed: tests/test_cuda.py was not run" | tee "$OUT/tests.log"
fi
part published-tenth 60 --published --graphs --rounds 22
part speed 110 "${row[@]}" --graphs --columns plain float32 ours
part large 90 --large --graphs --repeats 3
part memory 50 "${row[@]}" --memory
# The paper's whole schedule takes what is left; a tenth of it stands above already.
part published "$((590 - SECONDS))" --published --graphs
exit "$failed"
