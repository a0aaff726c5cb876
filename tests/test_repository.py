# SPDX-License-Identifier: Apache-2.0
"""Rules of the repository that a machine can check; design decisions behind them are in docs/adr/."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import pallas_kernels
from benchmarks import table

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE = 2**20

# Folders of the library that hold no operation.
SHARED_FOLDERS = {"core", "masks"}
# Spelled in pieces, so that this file does not break its own rule.
REGISTRIES = ("pypi" + r"\.org", "python" + "hosted", "npm" + r"js\.org", "arti" + "factory", "index" + "-url")
MACHINE_PATHS = ("/" + r"root\b", "/" + r"work\b", "/" + r"home/\w", "/tmp" + "/w", "/Us" + "ers/")


def _tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


TRACKED = _tracked()
MARKDOWN = [path for path in TRACKED if path.suffix == ".md"]
pytestmark = pytest.mark.skipif(not TRACKED, reason="not a git checkout: there is no list of the repository's files")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _text(path: Path) -> str:
    """The text of a file, "" if it is not text."""
    content = path.read_bytes()
    return "" if b"\0" in content else content.decode("utf-8", errors="replace")


def test_no_file_is_large():
    assert {_name(path): path.stat().st_size for path in TRACKED if path.stat().st_size > LARGEST_FILE} == {}


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("|".join(REGISTRIES), id="package registry"),
        # Not after a word or a dot: that is a path inside of something.
        pytest.param(r"(?<![\w.~*})])(" + "|".join(MACHINE_PATHS) + ")", id="path of one machine"),
    ],
)
def test_no_file_names_a(pattern):
    found = {
        f"{_name(path)}:{number}": line.strip()[:100]
        for path in TRACKED
        for number, line in enumerate(_text(path).splitlines(), 1)
        if re.search(pattern, line)
    }
    assert found == {}


def test_constraints_are_exact_versions():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line)] == []


def test_programs_name_their_license():
    files = [path for path in TRACKED if path.suffix == ".py" and not path.is_relative_to(ROOT / "tests")]
    assert [
        _name(path) for path in files if not _text(path).startswith("# SPDX-License-Identifier: Apache-2.0\n")
    ] == []


def test_flags_are_defined_in_the_two_scripts_only():
    """A library that defines flags reads the command line of whoever imports it."""
    users = {
        _name(path)
        for path in TRACKED
        if path.suffix == ".py" and re.search(r"^\s*(from absl import .*flags|import absl)", _text(path), re.M)
    }
    assert users - {"train.py", "infer.py"} == set()


def test_models_never_import_parallel():
    """Models are sharded from outside, so that one model serves one device and many."""
    for path in TRACKED:
        if path.suffix == ".py" and path.is_relative_to(ROOT / "models"):
            nodes = list(ast.walk(ast.parse(_text(path))))
            modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            assert not any(module.split(".")[0] == "parallel" for module in modules), _name(path)


OPERATIONS = sorted(
    path.name
    for path in (ROOT / "pallas_kernels").iterdir()
    if path.is_dir() and any(path.glob("*.py")) and path.name not in SHARED_FOLDERS
)


@pytest.mark.parametrize("op", OPERATIONS)
def test_an_operation_is_complete(op):
    folder = ROOT / "pallas_kernels" / op
    missing = [name for name in ("README.md", "api.py", "reference.py", "xla.py") if not (folder / name).exists()]
    assert missing == []
    assert any((ROOT / "tests" / op).glob("test_*.py")), f"tests/{op} has no tests"


def test_public_names_exist_and_are_documented():
    for name in pallas_kernels.__all__:
        public = getattr(pallas_kernels, name)
        assert public.__doc__, f"pallas_kernels.{name} has no docstring"


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[?v?(\d+\.\d+\.\d+)", changelog, re.M)
    assert newest, "CHANGELOG.md has no heading like `## 0.1.0`"
    assert pallas_kernels.__version__ == project["version"] == newest[1]


@pytest.mark.parametrize("path", MARKDOWN, ids=_name)
def test_links_lead_somewhere(path):
    # Code is not prose: indexing after brackets looks like a link.
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", _text(path), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    broken = [target for target in local if not (path.parent / target).exists()]
    assert broken == []


def _python_blocks(path: Path) -> list[tuple[int, str]]:
    """(line, source) of the blocks that begin with ```python and nothing else."""
    text = _text(path)
    return [
        (text[: match.start(1)].count("\n") + 1, match[1])
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


@pytest.mark.parametrize("path", [path for path in MARKDOWN if _python_blocks(path)], ids=_name)
def test_code_in_documents_runs(path, tmp_path, monkeypatch):
    """The blocks of one document run one after another, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, source in _python_blocks(path):
        exec(compile("\n" * (line - 1) + source, str(path), "exec"), namespace)


def test_result_tables_are_those_of_the_csv_files(capsys):
    assert table.main(["--check"]) == 0, capsys.readouterr().out


def _modules(package: str) -> list[str]:
    found = importlib.import_module(package)
    names = [module.name for module in pkgutil.walk_packages(found.__path__, f"{package}.")]
    return [package, *(name for name in names if not name.rpartition(".")[2].startswith(("_", "mosaic")))]


LIBRARY = [name for package in ("pallas_kernels", "benchmarks") for name in _modules(package)]


# Of models/, the modules whose examples need no model from elsewhere.
@pytest.mark.parametrize(
    "name",
    [*LIBRARY, *(f"models.{name}" for name in ("decoder", "batcher", "paged_cache", "vit", "qat", "distill"))],
)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
