"""The kernels compiled ahead of time: tensor cores, and shared memory within every device's limit.

Each runs in a process of its own, without the interpreter that the other tests of Triton run under.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from triton_support import needs_triton

from fastattn.backends.triton import arguments
from fastattn.backends.triton import compile as ahead
from fastattn.backends.triton.compile import ARCHITECTURES, DTYPES, HEAD_DIMS, VARIANTS, Compiled, problems
from fastattn.backends.triton.compile_table import table
from fastattn.backends.triton.configs import SHARED_MEMORY, TileConfig
from fastattn.backends.triton.cubin import Loop, Usage, loops

KERNELS = {"attention_fwd", "attention_bwd_rows", "attention_bwd_dq", "attention_bwd_dkdv"}
CALL = (90, "bfloat16", "causal", 64)


def compiled(folder: Path, *arguments: str) -> dict:
    """What the command writes; its status is 0 where everything compiles, fits and uses tensor cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastattn.backends.triton.compile", "--out", str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "compile.json").read_text())


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_causal_call(arch: int, tmp_path: Path):
    arguments = ["--arch", str(arch), "--head-dim", "64", "--variant", "causal", "--dtype", "bfloat16"]
    facts = compiled(tmp_path, *arguments)
    assert not facts["failed"]
    assert {row["kernel"] for row in facts["kernels"]} == KERNELS
    for row in facts["kernels"]:
        assert row["tensor_cores"], row
        assert 0 < row["shared"] <= SHARED_MEMORY[arch], row
        if row["usage"] is not None:  # where cuobjdump is there
            assert 0 < row["usage"]["registers"] <= 255, row
            assert any(loop["products"] for loop in row["usage"]["loops"]), row
    assert "| attention_fwd |" in (tmp_path / "compile.md").read_text()


@needs_triton
def test_what_goes_forward_alone(tmp_path: Path):
    """Loads by descriptors are bulk copies; keys that are divided need a kernel more."""
    arguments = [
        "--arch",
        "90",
        "--head-dim",
        "64",
        "--variant",
        "descriptors",
        "split",
        "--dtype",
        "bfloat16",
    ]
    rows = compiled(tmp_path, *arguments)["kernels"]
    assert [(row["kernel"], row["bulk_copies"], row["tensor_cores"]) for row in rows] == [
        ("attention_fwd", True, True), ("attention_fwd", False, True), ("attention_combine", False, False)
    ]  # fmt: skip


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [str(dtype).removeprefix("torch.") for dtype in DTYPES])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_call(arch: int, head_dim: int, dtype: str, tmp_path: Path):
    facts = compiled(tmp_path, "--arch", str(arch), "--head-dim", str(head_dim), "--dtype", dtype)
    assert {row["variant"] for row in facts["kernels"]} == set(VARIANTS)


def made(**changes) -> Compiled:
    facts = {
        "kernel": "attention_fwd", "arch": 90, "variant": "causal", "dtype": "bfloat16", "head_dim": 64,
        "config": TileConfig(128, 64, 8, 2), "shared": 1000, "usage": Usage(200, 0, ()),
        "instruction": "wgmma.mma_async",
    }  # fmt: skip
    return Compiled(**(facts | changes))


def test_tuples_come_last_in_what_kernels_are_given():
    """Otherwise Triton 3.6 does not compile a kernel that reads their fields."""
    classes = (each for each in vars(arguments).values() if isinstance(each, type))
    own = [each for each in classes if each.__module__ == arguments.__name__]
    forms = {each.__name__: each for each in own if issubclass(each, tuple)}
    assert {"Parts", "Rules", "Rows"} <= set(forms)
    for name, form in forms.items():
        hints = [str(typing.get_type_hints(form)[field]) for field in form._fields]
        is_tuple = [any(f"{arguments.__name__}.{other}" in hint for other in forms) for hint in hints]
        assert is_tuple == sorted(is_tuple), name


def test_problems_are_named():
    assert problems(made()) == []
    assert problems(made(dtype="float32", instruction=None)) == []
    assert problems(made(instruction=None)) == ["multiplies without wgmma.mma_async"]
    assert problems(made(variant="descriptors")) == ["loads without cp.async.bulk.tensor"]
    older = made(arch=80, instruction="mma.sync")
    assert problems(made(variant="descriptors", bulk_copies=True)) == problems(older) == []
    assert problems(made(shared=300_000)) == ["asks for 300000 B of shared memory of 232448"]
    full = made(arch=100, instruction="tcgen05.mma", tensor_memory=544)
    assert problems(full) == ["asks for 544 columns of tensor memory of 512"]


def test_small_tiles_may_use_the_older_instruction():
    assert made().tensor_cores
    assert not made(instruction="mma.sync").tensor_cores
    assert made(instruction="mma.sync", config=TileConfig(16, 128, 4, 2)).tensor_cores
    assert made(instruction="mma.sync", arch=80).tensor_cores


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a00ff017624 */
        /*0010*/              @!P0 LDG.E R2, [R2.64] ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   STL.64 [R1+0x8], R4 ;
        /*0040*/              @UP1 BRA 0x10 ;
        /*0050*/                   LDL R4, [R1+0x8] ;
        /*0060*/                   FADD R4, R4, R5 ;
        /*0070*/               @P2 BRA 0x60 ;
        /*0080*/               @P1 BRA 0x0 ;
        /*0090*/                   BRA 0xb0 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0 ;
