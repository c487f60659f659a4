"""What is promised about building and installing, as far as a built checkout can show it."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastattn
from fastattn.cli import SUBCOMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"})
PYTHON = sorted((ROOT / "fastattn").rglob("*.py"))


def run(*command, cwd=None, **environment):
    """A finished process of this Python, its output as text."""
    return subprocess.run(
        [sys.executable, *command],
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def has_native_core():
    return fastattn.dispatch.cpu.available()


def test_the_version_is_in_one_place():
    version = fastattn.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", version)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "fastattn/__init__.py"):
        assert f'"{version}"' not in (ROOT / name).read_text(), name


def test_the_native_core_includes_no_torch_header():
    assert CSRC
    for path in CSRC:
        included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        for header in included:
            assert not header.startswith(("torch/", "ATen/", "c10/", "caffe2/")), f"{path}: {header}"


def test_no_flag_breaks_portability_or_arithmetic():
    for path in [ROOT / "CMakeLists.txt", ROOT / "setup.py"]:
        code = "\n".join(line.partition("#")[0] for line in path.read_text().splitlines())
        assert not re.search(r"-march=native|-mtune=native|-ffast-math|-Ofast|-ffinite-math", code), path


def test_building_requires_neither_torch_nor_anything_else_heavy():
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = (\[.*\])$", text, re.MULTILINE)
    names = {re.match(r"[\w-]+", entry).group() for entry in ast.literal_eval(requires.group(1))}
    assert names == {"setuptools", "cmake", "ninja", "pybind11"}
    assert '\ndependencies = ["torch>=2.9"]\n' in text


def test_the_package_imports_only_torch_at_module_level():
    """Optional dependencies are imported where they are used; an integration imports its own library."""
    for path in PYTHON:
        if path.parent.name in {"cli", "testing"}:
            continue  # imported by their users alone
        allowed = {"torch", "fastattn", *sys.stdlib_module_names}
        if "integrations" in path.parts:
            allowed |= {path.parent.name, path.stem}
        if path.parent.name == "triton" and path.name != "__init__.py":
            allowed.add("triton")
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                assert name.partition(".")[0] in allowed, f"{path} imports {name}"


def test_import_loads_no_optional_dependency():
    code = (
        "import sys, torch; before = set(sys.modules); import fastattn; new = set(sys.modules) - before;"
        "optional = {'triton', 'matplotlib', 'numpy', 'scipy', 'tqdm', 'transformers'};"
        "print(sorted({name.partition('.')[0] for name in new} & optional))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_an_unknown_instruction_set_is_a_clear_error():
    if not has_native_core():
        pytest.skip("the native core is not built")
    call = "import torch, fastattn; q = torch.ones(1, 1, 1, 8); fastattn.attention(q, q, q)"
    done = run("-c", call, FASTATTN_CPU_ISA="bogus", FASTATTN_BACKEND="")
    assert done.returncode == 1
    assert re.search(
        r"ValueError: FASTATTN_CPU_ISA must be one of .*(baseline|generic).*, got 'bogus'", done.stderr
    )
    done = run("-m", "fastattn", "info", FASTATTN_CPU_ISA="bogus")
    assert done.returncode == 1
    assert done.stderr.startswith("error: FASTATTN_CPU_ISA must be one of ")


def test_the_instruction_set_can_be_forced():
    if not has_native_core():
        pytest.skip("the native core is not built")
    from fastattn import _C

    for isa in _C.info()["isas"]:
        done = run("-c", "from fastattn import _C; print(_C.info()['isa'])", FASTATTN_CPU_ISA=isa)
        assert done.stdout.strip() == isa, done.stderr


ISA_SYMBOLS = runpy.run_path(str(ROOT / "scripts" / "check_isa_symbols.py"))


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_code_is_shared_between_instruction_sets(isa):
    """An inline function outside the set's own namespace could end up in the baseline's calls."""
    objects = sorted(ROOT.glob(f"build/dev/CMakeFiles/fastattn_{isa}.dir/**/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("needs the object files of `make build` on x86-64, and nm")
    symbols = {name for path in objects for name in ISA_SYMBOLS["weak_symbols"](path)}
    assert not {name for name in symbols if f"fastattn::{isa}::" not in name}
    assert not ISA_SYMBOLS["misplaced_symbols"](ROOT / "build" / "dev")


def test_the_check_of_shared_code_sees_it(tmp_path):
    """Two files with one inline function, compiled without inlining: the plain file must be linked first."""
    if not shutil.which("nm") or not shutil.which("c++"):
        pytest.skip("needs a C++ compiler and nm")
    paths = ["plain.dir/a.o", "fastattn_avx2.dir/b.o"]
    for path in paths:
        (tmp_path / path).parent.mkdir()
        code = f"inline int shared(int x) {{ return x; }} int {path[-3]}() {{ return shared(1); }}"
        command = ["c++", "-O0", "-x", "c++", "-c", "-", "-o", str(tmp_path / path)]
        subprocess.run(command, input=code, text=True, check=True)
    for order in (paths, paths[::-1]):
        link = f"build lib.so: CXX_MODULE_LIBRARY_LINKER__C {' '.join(order)} || other.o"
        (tmp_path / "build.ninja").write_text(link)
        assert len(ISA_SYMBOLS["misplaced_symbols"](tmp_path)) == (order != paths)


def test_every_subcommand_describes_itself(capsys):
    for name in SUBCOMMANDS:
        assert (ROOT / "fastattn" / "cli" / f"{name}.py").exists(), name
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name in SUBCOMMANDS:
        assert name in printed


def test_info_names_every_backend(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert fastattn.__version__ in printed
    for name in ("cuda", "triton", "cpu", "torch", "reference"):
        assert re.search(rf"^  {name} +(usable|not usable: .+)", printed, re.MULTILINE), name


def test_version_option(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{fastattn.__version__}\n"


def test_an_unknown_subcommand_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["nonsense"])
    printed = capsys.readouterr().err
    assert all(name in printed for name in SUBCOMMANDS)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr("fastattn.cli.importlib.import_module", missing)
    assert main(["demo"]) == 2
    assert "pip install 'fastattn[viz]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_pure_python_wheel(tmp_path):
    """FASTATTN_NATIVE=0 gives a wheel for any platform, whose calls go to PyTorch's kernels."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".*", "build", "*.so", "__pycache__", "*.egg-info", "demo"),
    )
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = run("-c", build, str(tmp_path), cwd=source, FASTATTN_NATIVE="0")
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name == f"fastattn-{fastattn.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "fastattn/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/")) or "_C" in name]
    code = (
        "import torch, fastattn; q = torch.randn(1, 2, 5, 8); print(fastattn.__file__);"
        "out = fastattn.attention(q, q, q, mask=fastattn.masks.causal());"
        "want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True);"
        "torch.testing.assert_close(out, want); print(fastattn.explain(q, q, q).backend)"
    )
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    file, backend = done.stdout.split()
    assert file.startswith(str(tmp_path)) and backend == "torch"


@pytest.mark.slow
def test_a_wrong_value_of_fastattn_native_is_an_error(tmp_path):
    done = run("setup.py", "--version", cwd=ROOT, FASTATTN_NATIVE="maybe")
    assert done.returncode == 1
    assert "FASTATTN_NATIVE must be 0 or 1, got 'maybe'" in done.stderr
