# SPDX-License-Identifier: Apache-2.0
"""The public function: checks, dispatch and the custom gradient. No arithmetic here."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax

from pallas_kernels.core import dispatch, tuning
from pallas_kernels.core.activations import Activation, check_activation, parts_of
from pallas_kernels.core.check import Axes, check_dtype, check_same_dtype
from pallas_kernels.core.dispatch import Argument, Call, Choice, Implementation
from pallas_kernels.core.varying import vary_like
from pallas_kernels.quantized_matmul import config as config_lib
from pallas_kernels.quantized_matmul.weights import IntWeight, MixedBitWeight, Weight

OP = "quantized_matmul"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def quantized_matmul(
    x: jax.Array,
    weight: Weight,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    implementation: Implementation = "auto",
    config: Any = None,
) -> jax.Array:
    r"""x times a weight of a few bits, and what follows it in a model: activation(x w + bias).

    Letters: M rows (leading axes are folded into it), K input features, N columns of the weight, O output features: N,
    or N / 2 for "swiglu".

        z[m, n]   = sum_k x[m, k] w[k, n] + bias[n]            w = weight.dequantize()
        out[m, o] = activation(z)[m, o]

        words of w, 2 to 8 bits each    --->  a tile of w, in the dtype of x  --->  multiplied, summed in float32
        scales and zeros of groups      -/

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import quantize, quantized_matmul
    >>> w = jax.random.normal(jax.random.key(0), (2048, 256)) / 16                    # [K, N]
    >>> weight = quantize(w, "mixed_2_4")
    >>> round(weight.bits_per_weight, 2)
    2.88
    >>> quantized_matmul(jnp.ones((4, 1, 2048), jnp.bfloat16), weight).shape
    (4, 1, 256)

    Args:
      x: [..., K], float32, bfloat16, float16 or float64. Products accumulate in float32 (float64), and bias and
        activation are applied before the one rounding to this dtype.
      weight: a MixedBitWeight or IntWeight [K, N], as `quantize` makes them. For an IntWeight with activation_bits=8
        the rows of x are rounded to int8 on the way, with scale max|x| / 127, and multiplied in integers.
      bias: [N], of x's dtype.
      activation: None, "silu", "gelu" (by tanh, as jax.nn.gelu), "gelu_exact" (by erf) or "swiglu" (N must be even; the
        first half of the columns are gates).
      implementation: "auto", "mosaic_gpu", "mosaic_tpu", "xla", "reference", or names in order of preference. A
        named one runs or raises. `pallas_kernels.explain` shows what runs and why.
      config: tile sizes (an object of pallas_kernels.quantized_matmul.config); None looks in the tuning tables.

    Returns:
      [..., O] in the dtype of x. Differentiable (reverse mode) in x and bias; rounding x to int8 has gradient 1.

    Raises:
      ValueError: shapes that do not fit, named by argument and axis letter; an unknown activation.
      TypeError: dtypes that do not fit; a weight that is no quantized one; a gradient of the weight.
      UnsupportedError: the named implementation cannot run this call; says why and what to try.

    Source: Li et al., "Fast and Efficient 2-bit LLM Inference on GPU: 2/4/16-bit in a Weight Matrix with Asynchronous
    Dequantization", 2023, for the mixture of 2 and 4 bits.
    """
    call = describe(x, weight, bias=bias, activation=activation)
    choice = dispatch.choose(call, implementation)
    kernel_config = _config(choice, config)
    inputs = _Inputs(x.reshape(-1, x.shape[-1]), _frozen(weight), bias)
    if choice.name == "reference":
        out: Any = choice.module.matmul(*inputs, activation=activation).astype(x.dtype)
    else:
        plan = _Plan(choice, kernel_config, dispatch.choose(call.backward(), "xla"))
        out = _multiply(plan, vary_like(inputs, inputs))
    return out.reshape(*x.shape[:-1], call.sizes["N"] // parts_of(activation))


def describe(x: jax.Array, weight: Weight, *, bias: jax.Array | None = None, activation: str | None = None) -> Call:
    """Checks the arguments of `quantized_matmul` and puts them in the words of dispatch.

    Options of the call: activation, and those of the weight's format: bits (2, 4, 8 or "mixed_2_4"), group_size,
    activation_bits, tail_strips (T', padding included) and outliers (how many), None where the format has none.
    """
    if not isinstance(weight, (MixedBitWeight, IntWeight)):
        raise TypeError(
            f"{OP}: weight must be a MixedBitWeight or an IntWeight, got {type(weight).__name__}; "
            "pallas_kernels.quantize makes one of an array, flat_gemm multiplies with arrays."
        )
    try:
        weight.check()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{OP}: weight: {error}") from None
    axes = Axes(OP)
    if x.ndim < 1:
        axes.fail("x", "[..., K]", x.shape)
    leading = " ".join(f"B{i}" for i in range(x.ndim - 1))
    axes.bind("x", x.shape, f"{leading} K")
    axes.bind("weight", weight.shape, "K N")
    axes.check_not_empty()
    check_activation(OP, activation, axes["N"], "weight")
    check_dtype(OP, "x", x.dtype, _DTYPES)
    arguments = [
        Argument("x", x.dtype.name, (("M", math.prod(x.shape[:-1])), ("K", axes["K"]))),
        Argument("weight", weight.dtype.name, (("K", axes["K"]), ("N", axes["N"]))),
    ]
    if bias is not None:
        axes.bind("bias", bias.shape, "N")
        check_same_dtype(OP, {"x": x.dtype, "bias": bias.dtype})
        arguments.append(Argument("bias", bias.dtype.name, (("N", axes["N"]),)))
    return Call(OP, tuple(arguments), (("activation", activation), *_format(weight).items()))


def _format(weight: Weight) -> dict[str, Any]:
    """What a kernel's program depends on."""
    if isinstance(weight, IntWeight):
        own: dict[str, Any] = {"bits": weight.bits, "group_size": weight.group_size}
        return own | {"activation_bits": weight.activation_bits, "tail_strips": None, "outliers": None}
    outliers = None if weight.outliers is None else weight.outliers.values.shape[0]
    mixed: dict[str, Any] = {"bits": "mixed_2_4", "group_size": None, "activation_bits": None}
    return mixed | {"tail_strips": weight.tail_index.shape[0], "outliers": outliers}


@jax.custom_jvp
def _frozen(weight: Weight) -> Weight:
    """The weight, whose gradient is refused: it is no small change of its words, and zero would be a wrong answer."""
    return weight


@functools.partial(_frozen.defjvp, symbolic_zeros=True)
def _refuse_gradient(primals: tuple[Weight], tangents: tuple[Weight]) -> tuple[Weight, Weight]:
    for name, tangent in tangents[0].tensors().items():
        if not isinstance(tangent, jax.custom_derivatives.SymbolicZero):
            raise TypeError(
                f"{OP}: weights that are quantized have no gradient, and {name} of the weight is differentiated; take "
                "gradients of x and bias, or train an adapter (a low-rank product that is added to the output) beside "
                "it. jax.lax.stop_gradient(weight), or leaving it out of what is differentiated, says so to JAX."
            )
    return primals[0], tangents[0]


class _Inputs(NamedTuple):
    """Leading axes are folded: x [M, K]."""

    x: jax.Array
    weight: Weight
    bias: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Plan:
    choice: Choice
    config: Any
    backward: Choice

    @property
    def activation(self) -> Any:
        return self.choice.call.option("activation")


def _config(choice: Choice, given: Any) -> Any:
    """The given config, if it is of the implementation that runs, else what the tuning tables or the heuristic say."""
    kinds = config_lib.kinds(choice.call, choice.device, choice.name)
    if given is not None and not isinstance(given, kinds):
        takes = " or ".join(f"a {kind.__name__}" for kind in kinds) or "no config"
        raise ValueError(f'{OP}: implementation "{choice.name}" takes {takes}, got {given!r}.')
    return tuning.resolve(choice, kinds[0], config_lib.heuristic, given) if kinds else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(plan: _Plan, inputs: _Inputs) -> jax.Array:
    out = plan.choice.module.forward(*inputs, activation=plan.activation, config=plan.config)
    return vary_like(out, inputs)  # inside shard_map a kernel's outputs come without the axes they vary over


def _forward_rule(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, _Inputs]:
    return _multiply(plan, inputs), inputs


def _backward_rule(plan: _Plan, inputs: _Inputs, dout: jax.Array) -> tuple[_Inputs]:
    dx, dbias = plan.backward.module.backward(*inputs, dout, activation=plan.activation)
    dx, dbias = vary_like((dx, dbias), inputs)
    return (_Inputs(dx, None, dbias),)  # type: ignore[arg-type]  # None: no gradient; `_frozen` has refused one


_multiply.defvjp(_forward_rule, _backward_rule)
