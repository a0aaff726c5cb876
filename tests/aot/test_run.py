# SPDX-License-Identifier: Apache-2.0
"""The driver of the compile matrix: what counts as a failure, and when a result is compiled again."""

import functools
import json
import sys
from pathlib import Path

import pytest

from tests.aot import cases, run, sass, targets

PTXAS = """ptxas info    : Compiling entry function 'a' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 154 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compiling entry function 'b' for 'sm_90a'
    16 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


# A loop around a main loop whose retry (.L_x_4) lies out of line; each line as nvdisasm has it. The spills that are
# always there are in the outer loop.
SASS = """	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   STL [R1+0x4], R9 ;
.L_x_2:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/              @!P1 BRA `(.L_x_4) ;
.L_x_3:
        /*0040*/                   {spill} ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/                   LDL R9, [R1+0x4] ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/              @!P1 BRA `(.L_x_4) ;
        /*00a0*/                   BRA `(.L_x_3) ;
"""


def _build(compiling, size=0):
    raise AssertionError("the driver itself never builds a case")


CASE = cases.Case("op/kernel", ("sm_90a",), _build, hot=True, timeout=20)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Replaces compile_one by a Python snippet, and the cache by an empty one; counts the compilations."""
    runs = tmp_path / "runs"
    monkeypatch.setattr(run, "CACHE", tmp_path)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.delenv("AOT_FULL", raising=False)
    real = run._run

    def install(snippet: str):
        def stand_in(command, timeout):
            report = Path(command[-1])
            source = f"report = {str(report)!r}\nopen({str(runs)!r}, 'a').write('.')\n{snippet}"
            return real([sys.executable, "-c", source], timeout)

        monkeypatch.setattr(run, "_run", stand_in)
        return lambda: len(runs.read_text()) if runs.exists() else 0

    return install


def _compiles(output="", files=()):
    figures = {"seconds": 1.0, "temp_bytes": 0, "code_bytes": 0, "files": list(files)}
    return f"open(report, 'w').write({json.dumps(figures)!r})\nprint({output!r})"


def test_ptxas_figures_are_the_largest_and_the_sum():
    assert run.ptxas_figures(PTXAS) == (255, 40)
    assert run.ptxas_figures("nothing of the kind") == (None, None)


def test_spills_count_in_main_loops_only():
    assert sass.spills_in_main_loops(SASS.format(spill="NOP")) == 0
    assert sass.spills_in_main_loops(SASS.format(spill="LDL R9, [R1+0x4]") + SASS.format(spill="STL.64 [R1], R2")) == 2
    assert sass.spills_in_main_loops(PTXAS) is None


def test_a_compiled_case_passes(compiler):
    compiler(_compiles(PTXAS + SASS.format(spill="NOP")))
    result = run.run_case(CASE, "sm_90a", "jax 1")
    assert (result.outcome, result.registers, result.spill_bytes, result.loop_spills) == ("passed", 255, 40, 0)


def test_a_spill_fails_a_hot_case_only(compiler):
    compiler(_compiles(PTXAS + SASS.format(spill="LDL R9, [R1+0x4]")))
    result = run.run_case(CASE, "sm_90a", "jax 1")
    assert result.outcome == "failed"
    assert result.reason.startswith("1 instructions spill in its main loops, at 255 registers")
    cold = cases.Case(CASE.name, CASE.targets, _build)
    assert run.run_case(cold, "sm_90a", "jax 1").outcome == "passed"


def test_a_hot_case_whose_code_nobody_saw_fails(compiler):
    compiler(_compiles(PTXAS))
    result = run.run_case(CASE, "sm_90a", "jax 1")
    assert result.outcome == "failed"
    assert "nvdisasm" in result.reason


def test_a_compiler_that_aborts_is_a_failure_of_its_case(compiler):
    compiler("import os; print('LLVM ERROR: Cannot select', flush=True); os.abort()")
    result = run.run_case(CASE, "sm_90a", "jax 1")
    assert result.outcome == "failed"
    assert result.reason.startswith("the compiler was killed by SIGABRT")
    assert "LLVM ERROR" in (run.CACHE / "op-kernel.sm_90a.log").read_text()


def test_a_compiler_that_hangs_is_a_failure_of_its_case(compiler):
    compiler("import time; time.sleep(60)")
    hanging = cases.Case("op/kernel", ("sm_90a",), _build, timeout=1)
    assert run.run_case(hanging, "sm_90a", "jax 1").reason.startswith("still compiling after 1 s")


def test_a_skip_is_counted_with_its_reason():
    skipping = cases.Case("op/kernel", ("v5e",), _build, skip={"v5e": "no float4 before TPU7x"})
    result = run.run_case(skipping, "v5e", "jax 1")
    assert (result.outcome, result.reason) == ("skipped", "no float4 before TPU7x")


def test_a_result_is_kept_until_something_that_made_it_changes(compiler, tmp_path, monkeypatch):
    (tmp_path / "kernel.py").write_text("one")
    compilations = compiler(_compiles(PTXAS + SASS.format(spill="NOP"), files=["kernel.py", "tests/aot/cases.py"]))
    assert not run.run_case(CASE, "sm_90a", "jax 1").cached
    assert run.run_case(CASE, "sm_90a", "jax 1").cached
    assert compilations() == 1

    (tmp_path / "kernel.py").write_text("two")
    assert not run.run_case(CASE, "sm_90a", "jax 1").cached
    assert not run.run_case(CASE, "sm_90a", "jax 2").cached
    assert compilations() == 3

    monkeypatch.setenv("AOT_FULL", "1")
    assert not run.run_case(CASE, "sm_90a", "jax 1").cached


def test_a_failure_is_never_kept(compiler):
    compilations = compiler("raise SystemExit(3)")
    for _ in range(2):
        assert run.run_case(CASE, "sm_90a", "jax 1").reason.startswith("exit status 3")
    assert compilations() == 2


def test_a_bound_argument_is_part_of_a_case():
    small, large = (cases.Case("op", ("v6e",), functools.partial(_build, size=size)) for size in (128, 256))
    assert run.case_hash(small) != run.case_hash(large)


def test_cases_name_known_targets_and_are_unique():
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    for case in cases.CASES:
        assert set(case.targets) <= set(targets.TARGETS), case.name
        assert set(case.skip) <= set(case.targets), case.name
