#!/bin/sh
# Builds fastattn/_C.*.so in place with the cmake, ninja and Python that come first on PATH; ninja redoes only
# what changed, and fastattn/_cuda.*.so where it is wanted. Called by `make build`.
set -eu
cd "$(dirname "$0")/.."
if ! command -v "${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
  echo "error: no C++ compiler found; install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++;" >&2
  echo "macOS: xcode-select --install)" >&2
  exit 1
fi
python="$(command -v python)"
log=build/configure.log
if ! grep -qsxF "_Python_EXECUTABLE:INTERNAL=$python" build/dev/CMakeCache.txt || [ ! -f build/dev/build.ninja ]; then
  rm -rf build/dev
  mkdir -p build
  cmake -S . -B build/dev -G Ninja "-DPython_EXECUTABLE=$python" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
fi
ninja -C build/dev --quiet

# The CUDA kernels: with FASTATTN_CUDA=1, never with 0; otherwise where there are nvcc and a GPU, and then nothing else
# depends on them.
cuda="${FASTATTN_CUDA:-auto}"
if [ "$cuda" = auto ] && [ -e /dev/nvidia0 ] && command -v nvcc >/dev/null; then cuda=try; fi
if [ "$cuda" = 1 ] || [ "$cuda" = try ]; then
  if ! { cmake -S . -B build/cuda -G Ninja "-DPython_EXECUTABLE=$python" -DFASTATTN_CUDA=ON >"$log" 2>&1 || {
    cat "$log" >&2
    false
  }; } || ! ninja -C build/cuda --quiet _cuda; then
    echo "the CUDA kernels could not be built; FASTATTN_CUDA=0 leaves them out" >&2
    [ "$cuda" = try ] || exit 1
  fi
fi