"""


def test_loops_are_read_from_machine_code():
    """Two inner loops; what is outside does not count, nor the loop around both, nor the trap at the end."""
    first, second = loops(LISTING)
    assert first == Loop(instructions=4, products=1, spills=1)
    assert second == Loop(instructions=2, products=0, spills=0)
    assert made(usage=Usage(255, 16, (first, second))).loop_spills == (1,)
    assert made(usage=None).loop_spills == ()


def test_the_table_says_what_is_wrong():
    spilling = Usage(255, 488, (Loop(50, 4, 0), Loop(60, 4, 12)))
    rows = [made(), made(variant="plain", usage=spilling), made(arch=120, shared=200_000, usage=None)]
    text = "\n".join(table(rows, ["sm_80 bias: CompilationError"], 4, "3.7.1"))
    assert (
        "- sm_120 attention_fwd, causal, bfloat16, D=64: asks for 200000 B of shared memory of 101376" in text
    )
    assert "- does not compile: sm_80 bias: CompilationError" in text
    assert "- sm_90 attention_fwd, plain, bfloat16, D=64: 12" in text
    assert "| causal, plain | 1 of 227 | wgmma | 200-255 | 0-488 | 12 (plain) |" in text
    assert "| 120 | attention_fwd | bfloat16 | 64 | 128x64 | 8 | 2 | causal | 196 of 99 | wgmma | ?" in text
    assert "3 of 4 calls" in text
    assert "in loops: 0 12" in rows[1].line() and rows[0].row()["config"]["block_m"] == 128


def test_the_command_goes_on_after_a_failure(monkeypatch, capsys, tmp_path: Path):
    def compile_variant(arch, name, dtype, head_dim):
        if name == "bias":
            raise ValueError("no such layout\nand more")
        return [made(variant=name, arch=arch)]

    monkeypatch.setattr(ahead, "compile_variant", compile_variant)
    arguments = ["--arch", "90", "--head-dim", "64", "--dtype", "bfloat16", "--variant", "bias", "plain"]
    assert ahead.main([*arguments, "--out", str(tmp_path)]) == 1
    facts = json.loads((tmp_path / "compile.json").read_text())
    assert facts["failed"] == ["sm_90 bias, bfloat16, D=64: ValueError: no such layout"]
    assert [row["variant"] for row in facts["kernels"]] == ["plain"] and facts["calls"] == 2
    assert "FAILED" in capsys.readouterr().out
    assert ahead.main([*arguments[:-2], "plain"]) == 0


def test_a_run_goes_on_where_it_stopped(monkeypatch, capsys, tmp_path: Path):
    """With what is there of the same kernels; what failed is tried again."""
    compiled: list[str] = []

    def compile_variant(arch, name, dtype, head_dim):
        compiled.append(name)
        if name == "bias" and compiled.count(name) == 1:
            raise ValueError("killed")
        spilling = Usage(255, 488, (Loop(50, 4, 0), Loop(60, 4, 12)))
        return [made(variant=name, arch=arch, usage=spilling)]

    monkeypatch.setattr(ahead, "compile_variant", compile_variant)
    arguments = [
        "--arch",
        "90",
        "--head-dim",
        "64",
        "--dtype",
        "bfloat16",
        "--out",
        str(tmp_path),
        "--resume",
    ]
    assert ahead.main([*arguments, "--variant", "bias", "plain"]) == 1
    assert ahead.main([*arguments, "--variant", "bias", "plain", "causal"]) == 0
    assert compiled == ["bias", "plain", "bias", "causal"]
    facts = json.loads((tmp_path / "compile.json").read_text())
    assert facts["calls"] == 3 and not facts["failed"]
    assert [row["variant"] for row in facts["kernels"]] == ["plain", "bias", "causal"]
    assert all(row["loop_spills"] == [0, 12] for row in facts["kernels"])
    assert ahead.main([*arguments, "--variant", "plain"]) == 0  # the folder keeps what was not asked for
    assert len(json.loads((tmp_path / "compile.json").read_text())["kernels"]) == 3
    path = tmp_path / "compile.json"
    path.write_text(path.read_text().replace(facts["sources"], "of other kernels"))
    assert ahead.main([*arguments, "--variant", "plain"]) == 0
    assert "starting anew" in capsys.readouterr().out and compiled[-1] == "plain"
    with pytest.raises(SystemExit):
        ahead.main(["--resume"])
    assert "--out" in capsys.readouterr().err


def test_under_the_interpreter_there_is_nothing_to_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rows, reason = ahead.attempt(CALL)
    assert not rows and "TRITON_INTERPRET must not be set" in reason
