#!/usr/bin/env bash
# Installs fastattn in every documented way, each in a fresh environment, and calls it. Called by
# `make test-install`; takes several minutes, since each way compiles the native core anew.
#
# torch is not installed again and again: the environments borrow it from the checkout's .venv by PYTHONPATH, which
# does not show them the fastattn installed there. Other Pythons found on the machine only compile and load the core.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="$PWD/.venv/bin/python"
TORCH="$("$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')"
CONSTRAINTS="$PWD/requirements/constraints.txt"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset FASTATTN_NATIVE FASTATTN_CPU_ISA FASTATTN_BACKEND MAX_JOBS CMAKE_ARGS PYTHONPATH
passed=0 failed=0

source_tree() {  # source_tree FOLDER: a copy of what git would ship, uncommitted changes included
  mkdir -p "$1"
  git ls-files --cached --others --exclude-standard -z |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar --null --files-from=- -cf - | tar -xf - -C "$1"
}

new_env() {  # new_env NAME [PYTHON]
  "${2:-$PYTHON}" -m venv "$WORK/$1"
}

calls() {  # calls ENV BACKEND: attention runs from the environment's own copy, on that backend
  (cd "$WORK" && PYTHONPATH="$TORCH" "$WORK/$1/bin/python" - "$2" <<'PY'
import sys

import torch

import fastattn

assert fastattn.__file__.startswith(sys.prefix) or "editable" in fastattn.__file__, fastattn.__file__
q, k, v = torch.randn(3, 2, 4, 33, 16).unbind()
got = fastattn.attention(q, k, v, mask=fastattn.masks.causal())
want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(got, want)
backend = fastattn.explain(q, k, v).backend
assert backend == sys.argv[1], backend
PY
    PYTHONPATH="$TORCH" "$WORK/$1/bin/python" -m fastattn info >/dev/null
  )
}

check() {  # check NAME COMMAND...: runs it quietly, tells its time, shows its output where it fails
  local name="$1" start=$SECONDS
  shift
  if "$@" >"$WORK/log" 2>&1; then
    echo "ok      $name ($((SECONDS - start)) s)"
    passed=$((passed + 1))
  else
    echo "FAILED  $name ($((SECONDS - start)) s)"
    tail -n 60 "$WORK/log" | sed 's/^/        /'
    failed=$((failed + 1))
  fi
}

isolated() {
  new_env isolated && "$WORK/isolated/bin/pip" install --no-deps "$WORK/src" && calls isolated cpu
}

no_build_isolation() {
  new_env plain && "$WORK/plain/bin/pip" install -c "$CONSTRAINTS" setuptools cmake ninja pybind11 &&
    "$WORK/plain/bin/pip" install --no-deps --no-build-isolation "$WORK/src" && calls plain cpu
}

editable() {
  source_tree "$WORK/editable-src" && new_env editable &&
    "$WORK/editable/bin/pip" install --no-deps -e "$WORK/editable-src" && calls editable cpu
}

sdist_and_wheel() {
  new_env build && "$WORK/build/bin/pip" install -c "$CONSTRAINTS" build &&
    "$WORK/build/bin/python" -m build --outdir "$WORK/dist" "$WORK/src" &&
    tar -tzf "$WORK"/dist/*.tar.gz >"$WORK/contents" &&
    for file in CMakeLists.txt csrc/bindings.cpp csrc/params.h csrc/cpu/simd.h tests/test_build.py LICENSE Makefile; do
      grep -q "/$file\$" "$WORK/contents" || { echo "the sdist lacks $file"; return 1; }
    done &&
    "$WORK/build/bin/python" -m zipfile -l "$WORK"/dist/*.whl >"$WORK/contents" &&
    grep -q '^fastattn/py.typed' "$WORK/contents" && ! grep -E '^(tests|csrc|bench)/' "$WORK/contents" &&
    "$WORK/build/bin/pip" install --no-deps "$WORK"/dist/*.whl && calls build cpu
}

pure_python() {
  new_env pure && FASTATTN_NATIVE=0 PATH="$WORK/pure/bin:/nonexistent" "$WORK/pure/bin/pip" install --no-deps "$WORK/src" &&
    calls pure torch && ! find "$WORK/pure" -path '*/fastattn/_C*' | grep .
}

missing_compiler() {
  new_env bare
  if PATH="$WORK/bare/bin:/nonexistent" "$WORK/bare/bin/pip" install --no-deps "$WORK/src" >"$WORK/error" 2>&1; then
    echo "installed without a compiler"
    return 1
  fi
  cat "$WORK/error"
  grep -q "no C++ compiler found" "$WORK/error" && grep -q "apt install g++" "$WORK/error" &&
    grep -q "FASTATTN_NATIVE=0" "$WORK/error" && ! grep -q Traceback "$WORK/error"
}

other_python() {  # other_python INTERPRETER: the wheel builds, and its core loads without torch
  local env="python-$1"
  new_env "${env//\//_}" "$1" && env="$WORK/${env//\//_}" && "$env/bin/pip" install --no-deps "$WORK/src" &&
    (cd "$WORK" && "$env/bin/python" - <<'PY'
import glob
import importlib.util
import sys

[path] = glob.glob(sys.prefix + "/lib/python3*/site-packages/fastattn/_C.*.so")
spec = importlib.util.spec_from_file_location("fastattn._C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.info())
PY
    )
}

interpreters() {  # one interpreter of each other supported version, where the machine has it
  local version candidate
  for version in 3.10 3.11 3.12 3.13 3.14; do
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      if "$candidate" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
        "$PYTHON" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] == '$version')" && echo "$candidate"
        break
      fi
    done
  done
}

source_tree "$WORK/src"
check "pip install --no-build-isolation ." no_build_isolation
check "pip install ." isolated
check "pip install -e ." editable
check "python -m build (sdist, then a wheel from it)" sdist_and_wheel
check "FASTATTN_NATIVE=0 pip install ." pure_python
check "no compiler: the error says what to do" missing_compiler
for interpreter in $(interpreters); do
  check "pip install . with $("$interpreter" -V)" other_python "$interpreter"
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
