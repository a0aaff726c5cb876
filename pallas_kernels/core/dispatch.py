# SPDX-License-Identifier: Apache-2.0
"""implementation="auto" -> which file runs, and why the others did not.

    public function --Call--> choose() --asks--> <op>/<implementation>.py: supports(call, device)
                                 |
                                 +--> Choice(implementation, module, refusals)   logged once, shown by explain()

An implementation is a module (or folder) `pallas_kernels/<op>/<implementation>` that exports
`supports(call, device) -> Refusal | None`: no exception, no compiling, no arrays.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import logging
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

from pallas_kernels.core import device as device_lib
from pallas_kernels.core.check import UnsupportedError, short_dtype
from pallas_kernels.core.device import Device

# Importing it adds to what JAX compiles under: were it imported by the first call that asks a TPU kernel, what had been
# jitted before would be compiled once more.
with contextlib.suppress(ImportError):
    importlib.import_module("jax.experimental.pallas.tpu")

logger = logging.getLogger("pallas_kernels")

# The order in which "auto" asks. `reference` is the specification: it runs only when named.
IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")
AUTOMATIC = IMPLEMENTATIONS[:-1]

Implementation = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why an implementation does not take a call: one clause, without the implementation's name."""

    why: str

    def __str__(self) -> str:
        return self.why


@dataclasses.dataclass(frozen=True)
class Argument:
    """One array of a call: the letter it is printed with, its dtype, and its axes by letter."""

    label: str
    dtype: str
    axes: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        sizes = ",".join(f"{letter}={size}" for letter, size in self.axes)
        return f"{self.label} {short_dtype(self.dtype)}[{sizes}]"


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything that `supports`, `heuristic` and the tuner may look at: shapes and options, never values.

    Attributes:
      op: name of the public function.
      arguments: the arrays, in order.
      options: static arguments by name, already resolved (no None standing for a default).
      direction: "forward" or "backward".
    """

    op: str
    arguments: tuple[Argument, ...]
    options: tuple[tuple[str, Hashable], ...] = ()
    direction: str = "forward"

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Axis sizes by letter."""
        return {letter: size for argument in self.arguments for letter, size in argument.axes}

    def argument(self, label: str) -> Argument | None:
        return next((a for a in self.arguments if a.label == label), None)

    def option(self, name: str) -> Any:
        return dict(self.options)[name]

    def backward(self) -> "Call":
        return dataclasses.replace(self, direction="backward")

    def __str__(self) -> str:
        options = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.options if v is not None]
        return " ".join([*map(str, self.arguments), *options])


@dataclasses.dataclass(frozen=True)
class Choice:
    """The answer for one call and direction. `implementation` is None where nothing accepted the call; `automatic` is
    what "auto" asks for such a call, `why` the reason for another order than everybody's."""

    call: Call
    device: Device
    requested: tuple[str, ...]
    implementation: str | None
    refusals: tuple[tuple[str, Refusal], ...]
    automatic: tuple[str, ...] = AUTOMATIC
    why: str = ""

    @property
    def name(self) -> str:
        """The implementation's name; an UnsupportedError with the reasons if none accepted."""
        if self.implementation is None:
            raise UnsupportedError(self.refusal_text())
        return self.implementation

    @property
    def module(self) -> types.ModuleType:
        """The implementation's module; raises as `name` does."""
        return load(self.call.op, self.name)

    def refusal_text(self) -> str:
        named = self.requested[0] if len(self.requested) == 1 else self.requested
        spelled = f'"{named}"' if isinstance(named, str) else str(named)
        what = "this call" if self.call.direction == "forward" else "the gradient of this call"
        reasons = [r.why if len(self.refusals) == 1 else f"{name}: {r.why}" for name, r in self.refusals]
        # A retry on "auto" must be judged as it would be: the automatic order, same direction.
        rescue = choose(self.call, self.automatic, self.device, record=False).implementation
        hint = f'implementation="auto" (would run "{rescue}")' if rescue else "no implementation takes it"
        return (
            f"{self.call.op}(implementation={spelled}) cannot run {what}.\n"
            f"  why : {('; '.join(reasons))}\n"
            f"  call: {self.call} on {self.device}\n"
            f"  try : {hint}"
        )


@functools.cache
def load(op: str, implementation: str) -> types.ModuleType:
    return importlib.import_module(f"pallas_kernels.{op}.{implementation}")


