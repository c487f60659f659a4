#!/usr/bin/env bash
# Proves on a machine with an NVIDIA GPU what needs one, and leaves the logs in a folder:
#
#   bash scripts/gpu_proof.sh                 # everything, about 20 minutes on an H200
#   bash scripts/gpu_proof.sh report install check    # some steps, where a session is short
#
# Steps: report (the machine), install (the package, from this checkout), tests (tests/test_gpu.py and others that take a
# CUDA device), check (every case against the float64 reference), speed (against PyTorch's paths). check and speed are the
# parts of `python -m fastattn bench --gpu`. host-time: what a small call costs the processor. tma: check and speed again
# with loads by descriptors, beside those of speed. cuda builds the CUDA kernels, where there is nvcc, checks them, and
# runs some small cases under compute-sanitizer; cuda-speed times them. Nothing is fetched: the python3 on PATH must have
# torch with CUDA and triton (PYTHON=... names another). The native core for CPU is built where a compiler, cmake, ninja
# and pybind11 are there.
#
# The status is 0 where every step that ran succeeded. OUT=... names the folder for logs (default: gpu-proof). A step
# that hangs is ended, so that the others still run: after LIMIT=... seconds (default: 900).
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
OUT="${OUT:-$PWD/gpu-proof}"
BENCH_FLAGS="${BENCH_FLAGS:-}"
LIMIT="${LIMIT:-900}"
STEPS=(report install tests check host-time speed tma cuda cuda-speed)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # where installing fails, the other steps still run
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"  # where nvcc lies without being on PATH

report() {
  date -u
  git log -1 --oneline 2>/dev/null
  nvidia-smi || echo "nvidia-smi tells nothing"
  "$PYTHON" - <<'PY'
import platform
import torch, triton

print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version(), "available:", torch.cuda.is_available())
for number in range(torch.cuda.device_count()):
    print(number, torch.cuda.get_device_properties(number))
raise SystemExit(not torch.cuda.is_available())
PY
  # One call says at once whether Triton can compile and start kernels here, for which it needs a C compiler.
  command -v cc || command -v gcc || command -v clang || echo "no C compiler: Triton's launcher cannot be built"
  limited "$PYTHON" - <<'PY'
import torch
import fastattn

q, k, v = (torch.randn(1, 2, 200, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
results = []
for backend in ("triton", "reference"):
    out = fastattn.attention(q, k, v, mask=fastattn.masks.causal(), backend=backend)
    results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
for name, got, want in zip(("out", "dq", "dk", "dv"), *results):
    print(f"{name}: differs from the reference by {(got - want).abs().max():.2g} of {want.abs().max():.2g}")
PY
}

limited() { timeout --kill-after=20 "$LIMIT" "$@"; }

install() {
  local flags=(--no-deps --no-build-isolation --no-index --editable .)
  if "$PYTHON" -c 'import pybind11' 2>/dev/null && command -v cmake && command -v ninja && command -v c++; then
    "$PYTHON" -m pip install "${flags[@]}" || FASTATTN_NATIVE=0 "$PYTHON" -m pip install "${flags[@]}"
  else
    echo "no pybind11, cmake, ninja or C++ compiler: the pure-Python part alone, which has the Triton kernels"
    FASTATTN_NATIVE=0 "$PYTHON" -m pip install "${flags[@]}"
  fi && "$PYTHON" -m fastattn info --device cuda
}

tests() {
  "$PYTHON" -c 'import pytest' || { echo "pytest is not installed: tests skipped"; return 1; }
  limited "$PYTHON" -m pytest -p no:cacheprovider tests/test_gpu.py tests/test_triton.py
}

check() { limited "$PYTHON" -m fastattn bench --gpu check --out "$OUT/check" $BENCH_FLAGS; }
speed() { limited "$PYTHON" -m fastattn bench --gpu speed --out "$OUT/speed" $BENCH_FLAGS; }

# Loads by Hopper's copy engine, which are off until a device has shown them to be right and faster.
tma() {
  [ -e "$OUT/speed/gpu.json" ] || speed || return 1
  FASTATTN_TRITON_TMA=1 limited "$PYTHON" -m fastattn bench --gpu --out "$OUT/tma" $BENCH_FLAGS || return 1
  "$PYTHON" - "$OUT/speed/gpu.json" "$OUT/tma/gpu.json" <<'PY'
import json, sys

pointers, copies = (
    {row["case"]: row["ms"] for row in json.load(open(path))["rows"] if row["path"] == "fastattn"} for path in sys.argv[1:]
)
print("milliseconds by pointers, by the copy engine, and their ratio, of two runs minutes apart")
for name in pointers:
    if name in copies:
        print(f"{name:<42}{pointers[name]:>9.3f}{copies[name]:>9.3f}{pointers[name] / copies[name]:>7.2f}")
PY
}

host-time() { limited "$PYTHON" -m fastattn.bench.gpu.host_time --out "$OUT/host_time.json"; }

# The Hopper kernels have never run on a device: the first thing to look at is the log of this step. It ends at once
# where the first calls, of which each adds one thing, are not right.
cuda() {
  command -v nvcc >/dev/null || { echo "no nvcc: skipped"; return 0; }
  local python; python="$(command -v "$PYTHON")"
  cmake -S . -B build/cuda -G Ninja "-DPython_EXECUTABLE=$python" -DFASTATTN_CUDA=ON >/dev/null &&
    time cmake --build build/cuda --target _cuda || return 1
  "$PYTHON" -m fastattn info --device cuda
  limited "$PYTHON" scripts/cuda_first.py || return 1
  local failed=0 tool
  timeout --kill-after=20 120 "$PYTHON" -m pytest -p no:cacheprovider -x -q tests/test_gpu_cuda.py || failed=1
  limited "$PYTHON" -m fastattn bench --gpu check --backend cuda --out "$OUT/cuda-check" $BENCH_FLAGS || failed=1
  for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
      echo "--- compute-sanitizer --tool $tool"
      timeout --kill-after=20 300 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$PYTHON" -m pytest -p no:cacheprovider -q tests/test_gpu_cuda.py -k "case and not repeated" || failed=1
    fi
  done
  return $failed
}

cuda-speed() {
  limited "$PYTHON" -m fastattn bench --gpu speed --backend cuda --out "$OUT/cuda-speed" $BENCH_FLAGS
}

chosen=("$@")
[ ${#chosen[@]} -gt 0 ] || chosen=("${STEPS[@]}")
for step in "${chosen[@]}"; do
  [[ " ${STEPS[*]} " == *" $step "* ]] || { echo "error: a step must be one of ${STEPS[*]}, got $step" >&2; exit 2; }
done

mkdir -p "$OUT"
failed=()
for step in "${chosen[@]}"; do
  echo "=== $step"
  start=$SECONDS
  "$step" 2>&1 | tee "$OUT/$step.log"
  status=${PIPESTATUS[0]}
  echo "=== $step ended with status $status after $((SECONDS - start)) s" | tee -a "$OUT/$step.log"
  [ "$status" -eq 0 ] || failed+=("$step")
done
echo "logs and results are in $OUT"
[ ${#failed[@]} -eq 0 ] || { echo "FAILED: ${failed[*]}"; exit 1; }
