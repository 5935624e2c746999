#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and its own torch, without network: build against that torch, run the
# suite on the device, compute-sanitizer on a small case of each kernel, then the benchmark tables.
# Everything is written to the folder given, each step's part when the step ends; the exit status tells
# whether all of it passed.
set -uo pipefail
: "${1:?usage: tools/gpu.sh RESULTS}"
results=$(mkdir -p "$1" && cd "$1" && pwd) || exit 1
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
grace=5
: >"$results/steps.txt"

# Each step ends by a time of its own, counted from the start: what an early step leaves, the next one has,
# and none takes from those after it.
step() {  # name, second by which it has ended, command...
  local name=$1 until=$2 start=$SECONDS status=124
  local limit=$((until - start - grace))
  shift 2
  : >"$results/$name.log"
  if ((limit > 0)); then  # 0 would be no limit
    # Interrupted rather than ended, so that pytest still says how far it came.
    timeout -s INT -k $grace $limit "$@" >"$results/$name.log" 2>&1
    status=$?
  fi
  printf '%-18s %4d s  exit %d  %s\n' "$name" $((SECONDS - start)) $status "$(tail -n 1 "$results/$name.log")" |
    tee -a "$results/steps.txt"
}

# Only this machine's architecture: the others cost time and would not run here.
arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} CAMKERNELS_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
step build 120 "$python" setup.py build_ext --inplace
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
step doctor 135 "$python" -m camkernels doctor

# Without the files and the backend that need no device: they run wherever the suite does.
host_only=(attention_consistency backend bad_input benchmarks cpu_products "cuda_*" distributed examples
  gpu_script metrics pairwise_consistency properties readme triton_aot weighted_bce)
ignored=("${host_only[@]/#/--ignore-glob=tests/test_}")
workers=$(($(nproc) < 12 ? $(nproc) : 12))
step tests 285 "$python" -m pytest tests -q -n "$workers" --dist loadgroup -k "not cpu" "${ignored[@]/%/.py}"

# Side by side: they wait for the sanitizer's own work on the host more than for the device.
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
for tool in memcheck racecheck synccheck initcheck; do
  step "$tool" 350 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tools/sanitizer_case.py &
done
wait

# First without torch.compile, whose compilations may not fit into what is left, and in a folder of its own,
# so that a run which ends early takes nothing from it.
bench=(--rows all --device cuda --providers)
step eager 410 "$python" -m pytest benchmarks "${bench[@]}" eager,camkernels,gathered,released \
  --results "$results/without-compile"
compiled=eager,compile,compile-max-autotune,camkernels
step compile_seeds 437 "$python" -m pytest benchmarks/bench_cam_seeds.py "${bench[@]}" $compiled --results "$results"
step compile_erase 464 "$python" -m pytest benchmarks/bench_cam_erase.py "${bench[@]}" $compiled --results "$results"
step compile_transform 491 "$python" -m pytest benchmarks/bench_cam_transform_mse.py "${bench[@]}" $compiled \
  --results "$results"
step compile_negative 518 "$python" -m pytest benchmarks/bench_negative_cam_loss.py "${bench[@]}" $compiled \
  --results "$results"
step compile_focus 535 "$python" -m pytest benchmarks/bench_focus_area.py "${bench[@]}" $compiled --results "$results"

failed=$(grep -v '  exit 0  ' "$results/steps.txt" | cut -d' ' -f1 | tr '\n' ' ')
[ -z "$failed" ] && echo "all passed; results in $results" && exit 0
echo "failed: ${failed% }; the logs are in $results"
exit 1