def _ask(call: Call, implementation: str, device: Device) -> Refusal | None:
    """An implementation's own answer; a module that is absent or does not import answers by that."""
    target = f"pallas_kernels.{call.op}.{implementation}"
    try:
        module = load(call.op, implementation)
    except ModuleNotFoundError as error:
        if error.name == target:
            return Refusal(f"{call.op} has no {implementation} implementation")
        return Refusal(f"its import failed: {error}")
    except ImportError as error:
        return Refusal(f"its import failed: {error}")
    return module.supports(call, device)


def requested_names(implementation: Implementation, automatic: tuple[str, ...] = AUTOMATIC) -> tuple[str, ...]:
    """The names to try in order, `automatic` for "auto"; ValueError for one that does not exist.

    >>> requested_names("auto")
    ('mosaic_gpu', 'mosaic_tpu', 'xla')
    """
    if isinstance(implementation, str):
        names = automatic if implementation == "auto" else (implementation,)
    else:
        names = tuple(implementation)
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        known = ", ".join(f'"{name}"' for name in ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation must be one of {known}, or a sequence of them, got {implementation!r}.")
    return names


_recorder: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("choices", default=None)
_logged: set[tuple[Call, Device]] = set()


def choose(
    call: Call,
    implementation: Implementation = "auto",
    device: Device | None = None,
    *,
    record: bool = True,
    automatic: tuple[str, ...] = AUTOMATIC,
    why: str = "",
) -> Choice:
    """The first requested implementation that accepts `call`, with the refusals met on the way.

    An operation that knows which implementation is the fastest for a call says what "auto" asks for it, and why.
    """
    device = device or device_lib.current()
    names = requested_names(implementation, automatic)
    refusals: list[tuple[str, Refusal]] = []
    chosen = None
    for name in names:
        refusal = _ask(call, name, device)
        if refusal is None:
            chosen = name
            break
        refusals.append((name, refusal))
    choice = Choice(call, device, names, chosen, tuple(refusals), automatic, why)
    if record:
        if (record_to := _recorder.get()) is not None:
            record_to.append(choice)
        if (call, device) not in _logged:
            _logged.add((call, device))
            logger.info("%s %s: %s (%s on %s)", call.op, call.direction, chosen or "refused", call, device)
    return choice


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collects the choices made while tracing inside the block."""
    token = _recorder.set(choices := [])
    try:
        yield choices
    finally:
        _recorder.reset(token)


class Explanation(tuple[Choice, ...]):
    """The choices of one traced program; `str` and `repr` are the table."""

    def __repr__(self) -> str:
        if not self:
            return "no operation of pallas_kernels was traced (a jitted function that ran before is not traced again)"
        return "\n".join(self._rows())

    __str__ = __repr__

    def _rows(self) -> Iterator[str]:
        shown = None
        for choice in dict.fromkeys(self):
            forward = dataclasses.replace(choice.call, direction="forward")
            if forward != shown:
                shown = forward
                yield f"{choice.call.op} on {choice.device}"
                yield f"  call     {choice.call}"
            why = f" ({choice.why})" if choice.why else ""
            yield f"  {choice.call.direction:<8} {choice.implementation or 'refused'}{why}"
            for name, refusal in choice.refusals:
                yield f"    {name:<10} no: {refusal}"


def explain(function: Callable, *args, **kwargs) -> Explanation:
    """Which implementation each call inside `function(*args, **kwargs)` runs, forward and backward, and why.

    Nothing is computed: arguments may be arrays or `jax.ShapeDtypeStruct`s.

    >>> import jax, jax.numpy as jnp, pallas_kernels as pk
    >>> x = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.float32)
    >>> pk.explain(pk.flash_attention, x, x, x)[0].implementation in ("mosaic_gpu", "mosaic_tpu", "xla")
    True

    Args:
      function: a function of this package, or any function that calls them (a model's forward pass).
      *args: its arguments.
      **kwargs: its keyword arguments; those that are not arrays stay static.
    """
    arrays = {k: v for k, v in kwargs.items() if _is_array_tree(v)}
    static = {k: v for k, v in kwargs.items() if k not in arrays}
    with recording() as choices:
        jax.eval_shape(functools.partial(function, **static), *args, **arrays)
    return Explanation(choices)


def _is_array_tree(value) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)
