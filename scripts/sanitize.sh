#!/usr/bin/env bash
# The CPU kernels under the sanitizers, on each instruction set that runs here. Called by `make sanitize`.
#   addresses and undefined behaviour: tests/native/smoke.cpp, the kernels' tests, and random problems
#   races: tests/native/smoke.cpp, whose threads are std::threads: there is no OpenMP in that program, and
#   ThreadSanitizer does not understand OpenMP's own barriers
# FASTATTN_ISAS="baseline;avx2" chooses instruction sets, FASTATTN_FUZZ_SECONDS how long to search (30).
set -euo pipefail
cd "$(dirname "$0")/.."
root="$PWD"

TESTS=(cases containment varlen decode dropout scores hard extremes multi_head)

isas_here() {  # one that the processor lacks would be compiled for nothing
  local isas="" flags=" "
  [ "$(uname -m)" = x86_64 ] || return 0  # empty: all of them
  flags=" $(grep -m1 '^flags' /proc/cpuinfo) "
  isas=baseline
  [[ $flags == *" avx2 "* && $flags == *" fma "* ]] && isas+=";avx2"
  [[ $flags == *" avx512f "* && $flags == *" avx512bw "* && $flags == *" avx512vl "* && $flags == *" avx512dq "* ]] &&
    isas+=";avx512"
  echo "$isas"
}

build() {  # build FOLDER SANITIZERS CMAKE_ARGUMENT...
  local folder="$1" sanitizers="$2"
  shift 2
  mkdir -p build
  cmake -S . -B "$folder" -G Ninja -DFASTATTN_SMOKE=ON -DFASTATTN_WERROR=ON -DCMAKE_BUILD_TYPE=None \
    "-DFASTATTN_ISAS=${FASTATTN_ISAS-$(isas_here)}" \
    "-DCMAKE_CXX_FLAGS=-O1 -g -fsanitize=$sanitizers -fno-sanitize-recover=all" "$@" >"$folder.log" 2>&1 ||
    { cat "$folder.log" >&2; return 1; }
  ninja -C "$folder" --quiet
  python scripts/check_isa_symbols.py "$folder"
}

echo "== addresses and undefined behaviour: without Python"
site="$root/build/sanitize/site"  # this package, with the sanitizers' build of its native core
mkdir -p "$site/fastattn"
for entry in fastattn/*; do
  [[ $entry == fastattn/_C.* ]] || ln -sfn "$root/$entry" "$site/$entry"
done
build build/sanitize address,undefined "-DFASTATTN_OUTPUT_DIR=$site/fastattn" "-DPython_EXECUTABLE=$(command -v python)"
build/sanitize/fastattn_smoke

echo "== addresses and undefined behaviour: the kernels' tests"
asan="$("${CXX:-c++}" -print-file-name=libasan.so)"
if [[ $asan == /* ]]; then
  # Python itself is no sanitized program: the library must be there before anything else, and the C++ runtime with
  # it, whose exceptions it follows. Python keeps memory until the end, which is no leak of ours.
  sanitized() {
    (cd "$site" && LD_PRELOAD="$asan $("${CXX:-c++}" -print-file-name=libstdc++.so)" \
      ASAN_OPTIONS=detect_leaks=0 "$@")
  }
  files=("${TESTS[@]/#/$root/tests/test_}")
  sanitized python -c 'import fastattn._C as c; assert "/sanitize/" in c.__file__, c.__file__'
  sanitized python -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" -k "not torch and not reference" \
    "${files[@]/%/.py}" 2>&1 | tail -n 15
  echo "== addresses and undefined behaviour: random problems"
  sanitized python -m fastattn.testing.fuzz --seconds "${FASTATTN_FUZZ_SECONDS:-30}" --seed 4
else
  echo "SKIPPED: ${CXX:-c++} has no shared libasan.so; GCC has"
fi

echo "== races"
build build/race thread -DFASTATTN_PYTHON=OFF
# GCC's ThreadSanitizer cannot place its memory where the kernel moves programs about too freely.
plain=()
command -v setarch >/dev/null && plain=(setarch "$(uname -m)" -R)
"${plain[@]}" build/race/fastattn_smoke
