#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and its own torch, without network: build against that torch, run the
# suite on the device, compute-sanitizer on a small case of each kernel, then the benchmark tables.
# Everything is written to the folder given; the exit status tells whether all of it passed.
set -uo pipefail
: "${1:?usage: tools/gpu.sh RESULTS}"
results=$(mkdir -p "$1" && cd "$1" && pwd) || exit 1
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=()

step() {  # name, most seconds, command...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  ((seconds < deadline - SECONDS)) || seconds=$((deadline - SECONDS))
  local status=124
  if ((seconds > 0)); then
    # Interrupted rather than ended, so that benchmarks still write what they have.
    timeout -s INT -k 15 "$seconds" "$@" >"$results/$name.log" 2>&1
    status=$?
  fi
  [ $status -eq 0 ] || failed+=("$name")
  printf '%-12s %4d s  exit %d  %s\n' "$name" $((SECONDS - start)) $status "$(tail -n 1 "$results/$name.log" 2>/dev/null)"
}

deadline=530  # everything in under 9 minutes: what comes last gets what is left
# Only this machine's architecture: the others cost time and would not run here.
arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} CAMKERNELS_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
step build 120 "$python" setup.py build_ext --inplace
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
step doctor 30 "$python" -m camkernels doctor
# Without the files that need no device: they run wherever the suite does.
host_only=(cuda_emulator cuda_build triton_aot benchmarks examples backend bad_input properties
  pairwise_consistency weighted_bce attention_consistency)
ignored=("${host_only[@]/#/--ignore=tests/test_}")
step tests 200 "$python" -m pytest tests -q -n "$(($(nproc) < 8 ? $(nproc) : 8))" "${ignored[@]/%/.py}"
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
for tool in memcheck racecheck synccheck initcheck; do
  step "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tools/sanitizer_case.py
done
# First without torch.compile, whose compilations may not fit into what is left; a second run that ends in
# time replaces the results of the first.
bench=("$python" -m pytest benchmarks --rows all --device cuda --results "$results")
step eager 90 "${bench[@]}" --providers eager,camkernels
step compile 240 "${bench[@]}"

[ ${#failed[@]} -eq 0 ] && echo "all passed; results in $results" && exit 0
echo "failed: ${failed[*]}; the logs are in $results"
exit 1
