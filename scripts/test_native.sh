#!/usr/bin/env bash
# Runs tests/native/smoke.cpp on what this processor may not have: AVX-512's paths with vectors of 64 bytes put together
# from AVX2's (tests/native/avx512), and aarch64, cross-compiled, under qemu. Called by `make test-native`.
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
if grep -qw avx2 /proc/cpuinfo 2>/dev/null; then
  echo "== AVX-512's paths on AVX2"
  build_smoke build/wide -DFASTATTN_ISAS=avx2 "-DCMAKE_CXX_FLAGS=-I$PWD/tests/native/avx512"
  build/wide/fastattn_smoke
fi

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
