# SPDX-License-Identifier: Apache-2.0
"""Where a Config comes from.

In this order, first hit wins:

    1. config= in the call
    2. `with tuning.use(result):`
    3. the user's cache       $PALLAS_KERNELS_CACHE or ~/.cache/pallas_kernels
    4. the shipped table      pallas_kernels/core/tuned/<device>/<op>.<implementation>.json
    5. the op's heuristic()

    result = tuning.autotune(flash_attention, q, k, v, mask=masks.Causal())   # measures; nothing is stored
    with tuning.use(result): ...                                              # for this block
    result.save()                                                             # for this user, from now on

An entry is found by everything that could make it wrong: op, implementation, hash of the kernel's source, device,
jaxlib version, dtypes, static arguments and shape bucket. What does not match, or cannot be read, is a miss.
"""

import ast
import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import jaxlib

from pallas_kernels.core import dispatch, tolerance
from pallas_kernels.core.dispatch import Call, Choice

_SHIPPED = pathlib.Path(__file__).parent / "tuned"


def cache_folder() -> pathlib.Path:
    """The user's cache, read at each use so that a test or a job can redirect it."""
    return pathlib.Path(os.environ.get("PALLAS_KERNELS_CACHE", "~/.cache/pallas_kernels")).expanduser()


@functools.cache
def source_hash(op: str, implementation: str) -> str:
    """Hash of the Python source that decides the kernel."""
    digest = hashlib.sha256()
    for file in sources(op, implementation):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def sources(op: str, implementation: str) -> list[pathlib.Path]:
    """The implementation's file or folder, what it imports of its operation, and parts of core that are in kernels."""
    folder = pathlib.Path(__file__).parent.parent / op
    found = {folder.parent / "core" / name for name in ("cluster.py", "epilogue.py", "inline.py", "mma.py", "tpu.py")}
    new = {folder / f"{implementation}.py", folder / "config.py", *(folder / implementation).glob("*.py")}
    while new := {file for file in new if file.exists()} - found:
        found |= new
        new = {file for known in new for file in _imported(known, op, folder)}
    return sorted(found)


