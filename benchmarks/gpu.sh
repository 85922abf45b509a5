#!/usr/bin/env bash
# Everything that needs a GPU, in an environment that has a CUDA torch: build, the contract on the
# device, compute-sanitizer on small shapes, benchmarks. benchmarks/gpu.sh [PYTHON], from anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
unset TRITON_INTERPRET
export U2A_BUILD=${U2A_BUILD:-cuda}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

machine=$("$python" - <<'PY'
import torch
print(torch.cuda.get_device_name().replace(" ", "-"), torch.__version__, torch.version.cuda, sep="_")
PY
)
results=benchmarks/results
mkdir -p "$results"

echo "== build"
"$python" -m pip install -q --no-build-isolation --no-deps -e .
"$python" -m u2a_kernels | tee "$results/$machine.txt"

echo "== tests on the device"
"$python" -m pytest -rs tests/test_cuda.py tests/test_cuda_library.py tests/test_index_cuda.py tests/test_build.py

echo "== memory and race checks on small shapes"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
            "$python" -m pytest tests/test_cuda.py -k "test_values and (ragged or one)"
    done
else
    echo "compute-sanitizer: not on PATH, not run"
fi

echo "== benchmarks"
"$python" -m pytest benchmarks \
    --benchmark-timer=torch.utils.benchmark.timer \
    --benchmark-columns=median,iqr,rounds --benchmark-group-by=func \
    --benchmark-json="$results/$machine.json"
echo "written: $results/$machine.txt and .json"
