#!/bin/sh
# Builds fastattn/_C.*.so in place with the cmake, ninja and Python that come first on PATH; ninja redoes only
# what changed. Called by `make build`.
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