def _imported(file: pathlib.Path, op: str, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Files of an operation that a file of it may import; some may not be there."""
    package = f"pallas_kernels.{op}"
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(f"{package}."):
            module = folder.joinpath(*node.module.removeprefix(package).split(".")[1:])
            yield module.with_suffix(".py")
            yield from (module / f"{alias.name}.py" for alias in node.names)


def key(call: Call, implementation: str) -> str:
    """The readable key of one entry. Sizes go up to the next power of two: a bucket shares one config."""
    sizes = ",".join(f"{letter}={1 << (size - 1).bit_length()}" for letter, size in sorted(call.sizes.items()))
    dtypes = ",".join(f"{a.label}:{a.dtype}" for a in call.arguments)
    options = ",".join(f"{name}={value}" for name, value in call.options)
    source = source_hash(call.op, implementation)
    return f"{call.direction}|{sizes}|{dtypes}|{options}|source={source}|jaxlib={jaxlib.version.__version__}"


def table_name(device_kind: str, op: str, implementation: str) -> str:
    """Where the entries of a device live, relative to a table's root."""
    folder = "".join(c if c.isalnum() else "_" for c in device_kind.lower())
    return f"{folder}/{op}.{implementation}.json"


@dataclasses.dataclass(frozen=True)
class TuningResult:
    """Measured configs: table name -> key -> fields of the Config. `a | b` merges, b winning."""

    tables: Mapping[str, Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)

    def __or__(self, other: "TuningResult") -> "TuningResult":
        names = {*self.tables, *other.tables}
        return TuningResult({n: {**self.tables.get(n, {}), **other.tables.get(n, {})} for n in names})

    def save(self, root: str | os.PathLike | None = None) -> None:
        """Merges into the tables under `root` (the user's cache by default); each file is replaced at once."""
        root = pathlib.Path(root) if root is not None else cache_folder()
        for name, entries in self.tables.items():
            write_table(root / name, {**read_table(root / name), **entries})

    @staticmethod
    def load(root: str | os.PathLike | None = None) -> "TuningResult":
        """Every table under `root` (the user's cache by default)."""
        root = pathlib.Path(root) if root is not None else cache_folder()
        return TuningResult({str(p.relative_to(root)): read_table(p) for p in sorted(root.glob("*/*.json"))})


def write_table(path: pathlib.Path, table: Mapping[str, Any]) -> None:
    """Replaces a table at once: who reads it meanwhile sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(table, file, indent=1, sort_keys=True)
    os.replace(file.name, path)


def stored_tables(name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The user's table of that name, and the shipped one."""
    return read_table(cache_folder() / name), read_table(_SHIPPED / name)


def read_table(path: pathlib.Path) -> Mapping[str, Any]:
    """A table; an unreadable one is empty, since a lost table costs speed and never an answer."""
    try:
        status = path.stat()
    except OSError:
        return {}
    # Every call outside of jit asks: a file is parsed again only when it was replaced.
    return _parse_table(path, (status.st_ino, status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=64)
def _parse_table(path: pathlib.Path, version: tuple[int, int, int]) -> Mapping[str, Any]:
    del version  # only tells one state of the file from another
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


_in_use: contextvars.ContextVar[TuningResult | None] = contextvars.ContextVar("tuning_result", default=None)


@contextlib.contextmanager
def use(result: TuningResult) -> Iterator[None]:
    """Looks in `result` first, for calls traced inside the block (a jitted function keeps what it was traced with)."""
    token = _in_use.set(result)
    try:
        yield
    finally:
        _in_use.reset(token)


def resolve[ConfigT](choice: Choice, kind: type[ConfigT], heuristic: Callable, given: ConfigT | None = None) -> ConfigT:
    """The Config of one choice, from the first place that has one."""
    if given is not None:
        return given
    implementation = choice.name
    name = table_name(choice.device.kind, choice.call.op, implementation)
    entry_key = key(choice.call, implementation)
    in_use = _in_use.get()
    for table in (in_use.tables.get(name, {}) if in_use else {}, *stored_tables(name)):
        if (config := _parse(table.get(entry_key), kind)) is not None:
            return config
    return heuristic(choice.call, choice.device, implementation)


def _parse[ConfigT](fields: Any, kind: type[ConfigT]) -> ConfigT | None:
    """A Config from its stored fields; None if they no longer make one, or are those of another kind."""
    if not isinstance(fields, dict) or set(fields) != {field.name for field in dataclasses.fields(cast(Any, kind))}:
        return None
    try:
        return kind(**fields)
    except (TypeError, ValueError):
        return None


def autotune(function: Callable, *args, implementation: str | None = None, repeats: int = 5, **kwargs) -> TuningResult:
    """Measures every config of the op's search space on these arguments and returns the fastest.

    A config counts only if its output is as accurate as core/tolerance.py asks, against the reference. Time is wall
    clock of a jitted call, median of `repeats`.

    Args:
      function: a public function of this package.
      *args: its arrays (real ones: they are run).
      implementation: which implementation to tune; None tunes the one that "auto" runs.
      repeats: timed runs of each config.
      **kwargs: its other arguments.

    Returns:
      One entry, for `use`, `|` or `.save()`.
    """
    named = {} if implementation is None else {"implementation": implementation}
    choice = next(c for c in dispatch.explain(function, *args, **named, **kwargs) if c.call.direction == "forward")
    space = _search_space(choice)
    expected = function(*args, implementation="reference", **kwargs)
    # The heuristic's config is the yardstick: a candidate may not be less accurate than what runs today.
    naive = function(*args, **named, **kwargs)
    best, best_time = None, float("inf")
    for config in space:
        run = jax.jit(functools.partial(function, implementation=choice.name, config=config, **kwargs))
        for actual, want, usual in zip(*map(jax.tree.leaves, (run(*args), expected, naive)), strict=True):
            tolerance.assert_normal(actual, want, usual, f"{choice.call.op} with {config}")
        seconds = statistics.median(_time(run, args) for _ in range(repeats))
        if seconds < best_time:
            best, best_time = config, seconds
    if best is None:
        raise ValueError(f"{choice.call.op}: {choice.name} has no configuration to search.")
    name = table_name(choice.device.kind, choice.call.op, choice.name)
    return TuningResult({name: {key(choice.call, choice.name): dataclasses.asdict(best)}})


def _search_space(choice: Choice) -> Iterator[Any]:
    module = dispatch.load(choice.call.op, "config")
    return module.search_space(choice.call, choice.device, choice.name)


def _time(run: Callable, args: tuple) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start
