# SPDX-License-Identifier: Apache-2.0
"""Compiles every case for every target: python -m tests.aot.run [part of a case's or target's name ...].

Ends with a table and `N passed, N failed, N skipped`. A result is kept under .cache/aot and counts until the case,
one of the project's files that it imported, or a compiler's version changes; AOT_FULL=1 compiles everything anew.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.aot import sass
from tests.aot.cases import CASES, Case

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "aot"
PROCESSES = min(2, os.cpu_count() or 1)  # a compiler takes up to 1 GB of memory
COMPILERS = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "nvidia-cuda-nvcc",
    "nvidia-cuda-nvdisasm",
    "libtpu",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one case on one target.

    Attributes:
      outcome: "passed", "failed" or "skipped".
      reason: why it was not "passed".
      seconds: of compiling, without starting Python.
      registers: of a thread of the largest CUDA kernel; None for a TPU.
      spill_bytes: stored and loaded because registers ran out, over all CUDA kernels; None for a TPU.
      loop_spills: instructions of main loops that do so; None for a TPU.
      temp_bytes: device memory for temporaries.
      code_bytes: machine code (TPU only).
      files: project file -> hash, what this result depends on.
      cached: whether it was compiled in an earlier run.
    """

    case: str
    target: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    registers: int | None = None
    spill_bytes: int | None = None
    loop_spills: int | None = None
    temp_bytes: int | None = None
    code_bytes: int | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    cached: bool = False

    def figures(self) -> str:
        """The compiler's account in a few words."""
        if self.outcome != "passed":
            return self.reason
        parts = [f"{self.seconds:.1f} s"]
        if self.registers is not None:
            loops = f", by {self.loop_spills} instructions of main loops too" if self.loop_spills else ""
            parts.append(f"{self.registers} registers, {self.spill_bytes} bytes spilled{loops}")
        if self.code_bytes:
            parts.append(f"{self.code_bytes / 1024:.0f} KiB code")
        if self.temp_bytes:
            parts.append(f"{self.temp_bytes / 2**20:.1f} MiB temporaries")
        return ", ".join(parts) + (" (cached)" if self.cached else "")


def ptxas_figures(output: str) -> tuple[int | None, int | None]:
    """(registers of the largest kernel, spilled bytes of all kernels) from what ptxas printed; None if it did not."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", output)]
    return (max(registers), sum(spills)) if registers else (None, None)


def case_hash(case: Case) -> str:
    """Of the case's own definition. cases.py as a whole would make every new case recompile the old ones."""
    build, bound = case.build, ""
    while hasattr(build, "func"):  # functools.partial
        bound += repr((build.args, sorted(build.keywords.items())))
        build = build.func
    return hashlib.sha256((inspect.getsource(build) + bound + str(case.hot)).encode()).hexdigest()[:16]


def file_hash(path: str) -> str:
    file = ROOT / path
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.exists() else "missing"


def compiler_versions() -> str:
    """One line: the installed versions of everything that turns a kernel into machine code."""
    versions = {}
    for name in COMPILERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _cache_file(case: Case, target: str, versions: str) -> Path:
    key = hashlib.sha256(f"{case_hash(case)} {versions}".encode()).hexdigest()[:16]
    return CACHE / f"{case.name.replace('/', '-')}.{target}.{key}.json"


def _cached(file: Path) -> Result | None:
    try:
        result = Result(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):  # absent, cut short, or of an older format: compile again
        return None
    fresh = all(file_hash(path) == digest for path, digest in result.files.items())
    return dataclasses.replace(result, cached=True) if fresh else None


def _run(command: list[str], timeout: int) -> tuple[int | None, str]:
    """(exit status, output) of a command; the status is None if it was stopped for taking too long."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # ptxas is a child of its own
        output, _ = process.communicate()
        return None, output


def compile_in_subprocess(case: Case, target: str) -> Result:
    """Compiles one case for one target in a process of its own, and judges what it left behind."""
    stem = f"{case.name.replace('/', '-')}.{target}"
    report, log = CACHE / f"{stem}.report.json", CACHE / f"{stem}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.aot.compile_one", case.name, target, str(report)]
    status, output = _run(command, case.timeout)
    log.write_text(output)
    if status != 0 or not report.exists():
        if status is None:
            why = f"still compiling after {case.timeout} s"
        elif status < 0:
            why = f"the compiler was killed by {signal.Signals(-status).name}"
        else:
            why = f"exit status {status}"
        return Result(case.name, target, "failed", f"{why}; see {log.relative_to(ROOT)}")

    figures = json.loads(report.read_text())
    report.unlink()
    files = {path: file_hash(path) for path in figures.pop("files") if path != "tests/aot/cases.py"}
    registers, spill_bytes = ptxas_figures(output)
    result = Result(
        case.name,
        target,
        "passed",
        registers=registers,
        spill_bytes=spill_bytes,
        loop_spills=None if registers is None else sass.spills_in_main_loops(output),
        files=files,
        **figures,
    )
    if case.hot and result.loop_spills != 0:
        why = "no machine code was printed to look for spills in (does the compiler lack nvdisasm?)"
        if result.loop_spills:
            why = f"{result.loop_spills} instructions spill in its main loops, at {registers} registers"
        return dataclasses.replace(result, outcome="failed", reason=f"{why}; see {log.relative_to(ROOT)}")
    return result


def run_case(case: Case, target: str, versions: str) -> Result:
    """One case on one target: skipped, remembered or compiled now."""
    if target in case.skip:
        return Result(case.name, target, "skipped", case.skip[target])
    file = _cache_file(case, target, versions)
    if not os.environ.get("AOT_FULL") and (known := _cached(file)):
        return known
    result = compile_in_subprocess(case, target)
    if result.outcome == "passed":
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(result)))
        partial.replace(file)
    return result


def main(arguments: list[str]) -> int:
    CACHE.mkdir(parents=True, exist_ok=True)
    versions = compiler_versions()
    print(versions, flush=True)
    chosen = [
        (case, target)
        for case in CASES
        for target in case.targets
        if not arguments or any(part in f"{case.name} {target}" for part in arguments)
    ]
    start, results = time.perf_counter(), []
    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        pending = [pool.submit(run_case, case, target, versions) for case, target in chosen]
        for done in concurrent.futures.as_completed(pending):
            result = done.result()
            results.append(result)
            print(f"[{len(results)}/{len(chosen)}] {result.case} {result.target}: {result.outcome}", flush=True)

    results.sort(key=lambda result: (result.case, result.target))
    width = max((len(f"{result.case} {result.target}") for result in results), default=0)
    print()
    for result in results:
        print(f"{result.outcome:8}{result.case + ' ' + result.target:{width + 2}}{result.figures()}")
    for result in (result for result in results if result.outcome == "failed"):
        log = CACHE / f"{result.case.replace('/', '-')}.{result.target}.log"
        print(f"\n--- {result.case} {result.target}: the end of its log")
        print("\n".join(log.read_text().splitlines()[-25:]))
    counts = {name: sum(r.outcome == name for r in results) for name in ("passed", "failed", "skipped")}
    print(f"\nCompiled for {len({r.target for r in results})} targets in {time.perf_counter() - start:.0f} s.")
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return 1 if counts["failed"] or not results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
