#!/usr/bin/env bash
# Everything that needs a GPU, in an environment that has a CUDA torch: build, the contract on the
# device, compute-sanitizer on small shapes, benchmarks, products of whole models up to 16384 tokens.
# What the numbers are to be compared with: benchmarks/paper.py, benchmarks/paper_dual.py.
# benchmarks/gpu.sh [PYTHON] [STAGE...], from anywhere; stages: build test sanitize bench model (all
# by default). BENCH: which benchmark files, a glob.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
stages=" ${*:2} "
[ "$stages" = "  " ] && stages=" build test sanitize bench model "
wanted() { [[ $stages == *" $1 "* ]]; }
bench=${BENCH:-bench_grad_*.py bench_index.py bench_linear_logp.py bench_dual_*.py bench_scan.py}
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

if wanted build; then
    echo "== build"
    "$python" -m pip install -q --no-build-isolation --no-deps -e .
    "$python" -m u2a_kernels | tee "$results/$machine.txt"
fi

if wanted test; then
    echo "== tests on the device"
    "$python" -m pytest -rs tests/test_cuda.py tests/test_cuda_library.py tests/test_index_cuda.py tests/test_build.py
fi

if wanted sanitize; then
    echo "== memory and race checks on small shapes"
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer: not on PATH"; exit 1; }
    # racecheck sees shared memory; what one row of global memory is written onto while it is read,
    # test_cuda.py runs again and again.
    checked="ragged or one or dual_softmax or (dual_linear_cross_entropy and (blocks or tiles))"
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
            "$python" -m pytest tests/test_cuda.py -k "(test_values or test_gradients) and ($checked)"
    done
fi

if wanted bench; then
    echo "== benchmarks"
    # shellcheck disable=SC2086
    (cd benchmarks && "$python" -m pytest $bench \
        --benchmark-timer=torch.utils.benchmark.timer \
        --benchmark-columns=median,iqr,rounds --benchmark-group-by=func \
        --benchmark-json="results/$machine.json")
    echo "written: $results/$machine.txt and .json"
fi

if wanted model; then
    products="$results/$machine-second-order.txt"
    : > "$products"
    # A process of its own for every length: what does not fit ends that length, not the stage.
    second_order() {
        (cd benchmarks && "$python" bench_second_order.py --no-reference "$@") 2>&1 |
            tee -a "$products" || echo "stopped: $*" | tee -a "$products"
    }
    echo "== products over one gradient by sequence length: small models, LoRA and all parameters"
    for t in 128 512 1024 2048 4096 8192 16384; do second_order --t "$t" --dtype bfloat16; done
    echo "== Llama of 1B parameters, bf16, LoRA"
    for t in 512 2048 8192 16384; do
        second_order --model llama --size 1b --vocab 128256 --dtype bfloat16 --t "$t"
    done
    second_order --model llama --head
    echo "== the outer step"
    (cd benchmarks && "$python" bench_outer_step.py) | tee "$results/$machine-outer-step.txt"
fi
