#!/usr/bin/env bash
# Cross-compiles the kernels for aarch64 and runs tests/native/smoke.cpp under qemu. Called by `make test-native`.
set -euo pipefail
cd "$(dirname "$0")/.."

CROSS="${AARCH64_CXX:-aarch64-linux-gnu-g++}"
SYSROOT="${AARCH64_SYSROOT:-/usr/aarch64-linux-gnu}"

build_smoke() {  # build_smoke FOLDER CMAKE_ARGUMENT...
  local folder="$1"
  shift
  cmake -S . -B "$folder" -G Ninja -DFASTATTN_PYTHON=OFF -DFASTATTN_SMOKE=ON -DFASTATTN_WERROR=ON "$@" >"$folder.log" 2>&1 ||
    { cat "$folder.log" >&2; return 1; }
  ninja -C "$folder" --quiet
}

mkdir -p build
echo "== aarch64 under qemu"
missing=()
command -v "$CROSS" >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
if ((${#missing[@]})); then
  reason="aarch64 is not tested here; on Debian and Ubuntu: apt install ${missing[*]}"
  if [ "${FASTATTN_REQUIRE_AARCH64:-0}" = 1 ]; then
    echo "error: $reason" >&2
    exit 1
  fi
  echo "SKIPPED: $reason"
  exit 0
fi
build_smoke build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 "-DCMAKE_CXX_COMPILER=$CROSS"
qemu-aarch64 -L "$SYSROOT" build/aarch64/fastattn_smoke
