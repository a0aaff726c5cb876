# SPDX-License-Identifier: Apache-2.0
"""Compiles one case for one target: python -m tests.aot.compile_one CASE TARGET REPORT.

A process of its own, because both compilers abort it on some inputs they cannot handle. Writes the JSON file REPORT;
what the compilers print, the account of registers and the machine code among it, goes where they send it.
"""

import json
import os
import sys
import time
from pathlib import Path

# Read when jax is imported. The CUDA plugin must not look for a GPU, nor libtpu for a TPU's metadata server.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several of these run at a time
    MOSAIC_GPU_DUMP_PTXAS="1",
    MOSAIC_GPU_DUMP_SASS="1",
)

from tests.aot import cases
from tests.aot.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]


def compile_case(case: cases.Case, target_name: str) -> dict:
    """Compiles and returns the seconds taken and the bytes that the compiler accounts for."""
    start = time.perf_counter()
    with TARGETS[target_name].compiling() as compiling:
        function, arguments = case.build(compiling)
        executable = function.lower(*arguments).compile()
    memory = executable.memory_analysis()
    return {
        "seconds": time.perf_counter() - start,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }


def project_files() -> list[str]:
    """The files of this project that were imported: the compiled code depends on nothing else here."""
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    paths = (Path(file).resolve() for file in files if file)
    return sorted(
        str(path.relative_to(ROOT))
        for path in paths
        if path.is_relative_to(ROOT) and not path.relative_to(ROOT).parts[0].startswith(".")
    )


def main(name: str, target_name: str, report: str) -> None:
    result = compile_case(cases.find(name), target_name)
    Path(report).write_text(json.dumps(result | {"files": project_files()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
