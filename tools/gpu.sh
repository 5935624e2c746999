#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and its own torch, without network: build against that torch, run the
# suite on the device, compute-sanitizer on a small case of each kernel, then the benchmarks. With "compile",
# which is a run of its own, build and take the benchmark tables in which torch.compile has its rows.
# Everything is written to the folder given, each step's part when the step ends; the exit status tells
# whether all of it passed. Either run ends within nine minutes.
set -uo pipefail
usage="usage: tools/gpu.sh RESULTS [compile]"
: "${1:?$usage}"
[[ ${2:-} == "" || $2 == compile ]] || { echo "$usage" >&2 && exit 2; }
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
  printf '%-26s %4d s  exit %d  %s\n' "$name" $((SECONDS - start)) $status "$(tail -n 1 "$results/$name.log")" |
    tee -a "$results/steps.txt"
}

# Only this machine's architecture: the others cost time and would not run here.
arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} CAMKERNELS_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
step build 120 "$python" setup.py build_ext --inplace
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
step doctor 135 "$python" -m camkernels doctor

rows=(--rows all --device cuda)
if [[ ${2:-} == "" ]]; then
  # Without the files and the backend that need no device: they run wherever the suite does.
  host_only=(attention_consistency backend "bad_input*" benchmarks cpu_products "cuda_*" distributed examples
    gpu_script metrics pairwise_consistency properties readme triton_aot weighted_bce)
  ignored=("${host_only[@]/#/--ignore-glob=tests/test_}")
  workers=$(($(nproc) < 12 ? $(nproc) : 12))
  step tests 320 "$python" -m pytest tests -q -n "$workers" --dist loadgroup -k "not cpu" "${ignored[@]/%/.py}"

  # Side by side: they wait for the sanitizer's own work on the host more than for the device.
  PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" 390 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tools/sanitizer_case.py &
  done
  wait

  step benchmarks 535 "$python" -m pytest benchmarks "${rows[@]}" \
    --providers eager,camkernels,gathered,released,exact,skimage --results "$results/without-compile"
else
  # Compilations take most of it: a step for each op, so that one which ends early takes nothing from another.
  until=135
  for share in local_activations:65 otsu_mask:20 local_level_loss:20 masked_max_pool:30 crop_and_zoom:25 \
    attention_boxes:15 cam:20 cam_seeds:40 cam_erase:40 cam_transform_mse:40 negative_cam_loss:50 focus_area:15 \
    stochastic_consistency:20; do
    op=${share%:*} until=$((until + ${share#*:}))
    step "compile_$op" $until "$python" -m pytest "benchmarks/bench_$op.py" "${rows[@]}" \
      --providers eager,compile,compile-max-autotune,camkernels --results "$results"
  done
fi

failed=$(grep -v '  exit 0  ' "$results/steps.txt" | cut -d' ' -f1 | tr '\n' ' ')
[ -z "$failed" ] && echo "all passed; results in $results" && exit 0
echo "failed: ${failed% }; the logs are in $results"
exit 1
