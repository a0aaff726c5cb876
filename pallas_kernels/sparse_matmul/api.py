# SPDX-License-Identifier: Apache-2.0
"""The public function: checks, dispatch and the custom gradient. No arithmetic here."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.core import dispatch, tuning
from pallas_kernels.core.activations import Activation, check_activation, parts_of
from pallas_kernels.core.check import Axes, check_dtype, check_same_dtype
from pallas_kernels.core.dispatch import Argument, Call, Choice, Implementation
from pallas_kernels.core.varying import vary_like
from pallas_kernels.sparse_matmul import config as config_lib
from pallas_kernels.sparse_matmul.weights import Sparse24Weight

OP = "sparse_matmul"
_FLOATING = ("float32", "bfloat16", "float16")


def sparse_matmul(
    x: jax.Array,
    weight: Sparse24Weight | jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
    config: Any = None,
) -> jax.Array:
    r"""x times a weight of which two of every four inputs are kept, and what follows it: activation(x w + bias).

    Letters: M rows (leading axes are folded into it), K input features, N columns of the weight, O output features: N,
    or N / 2 for "swiglu".

        floating weights    out = activation(sum_k x[m, k] w[k, n] + bias[n])
        integer weights     out = activation(a b[n] sum_k q[m, k] w[k, n] + bias[n])
                            q = clip(round(x / a), -127, 127)

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import Sparse24Weight, prune_2_4, sparse_matmul
    >>> w = prune_2_4(jax.random.normal(jax.random.key(0), (256, 128), jnp.bfloat16))       # [K, N]
    >>> weight = Sparse24Weight.from_dense(w)
    >>> sparse_matmul(jnp.ones((4, 1, 256), jnp.bfloat16), weight, activation="gelu").shape
    (4, 1, 128)

    Args:
      x: [..., K]. For a floating weight of the weight's dtype, float32, bfloat16 or float16; for one of integers any of
        these, which is rounded to int8, or int8. Products accumulate in float32 (int32), and bias and activation are
        applied before the one rounding to `out_dtype`.
      weight: a Sparse24Weight [K, N], floating, int8, or of 4 bits (bits=4: those are storage, and multiplied as int8);
        or a dense int8 array [K, N].
      bias: [N], of the output's dtype.
      activation: None, "silu", "gelu" (by tanh, as jax.nn.gelu), "gelu_exact" (by erf) or "swiglu" (N must be even; the
        first half of the columns are gates).
      scales: float32 (a [], b [N]) of x and of the weight's outputs, for weights of integers; None for floating ones.
        They are constants: no gradient reaches them.
      out_dtype: float32, bfloat16 or float16; None for that of x, which int8 is not.
      implementation: "auto", "mosaic_gpu", "xla", "reference", or names in order of preference. A named one runs or
        raises. `pallas_kernels.explain` shows what runs and why.
      config: tile sizes (an object of pallas_kernels.sparse_matmul.config); None looks in the tuning tables.

    Returns:
      [..., O]. Differentiable (reverse mode) in x, bias and the values that a floating weight keeps; its pattern is
      fixed. Rounding x to int8 has gradient 1, and 0 where it is clipped.

    Raises:
      ValueError: shapes that do not fit, named by argument and axis letter; an unknown activation; scales that are
        missing or too many.
      TypeError: dtypes that do not fit; a weight that is neither.
      UnsupportedError: the named implementation cannot run this call; says why and what to try.

    Sources: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, for the pattern; Yu et al., "Boost Vision
    Transformer with GPU-Friendly Sparsity and Quantization", 2023, for its use with integers.
    """
    call = describe(x, weight, bias=bias, activation=activation, scales=scales, out_dtype=out_dtype)
    choice = dispatch.choose(call, implementation)
    kernel_config = _config(choice, config)
    inputs = _Inputs(x.reshape(-1, x.shape[-1]), weight, bias, scales)
    dtype = jnp.dtype(out_dtype or x.dtype)
    if choice.name == "reference":
        out: Any = choice.module.matmul(*inputs[:3], activation=activation, scales=scales).astype(dtype)
    else:
        plan = _Plan(choice, kernel_config, dispatch.choose(call.backward(), "xla"), dtype)
        out = _multiply(plan, vary_like(inputs, inputs))
    return out.reshape(*x.shape[:-1], call.sizes["N"] // parts_of(activation))


def describe(
    x: jax.Array,
    weight: Sparse24Weight | jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    out_dtype: DTypeLike | None = None,
) -> Call:
    """Checks the arguments of `sparse_matmul` and puts them in the words of dispatch.

    Options of the call: activation, bits (4 or None), sparse (False for a dense weight), out_dtype.
    """
    sparse = isinstance(weight, Sparse24Weight)
    if sparse:
        try:
            weight.check()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{OP}: weight: {error}") from None
    elif not hasattr(weight, "dtype") or jnp.dtype(weight.dtype) != jnp.int8:
        kind = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(
            f"{OP}: weight must be a Sparse24Weight or a dense int8 array, got {kind}; Sparse24Weight.from_dense "
            "makes one of an array with the pattern, flat_gemm multiplies with floating arrays."
        )
    axes = Axes(OP)
    if x.ndim < 1:
        axes.fail("x", "[..., K]", x.shape)
    leading = " ".join(f"B{i}" for i in range(x.ndim - 1))
    axes.bind("x", x.shape, f"{leading} K")
    axes.bind("weight", weight.shape, "K N")
    axes.check_not_empty()
    check_activation(OP, activation, axes["N"], "weight")
    integers = jnp.dtype(weight.dtype) == jnp.int8
    if integers:
        check_dtype(OP, "x", x.dtype, (*_FLOATING, "int8"))
    else:
        check_same_dtype(OP, {"x": x.dtype, "weight": weight.dtype})
    _check_scales(axes, scales, integers)
    if out_dtype is None and x.dtype == jnp.int8:
        raise TypeError(f'{OP}: x is int8, which the output is not: say out_dtype, such as "bfloat16".')
    out = jnp.dtype(out_dtype or x.dtype)
    check_dtype(OP, "out_dtype", out, _FLOATING)
    arguments = [
        Argument("x", x.dtype.name, (("M", math.prod(x.shape[:-1])), ("K", axes["K"]))),
        Argument("weight", jnp.dtype(weight.dtype).name, (("K", axes["K"]), ("N", axes["N"]))),
    ]
    if bias is not None:
        axes.bind("bias", bias.shape, "N")
        if bias.dtype != out:
            raise TypeError(f"{OP}: bias must have the output's dtype, {out.name}, got {bias.dtype}.")
        arguments.append(Argument("bias", bias.dtype.name, (("N", axes["N"]),)))
    bits = weight.bits if isinstance(weight, Sparse24Weight) else None
    options = {"activation": activation, "bits": bits, "sparse": sparse, "out_dtype": out.name}
    return Call(OP, tuple(arguments), tuple(options.items()))


def _check_scales(axes: Axes, scales: Any, integers: bool) -> None:
    if integers and scales is None:
        raise ValueError(f"{OP}: a weight of integers needs scales=(of x [], of the weight's outputs [N={axes['N']}]).")
    if not integers and scales is not None:
        raise ValueError(f"{OP}: scales are for weights of integers, and this one is floating: multiply them into it.")
    if scales is None:
        return
    if not isinstance(scales, tuple) or len(scales) != 2:
        raise TypeError(
            f"{OP}: scales must be a pair (of x [], of the weight's outputs [N]), got {type(scales).__name__}."
        )
    for name, scale, letters in zip(("scales[0]", "scales[1]"), scales, ("", "N"), strict=True):
        axes.bind(name, jnp.shape(scale), letters)
        check_dtype(OP, name, jnp.result_type(scale), ("float32",))


class _Inputs(NamedTuple):
    """Leading axes are folded: x [M, K]."""

    x: jax.Array
    weight: Sparse24Weight | jax.Array
    bias: jax.Array | None
    scales: tuple[jax.Array, jax.Array] | None


@dataclasses.dataclass(frozen=True)
class _Plan:
    choice: Choice
    config: Any
    backward: Choice
    out_dtype: jnp.dtype

    @property
    def activation(self) -> Any:
        return self.choice.call.option("activation")


def _config(choice: Choice, given: Any) -> Any:
    """The given config, if it is of the implementation that runs, else what the tuning tables or the heuristic say."""
    kinds = config_lib.kinds(choice.device, choice.name)
    if given is not None and not isinstance(given, kinds):
        takes = " or ".join(f"a {kind.__name__}" for kind in kinds) or "no config"
        raise ValueError(f'{OP}: implementation "{choice.name}" takes {takes}, got {given!r}.')
    return tuning.resolve(choice, kinds[0], config_lib.heuristic, given) if kinds else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(plan: _Plan, inputs: _Inputs) -> jax.Array:
    module = plan.choice.module
    out = module.forward(*inputs, activation=plan.activation, out_dtype=plan.out_dtype, config=plan.config)
    return vary_like(out, inputs)  # inside shard_map a kernel's outputs come without the axes they vary over


def _forward_rule(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, _Inputs]:
    return _multiply(plan, inputs), inputs


def _backward_rule(plan: _Plan, inputs: _Inputs, dout: jax.Array) -> tuple[_Inputs]:
    dx, dvalues, dbias = plan.backward.module.backward(*inputs, dout, activation=plan.activation)
    dx, dvalues, dbias = vary_like((dx, dvalues, dbias), inputs)
    nothing = jax.tree.map(_zero, inputs)
    dweight: Any = nothing.weight
    if dvalues is not None:
        dweight = dataclasses.replace(dweight, values=dvalues) if isinstance(dweight, Sparse24Weight) else dvalues
    return (_Inputs(nothing.x if dx is None else dx, dweight, dbias, vary_like(nothing.scales, inputs)),)


def _zero(x: jax.Array) -> Any:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros(x.shape, x.dtype) if floating else np.zeros(x.shape, jax.dtypes.float0)


_multiply.defvjp(_forward_rule, _backward_rule)
