# SPDX-License-Identifier: Apache-2.0
"""The public function: checks, dispatch and the custom gradient. No arithmetic here."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax

from pallas_kernels.core import device as device_lib
from pallas_kernels.core import dispatch, tuning
from pallas_kernels.core.activations import Activation, check_activation, parts_of
from pallas_kernels.core.check import Axes, check_dtype, check_number, check_same_dtype
from pallas_kernels.core.dispatch import Argument, Call, Choice, Implementation
from pallas_kernels.core.varying import vary_like
from pallas_kernels.flat_gemm import config as config_lib
from pallas_kernels.flat_gemm import routes

OP = "flat_gemm"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def flat_gemm(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: Activation | None = None,
    transpose_w: bool = False,
    rms_norm_eps: float | None = None,
    implementation: Implementation = "auto",
    config: Any = None,
) -> jax.Array:
    r"""A few rows times a large weight, and what follows it in a model: residual + activation(x w + bias).

    Letters: M rows (one for each sequence that decodes; leading axes are folded into it), K input features, N columns
    of the weight, O output features: N, or N / 2 for "swiglu".

        z[m, n]   = sum_k x[m, k] w[k, n] + bias[n]            w[n, k] with transpose_w; x normalized with rms_norm_eps
        out[m, o] = residual[m, o] + activation(z)[m, o]

        swiglu     columns of w:   | gate 0 ... N/2 - 1 | up 0 ... N/2 - 1 |      out = silu(gate) * up

    Which implementation is fast depends on M: "auto" looks up the crossings that were measured for a weight of this
    size on this device (`pallas_kernels.flat_gemm.routes`), and `pallas_kernels.explain` prints them.

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import flat_gemm
    >>> x = jax.random.normal(jax.random.key(0), (4, 1, 256), jnp.bfloat16)              # [..., M, K]
    >>> w = jax.random.normal(jax.random.key(1), (1024, 256), jnp.bfloat16) / 16         # [N, K]
    >>> flat_gemm(x, w, activation="swiglu", transpose_w=True).shape
    (4, 1, 512)

    Args:
      x: [..., M, K], float32, bfloat16, float16 or float64. Products accumulate in float32 (float64), and bias,
        activation and residual are applied before the one rounding to this dtype. Kernels take up to 256 rows in all;
        "auto" gives more to XLA.
      w: [K, N], or [N, K] with transpose_w; of x's dtype.
      bias: [N], of x's dtype.
      residual: [..., M, O], of x's dtype; added last.
      activation: None, "silu", "gelu" (by tanh, as jax.nn.gelu), "gelu_exact" (by erf) or "swiglu" (N must be even).
      transpose_w: w is [N, K], as PyTorch and Hugging Face store it: each output feature lies in one piece.
      rms_norm_eps: x[m] / sqrt(mean(x[m]^2) + rms_norm_eps) takes the place of x (RMSNorm; its learned scale belongs in
        w). Kernels see all of x on their way along K, so that it costs next to nothing.
      implementation: "auto", "mosaic_gpu", "mosaic_tpu", "xla", "reference", or names in order of preference. A
        named one runs or raises. `pallas_kernels.explain` shows what runs and why.
      config: tile sizes (an object of pallas_kernels.flat_gemm.config); None looks in the tuning tables.

    Returns:
      [..., M, O] in the dtype of x. Differentiable (reverse mode) in x, w, bias and residual, by ordinary
      matrix products.

    Raises:
      ValueError: shapes that do not fit, named by argument and axis letter; an unknown activation; a negative eps.
      TypeError: dtypes that do not fit.
      UnsupportedError: the named implementation cannot run this call; says why and what to try.

    Source: Hong et al., "FlashDecoding++", 2023, section 4, for the flat product; section 5 for the look-up.
    """
    options = {"activation": activation, "transpose_w": transpose_w, "rms_norm_eps": rms_norm_eps}
    call = describe(x, w, bias=bias, residual=residual, **options)
    route = routes.choose(call, device_lib.current())
    choice = dispatch.choose(call, implementation, automatic=route.implementations, why=_why(implementation, route))
    kernel_config = _config(choice, config)
    O = config_lib.outputs(call)
    folded = None if residual is None else residual.reshape(-1, O)
    inputs = _Inputs(x.reshape(-1, x.shape[-1]), w, bias, folded)
    if choice.name == "reference":
        out: Any = choice.module.gemm(*inputs, **options).astype(x.dtype)
    else:
        plan = _Plan(choice, kernel_config, dispatch.choose(call.backward(), "xla"))
        out = _multiply(plan, vary_like(inputs, inputs))
    return out.reshape(*x.shape[:-1], O)


def describe(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: str | None = None,
    transpose_w: bool = False,
    rms_norm_eps: float | None = None,
) -> Call:
    """Checks the arguments of `flat_gemm` and puts them in the words of dispatch."""
    if not isinstance(transpose_w, bool):
        raise TypeError(f"{OP}: transpose_w must be True or False, got {transpose_w!r}.")
    axes = Axes(OP)
    if x.ndim < 2:
        axes.fail("x", "[..., M, K]", x.shape)
    leading = " ".join(f"B{i}" for i in range(x.ndim - 2))
    axes.bind("x", x.shape, f"{leading} M K")
    weight_letters = "N K" if transpose_w else "K N"
    axes.bind("w", w.shape, weight_letters)
    axes.check_not_empty()
    M, N, K = math.prod(x.shape[:-1]), axes["N"], axes["K"]
    check_activation(OP, activation, N, "w")
    axes["O"], axes.origin["O"] = N // parts_of(activation), "w"
    arrays = {"x": x, "w": w, "bias": bias, "residual": residual}
    check_dtype(OP, "x", x.dtype, _DTYPES)
    check_same_dtype(OP, {name: array.dtype for name, array in arrays.items() if array is not None})
    sizes = {"M": M, "K": K, "N": N, "O": axes["O"]}
    letters = {"x": "M K", "w": weight_letters, "bias": "N", "residual": "M O"}
    for name, shape in (("bias", "N"), ("residual", f"{leading} M O")):
        if (array := arrays[name]) is not None:
            axes.bind(name, array.shape, shape)
    arguments = tuple(
        Argument(name, array.dtype.name, tuple((letter, sizes[letter]) for letter in letters[name].split()))
        for name, array in arrays.items()
        if array is not None
    )
    if rms_norm_eps is not None and check_number(OP, "rms_norm_eps", rms_norm_eps) < 0:
        raise ValueError(f"{OP}: rms_norm_eps must be 0 or more, or None, got {rms_norm_eps!r}.")
    options = {"activation": activation, "transpose_w": transpose_w, "rms_norm_eps": rms_norm_eps}
    return Call(OP, arguments, tuple(options.items()))


class _Inputs(NamedTuple):
    """Leading axes are folded: x [M, K], residual [M, O]."""

    x: jax.Array
    w: jax.Array
    bias: jax.Array | None
    residual: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Plan:
    choice: Choice
    config: Any
    backward: Choice

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.choice.call.options)


def _why(implementation: Implementation, route: routes.Route) -> str:
    """A named implementation runs because it was named."""
    return route.why if implementation == "auto" else ""


def _config(choice: Choice, given: Any) -> Any:
    """The given config, if it is of the implementation that runs, else what the tuning tables or the heuristic say."""
    kinds = config_lib.kinds(choice.call, choice.device, choice.name)
    if given is not None and not isinstance(given, kinds):
        takes = " or ".join(f"a {kind.__name__}" for kind in kinds) or "no config"
        raise ValueError(f'{OP}: implementation "{choice.name}" takes {takes}, got {given!r}.')
    return tuning.resolve(choice, kinds[0], config_lib.heuristic, given) if kinds else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(plan: _Plan, inputs: _Inputs) -> jax.Array:
    out = plan.choice.module.forward(*inputs, **plan.options, config=plan.config)
    return vary_like(out, inputs)  # inside shard_map a kernel's outputs come without the axes they vary over


def _forward_rule(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, _Inputs]:
    return _multiply(plan, inputs), inputs


def _backward_rule(plan: _Plan, inputs: _Inputs, dout: jax.Array) -> tuple[_Inputs]:
    gradients = plan.backward.module.backward(*inputs, dout, **plan.options)
    return (_Inputs(*vary_like(tuple(gradients), inputs)),)


_multiply.defvjp(_forward_rule, _backward_rule)
