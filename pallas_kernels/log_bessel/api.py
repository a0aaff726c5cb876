# SPDX-License-Identifier: Apache-2.0
"""The public functions: checks, dispatch, what is outside of the expressions' domain, and derivatives."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from pallas_kernels.core import dispatch
from pallas_kernels.core.check import check_dtype
from pallas_kernels.core.dispatch import Argument, Call, Implementation
from pallas_kernels.log_bessel import published
from pallas_kernels.log_bessel.edges import everywhere, within
from pallas_kernels.log_bessel.expressions import LARGE, Found

OP = "log_bessel"
Mode = Literal["accurate", "paper"]
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def log_iv(
    v: ArrayLike, x: ArrayLike, *, mode: Mode = "accurate", implementation: Implementation = "auto"
) -> jax.Array:
    """log I_v(x), the logarithm of the modified Bessel function of the first kind, for any order and argument.

    >>> from pallas_kernels import log_iv
    >>> print(f"{log_iv(1023.0, 102.4):.2f}")                 # I_v itself is below the smallest double
    -2042.46

    Args:
      v: order, real, not negative unless it is an integer (I_{-n} = I_n). If it is a Python number of 24 or more, the
        program holds only what such orders need.
      x: argument, not negative. float32 or float64; bfloat16 and float16 are computed in float32. Both broadcast.
      mode: "paper" is the published method to the letter (published.py), to compare with: it has errors of up to 1e-9.
      implementation: "auto", "xla", "reference", or names in order of preference.

    Returns:
      Of the broadcast shape and of the arguments' type, float32 or float64. At x = 0 it is 0 for v = 0 and -inf for
      v > 0, at x = inf +inf. NaN where x < 0, where v < 0 is no integer, and where an argument is NaN.

      Differentiable to any order in both arguments, forward and reverse; d/dx = v / x + I_{v+1} / I_v.

    Raises:
      TypeError: complex or other arguments that are no real numbers.
      UnsupportedError: the named implementation cannot run this call.

    Sources: see expressions.py; accuracy: README.md in this folder.
    """
    return _public("log_iv", v, x, mode, implementation, first=True, wanted="log")


def log_kv(
    v: ArrayLike, x: ArrayLike, *, mode: Mode = "accurate", implementation: Implementation = "auto"
) -> jax.Array:
    """log K_v(x), of the modified Bessel function of the second kind; arguments, derivatives and errors as of `log_iv`.

    >>> from pallas_kernels import log_kv
    >>> print(f"{log_kv(1023.0, 102.4):.2f}")
    2034.83

    Returns:
      K_{-v} = K_v, for any real order. +inf at x = 0, -inf at x = inf, NaN where x < 0 or an argument is NaN.
      d/dx = v / x - K_{v+1} / K_v.
    """
    return _public("log_kv", v, x, mode, implementation, first=False, wanted="log")


def bessel_ratio_i(
    v: ArrayLike, x: ArrayLike, *, mode: Mode = "accurate", implementation: Implementation = "auto"
) -> jax.Array:
    """I_{v+1}(x) / I_v(x), from 0 to 1: not by a difference of logarithms, which would lose the digits of their size.

    >>> from pallas_kernels import bessel_ratio_i
    >>> print(f"{bessel_ratio_i(0.0, 2.0):.6f}")               # mean resultant length of von Mises, kappa = 2
    0.697775

    Arguments and errors as of `log_iv`, but that orders are not negative: NaN where they are. 0 at x = 0, 1 at x = inf.
    d/dx = 1 - r^2 - (2 v + 1) r / x.
    """
    return _public("bessel_ratio_i", v, x, mode, implementation, first=True, wanted="ratio")


def bessel_ratio_k(
    v: ArrayLike, x: ArrayLike, *, mode: Mode = "accurate", implementation: Implementation = "auto"
) -> jax.Array:
    """K_{v+1}(x) / K_v(x), above 1; as `bessel_ratio_i`. +inf at x = 0, 1 at x = inf. d/dx = r^2 - (2 v + 1) r / x - 1.

    >>> from pallas_kernels import bessel_ratio_k
    >>> print(f"{bessel_ratio_k(0.5, 2.0):.4f}")               # 1 + 1 / x for v = 1/2
    1.5000
    """
    return _public("bessel_ratio_k", v, x, mode, implementation, first=False, wanted="ratio")


def _public(
    name: str,
    v: ArrayLike,
    x: ArrayLike,
    mode: Mode,
    implementation: Implementation,
    *,
    first: bool,
    wanted: Literal["log", "ratio"],
) -> jax.Array:
    if mode not in ("accurate", "paper"):
        raise ValueError(f'{name}: mode must be "accurate" or "paper", got {mode!r}.')
    large_order = isinstance(v, int | float) and v >= LARGE
    for label, given in (("v", v), ("x", x)):
        kind = jnp.result_type(given)
        if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
            raise TypeError(f"{name}: {label} must be real numbers, got {kind}.")
    kind = jnp.result_type(v, x)
    if jnp.issubdtype(kind, jnp.integer):
        kind = jnp.result_type(float)
    check_dtype(name, "the type of v and x together", kind, _DTYPES)
    if kind.itemsize == 2:
        kind = jnp.dtype(jnp.float32)
    shape = jnp.broadcast_shapes(jnp.shape(v), jnp.shape(x))
    if 0 in shape:
        return jnp.zeros(shape, kind)  # nobody votes
    arguments = tuple(Argument(label, kind.name, (("n", math.prod(shape)),)) for label in "vx")
    call = Call(OP, arguments, (("function", name), ("mode", mode), ("large_order", large_order or None)))
    plan = _Plan(dispatch.choose(call, implementation).name, first, mode, large_order, wanted)
    return _differentiable(plan, *(jnp.broadcast_to(jnp.asarray(given, kind), shape) for given in (v, x)))


class _Plan(NamedTuple):
    implementation: str
    first: bool  # I, not K
    mode: Mode
    large_order: bool  # known to be, when the program is made
    wanted: Literal["log", "ratio", "both"]

    def keep(self, found: Found) -> Any:
        return found if self.wanted == "both" else getattr(found, self.wanted)


def _evaluate(plan: _Plan, v: jax.Array, x: jax.Array) -> Any:
    if plan.mode == "paper":
        inside = lambda v, x: plan.keep(published.evaluate(v, x, first=plan.first))  # noqa: E731
        return everywhere(v, x, inside, first=plan.first, keep=plan.keep)
    module: Any = dispatch.load(OP, plan.implementation)
    return module.evaluate(v, x, first=plan.first, keep=plan.keep, large_order=plan.large_order)


@functools.partial(jax.jit, static_argnums=0)
def _value(plan: _Plan, v: jax.Array, x: jax.Array) -> Any:
    @jax.custom_batching.custom_vmap
    def of_elements(v: jax.Array, x: jax.Array) -> Any:
        return _evaluate(plan, v, x)

    @of_elements.def_vmap
    def _(size: int, batched: list[bool], v: jax.Array, x: jax.Array) -> tuple[Any, Any]:
        # A larger array of elements, not a batch of small programs.
        v, x = (a if has else jnp.broadcast_to(a, (size, *a.shape)) for a, has in zip((v, x), batched, strict=True))
        found = of_elements(v, x)
        return found, jax.tree.map(lambda _: True, found)

    return of_elements(v, x)


_with_derivatives = jax.custom_jvp(_value, nondiff_argnums=(0,))
_differentiable: Callable[[_Plan, jax.Array, jax.Array], Any] = cast(Any, _with_derivatives)


@functools.partial(_with_derivatives.defjvp, symbolic_zeros=True)
def _derivatives(plan: _Plan, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    v, x = primals
    of_v, of_x = tangents
    both = plan._replace(wanted="both")
    found: Found = _differentiable(both, v, x)  # itself with derivatives, for those of higher order
    log_dot, ratio_dot = jnp.zeros_like(x), jnp.zeros_like(x)
    if not isinstance(of_x, SymbolicZero):
        # At the edges 0, as the constants that are there.
        there = within(v, x)
        order, argument, ratio = (jnp.where(there, a, 1) for a in (jnp.abs(v), x, found.ratio))
        sign = 1.0 if plan.first else -1.0
        by_x = order / argument + sign * ratio, sign * (1 - ratio**2 - sign * (2 * order + 1) * ratio / argument)
        log_dot, ratio_dot = (
            dot + jnp.where(there, by, 0) * of_x for dot, by in zip((log_dot, ratio_dot), by_x, strict=True)
        )
    if not isinstance(of_v, SymbolicZero):
        # Of the expression that was taken, through XLA: to any order.
        traced = both if plan.implementation == "reference" else both._replace(implementation="xla")
        by_v = jax.jvp(lambda v: _evaluate(traced, v, x), (v,), (jnp.ones_like(v),))[1]
        log_dot, ratio_dot = log_dot + by_v.log * of_v, ratio_dot + by_v.ratio * of_v
    return plan.keep(found), plan.keep(Found(log_dot, ratio_dot))
