# SPDX-License-Identifier: Apache-2.0
"""The kernels that are compiled for hardware that is not here. To add one, write its builder and its `Case`.

A builder gets a `targets.Compiling` and returns the jitted function and its abstract arguments. It imports the kernel
itself, because only the subprocess that compiles pays for it, and because an import may fail without its compiler.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

from tests.aot.targets import AMPERE, HOPPER, TPUS, Compiling


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one shape, for some targets.

    Attributes:
      name: unique; says the op, the implementation, and what is special about the shape.
      targets: names in `targets.TARGETS`.
      build: compiling -> (jitted function, arguments).
      hot: whether a register spill in a main loop, an innermost one with matrix products, is a failure.
      skip: target -> the reason why it is known not to compile there; counted, not hidden.
      timeout: seconds before the compiler counts as hung.
    """

    name: str
    targets: tuple[str, ...]
    build: Callable[[Compiling], tuple[Callable, tuple]]
    hot: bool = False
    skip: Mapping[str, str] = dataclasses.field(default_factory=dict)
    timeout: int = 300


def _smoke_hopper(compiling: Compiling):
    import jax
    import jax.numpy as jnp

    from tests.aot.smoke import mosaic_gpu_sm90

    x = compiling.array((512, 512), jnp.bfloat16)
    return jax.jit(mosaic_gpu_sm90.matmul), (x, x)


def _smoke_ampere(compiling: Compiling):
    import jax
    import jax.numpy as jnp

    from tests.aot.smoke import mosaic_gpu_sm80

    x = compiling.array((512, 512), jnp.bfloat16)
    return jax.jit(mosaic_gpu_sm80.matmul), (x, x)


def _smoke_tpu(compiling: Compiling):
    import jax
    import jax.numpy as jnp

    from tests.aot.smoke import mosaic_tpu

    x = compiling.array((512, 512), jnp.bfloat16)
    return jax.jit(mosaic_tpu.matmul), (x, x)


def _arrays_of(arguments: dict, compiling: Compiling):
    """The arrays among a call's arguments, masks and all, and what puts others in their place."""
    import jax

    from pallas_kernels.core.arrays import is_array

    leaves, tree = jax.tree.flatten(arguments)
    has_shape = [is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
    arrays = tuple(compiling.array(x.shape, x.dtype) for x, yes in zip(leaves, has_shape, strict=True) if yes)

    def fill(arrays):
        given = iter(arrays)
        return tree.unflatten([next(given) if yes else leaf for leaf, yes in zip(leaves, has_shape, strict=True)])

    return arrays, fill


def _flash_attention(implementation: str, shape: str, direction: str, dtype: str, compiling: Compiling, config=None):
    """A named shape, its mask's arrays among the arguments; "backward" is all of `grad`, the forward pass too."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import flash_attention
    from pallas_kernels.flash_attention.shapes import SHAPES, Shape, causal

    shapes = SHAPES | {"causal_256k": Shape(1, 2**18, 2**18, 1, 1, 128, extras=causal)}
    arguments, fill = _arrays_of(shapes[shape].abstract(dtype), compiling)

    def forward(*arrays):
        return flash_attention(**fill(arrays), return_lse=True, implementation=implementation, config=config)

    def backward(*arrays):
        def loss(floats):
            given = iter(floats)
            out, lse = forward(*[next(given) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays])
            return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse)

        return jax.grad(loss)([x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)])

    return jax.jit(forward if direction == "forward" else backward), tuple(arguments)


def _decode_attention(implementation: str, shape: str, dtype: str, compiling: Compiling):
    """A named shape, its arrays all arguments: lengths and pages are known to the device alone."""
    import jax

    from pallas_kernels import decode_attention
    from pallas_kernels.decode_attention.shapes import SHAPES

    arrays, fill = _arrays_of(SHAPES[shape].abstract(dtype), compiling)
    return jax.jit(lambda *arrays: decode_attention(**fill(arrays), implementation=implementation)), arrays


_DECODE = {
    **dict.fromkeys(
        ("paged_window_sink", "batch_1_2k", "batch_64_8k", "batch_8_8k_page_16", "drafted_4_8k", "asynchronous_8k"),
        AMPERE + HOPPER,
    ),
    # Widened on the way; float8 where there is an instruction for it.
    **dict.fromkeys(("batch_8_8k_int8", "batch_64_8k_page_16_int8"), AMPERE + HOPPER),
    **dict.fromkeys(("batch_8_8k_fp8", "batch_64_8k_page_16_fp8", "fp8_160"), HOPPER),
}

# What takes a path of its own on a TPU: one block a chunk, pages put together, an odd number of heads, many queries,
# windows and sinks, asynchronous softmax with its second pass, splits, quantized caches.
_DECODE_TPU = {
    "batch_8_8k": "bfloat16",
    "batch_64_8k_page_16": "bfloat16",
    "mha_300": "float32",
    "drafted_5": "bfloat16",
    "drafted_4_8k": "bfloat16",
    "paged_window_sink": "float32",
    "asynchronous_8k": "bfloat16",
    "splits_190": "bfloat16",
    "int8_160": "bfloat16",
    "fp8_160": "bfloat16",
}


# Routes A and B, a long weight that two blocks share, weights [K, N], and on Hopper normalized rows and most rows.
_GEMM_GPU = {
    "llama2_7b_qkv_m1": True,
    "llama2_7b_qkv_m8": True,
    "llama2_7b_down_m8": True,
    "llama2_7b_qkv_m64": True,
    "columns_128": True,
    "normalized_8": False,
    "normalized_swiglu_2": False,
    "llama2_7b_out_m256": False,
}


# Planes of digits whose inputs splits share, many rows, zeros taken out of each weight, a gate; codes of 4 and 8 bits.
_QUANTIZED_GPU = (
    "llama2_7b_out_mixed_2_4_m1",
    "llama2_7b_gate_up_mixed_2_4_m8",
    "llama2_7b_gate_up_mixed_2_4_m16",
    "llama2_70b_qkv_mixed_2_4_m64",
    "digits_swiglu_8",
    "llama2_7b_down_int4_m8",
    "llama2_7b_gate_up_int4_m64",
    "llama2_7b_out_int8_m8",
)


# What takes a path of its own on a TPU: one row, the most on-chip memory, groups of 8, 4, 2 and 1 chunks, fewer outputs
# than a tile, no tail, scales of groups and of outputs, each epilogue, both dtypes.
_QUANTIZED_TPU = {
    "llama2_7b_qkv_mixed_2_4_m1": "bfloat16",
    "llama2_7b_down_mixed_2_4_m16": "bfloat16",
    "most_rows": "bfloat16",
    "digits_swiglu_8": "float32",
    "two_bits_3": "bfloat16",
    "llama2_7b_down_int4_m8": "bfloat16",
    "int4_3": "float32",
    "llama2_7b_out_int8_m8": "bfloat16",
    "int8_2": "bfloat16",
}


def _quantized_matmul(implementation: str, shape: str, dtype: str, compiling: Compiling, **options):
    """`options`: of a MosaicGpuConfig; without any the usual one."""
    import jax

    from pallas_kernels import quantized_matmul
    from pallas_kernels.quantized_matmul.config import MosaicGpuConfig
    from pallas_kernels.quantized_matmul.shapes import SHAPES, Shape

    shapes = SHAPES | {"most_rows": Shape(256, 8192, 28672)}
    arrays, fill = _arrays_of(shapes[shape].abstract(dtype), compiling)
    config = MosaicGpuConfig(**options) if options else None

    def call(*arrays):
        return quantized_matmul(**fill(arrays), implementation=implementation, config=config)

    return jax.jit(call), arrays


# Many rows and few, each type, an epilogue.
_SPARSE_AMPERE = ("llama2_70b_down_m256", "llama2_7b_gate_up_m64", "llama2_7b_down_m1", "gelu_int8")
_SPARSE_GPU = {
    "square_8192": "bfloat16",
    "silu_70": "bfloat16",  # nothing is a multiple of anything
    "llama2_70b_down_m256": "bfloat16",
    "int8_dense_square_8192": "bfloat16",
    "llama2_7b_gate_up_m64": "float16",
    "llama2_7b_down_m1": "bfloat16",
    "int8_llama2_7b_gate_up_m4096": "bfloat16",
    "gelu_int8": "bfloat16",
}


def _sparse_matmul(shape: str, dtype: str, compiling: Compiling):
    import jax

    from pallas_kernels import sparse_matmul
    from pallas_kernels.sparse_matmul.shapes import SHAPES, Shape

    shapes = SHAPES | {"gelu_int8": Shape(197, 3072, 768, "int8", activation="gelu_exact", bias=True)}
    arrays, fill = _arrays_of(shapes[shape].abstract(dtype), compiling)
    return jax.jit(lambda *arrays: sparse_matmul(**fill(arrays), implementation="mosaic_gpu")), arrays


def _log_bessel(implementation: str, function: str, dtype: str, compiling: Compiling):
    """A logarithm, or with "_gradient" that and its derivative by x: the ratio in the same kernel."""
    import jax

    import pallas_kernels

    jax.config.update("jax_enable_x64", dtype == "float64")
    name, gradient = function.removesuffix("_gradient"), function.endswith("_gradient")
    call = functools.partial(getattr(pallas_kernels, name), implementation=implementation)
    x = compiling.array((1000, 1000), dtype)
    return jax.jit((lambda v, x: jax.jvp(lambda x: call(v, x), (x,), (x,))) if gradient else call), (x, x)


def _flat_gemm(implementation: str, shape: str, dtype: str, compiling: Compiling):
    import jax

    from pallas_kernels import flat_gemm
    from pallas_kernels.flat_gemm.shapes import SHAPES, Shape

    shapes = SHAPES | {
        "swiglu_22016": Shape(8, 22016, 4096, activation="swiglu", extras=("bias", "residual")),
        "gelu_exact_3072": Shape(197, 3072, 768, activation="gelu_exact", extras=("bias",)),
    }
    arrays, fill = _arrays_of(shapes[shape].abstract(dtype), compiling)
    return jax.jit(lambda *arrays: flat_gemm(**fill(arrays), implementation=implementation)), arrays


# What takes a path of its own on a TPU: one row, many steps of K, all rows of a long K, both orientations, an odd size
# in one step, each epilogue, two blocks a step.
_GEMM_TPU = {
    "llama2_7b_qkv_m1": "bfloat16",
    "llama2_7b_down_m16": "bfloat16",
    "llama2_7b_out_m8": "float32",
    "llama2_70b_down_m256": "bfloat16",
    "columns_17": "bfloat16",
    "silu_5": "bfloat16",
    "odd_3": "float32",
    "leading_2_3": "bfloat16",
    "swiglu_columns_8": "float32",
    "swiglu_22016": "bfloat16",
    "gelu_exact_3072": "bfloat16",
}


def _flash_attention_tpu_window(compiling: Compiling):
    from pallas_kernels.flash_attention.config import mosaic_tpu_block

    config = mosaic_tpu_block(256, 512, mask="window")
    return _flash_attention("mosaic_tpu", "d128_causal_2k", "backward", "bfloat16", compiling, config)


def _flash_attention_tpu_sharded(compiling: Compiling):
    """Batch and heads over four devices, with shard_map's check of types."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from pallas_kernels import flash_attention, masks

    mesh, spec = compiling.mesh((2, 2), ("data", "model")), P("data", None, "model", None)
    x = jax.ShapeDtypeStruct((4, 1024, 4, 64), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=NamedSharding(mesh, P("data")))

    def attend(q, k, v, lengths):
        mask = masks.Causal() & masks.Lengths(lengths)
        return flash_attention(q, k, v, mask=mask, implementation="mosaic_tpu")

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(spec, spec, spec, P("data")), out_specs=spec)
    return jax.jit(jax.grad(lambda *a: jnp.sum(sharded(*a).astype(jnp.float32)), (0, 1, 2))), (x, x, x, lengths)


# What takes a path of its own through the TPU kernels: heads of 128, grouped heads of 64, a schedule made on the device
# with values along rows and columns, bias and sink, tiles of a bias and of a dense mask, one query row, much of it.
_TPU_SHAPES = {
    "d128_causal_2k": ("backward", "bfloat16"),
    "llama_1b_train_2k": ("backward", "bfloat16"),
    "packed_16k": ("backward", "bfloat16"),
    "everything_90_150": ("backward", "bfloat16"),
    "full_bias_60_75": ("backward", "float32"),
    "per_head_dense_77_91": ("backward", "float32"),
    "decode_1_8191": ("forward", "bfloat16"),
    "causal_256k": ("forward", "bfloat16"),
}


def _flash_attention_sm80(direction: str, tiles: dict, sizes: tuple[int, ...], mask: str, compiling: Compiling):
    """sm80.py itself, on its own target and on Hopper, where dispatch would take sm90.py. Sizes are T, S, N, K, H."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import masks
    from pallas_kernels.flash_attention.config import Sm80Config
    from pallas_kernels.flash_attention.mosaic_gpu import sm80

    T, S, N, K, H = sizes
    options = {"scale": H**-0.5, "soft_cap": None, "config": Sm80Config(**tiles)}
    query, key = (compiling.array((2, rows, heads, H), jnp.bfloat16) for rows, heads in ((T, N), (S, K)))
    lse = compiling.array((2, N, T), jnp.float32)
    ids = compiling.array((2, T), jnp.int32)
    bias = compiling.array((N, T, S), jnp.bfloat16) if mask == "bias" else None

    def make(ids):
        packed = masks.Causal() & masks.Segments(ids, ids)
        return {"none": None, "causal": masks.Causal(), "packed": packed, "bias": None}[mask]

    def forward(query, key, value, bias, ids):
        return sm80.forward(query, key, value, bias, None, make(ids), **options)

    def backward(query, key, value, bias, ids, out, lse, dout, dlse):
        return sm80.backward(query, key, value, bias, None, make(ids), out, lse, dout, dlse, **options)

    if direction == "forward":
        return jax.jit(forward), (query, key, key, bias, ids)
    return jax.jit(backward), (query, key, key, bias, ids, query, lse, query, lse)


# name -> direction, tiles of Sm80Config, (T, S, N, K, H), mask or bias
_SM80 = {
    "forward_d64": ("forward", {}, (1024, 1024, 8, 8, 64), "none"),
    "forward_d128_causal_gqa": ("forward", {"block_k": 32}, (1024, 1024, 8, 2, 128), "causal"),
    "forward_d128_ragged": ("forward", {"block_q": 64, "block_k": 32}, (1000, 1011, 8, 8, 128), "causal"),
    "forward_packed": ("forward", {"block_q": 64}, (1024, 1024, 8, 8, 64), "packed"),
    "forward_d256": ("forward", {"block_q": 64, "block_k": 32}, (1024, 1024, 4, 4, 256), "causal"),
    "backward_d128_causal_gqa": (
        "backward",
        {"dkv_block_q": 32, "dkv_stages": 1, "dq_block_k": 32},
        (1024, 1024, 8, 2, 128),
        "causal",
    ),
    "backward_packed": ("backward", {"dkv_block_q": 32, "dq_block_k": 32}, (1000, 1000, 8, 8, 64), "packed"),
    "backward_bias": ("backward", {"dkv_block_q": 32, "dq_block_k": 32}, (1000, 1000, 8, 8, 64), "bias"),
}

# What takes a path of its own through the Hopper kernel, and whether its main loop must be free of spills: two
# consumers with and without a mask, grouped heads, three consumers, wide and unequal heads, short queries whose heads
# share tiles, arrays in the mask, bias; two launches of an asynchronous softmax.
_SM90_SHAPES = {
    "d128_full_2k": True,
    "d128_causal_2k": True,
    "gqa_32_8_2k": True,
    "d64_full_2k": True,
    "d64_causal_8k": True,
    "head_dims_192_128": True,
    "short_16_8k": True,
    "packed_16k": True,
    "everything_90_150": True,
    "full_bias_60_75": True,
    "asynchronous_d128_full_2k": True,
    "asynchronous_d128_causal_2k": True,
    "asynchronous_d64_full_2k": True,
    "asynchronous_d64_causal_8k": True,
    "asynchronous_140_150": True,
}

# Forward and backward together. Where it is False a masking loop spills: 64-wide heads with a mask, much in the mask.
_SM90_BACKWARD_SHAPES = {
    "d128_full_2k": True,
    "d128_causal_2k": True,
    "gqa_32_8_2k": True,
    "packed_16k": True,
    "d64_full_2k": True,
    "d64_causal_8k": True,
    "mqa_packed_300": False,
    "full_bias_60_75": False,
}

CASES: tuple[Case, ...] = (
    Case("smoke/mosaic_gpu_sm90", HOPPER, _smoke_hopper, hot=True),
    Case("smoke/mosaic_gpu_sm80", AMPERE, _smoke_ampere, hot=True),
    Case("smoke/mosaic_tpu", TPUS, _smoke_tpu),
    *(
        Case(
            f"flash_attention/sm90/{shape}",
            HOPPER,
            functools.partial(_flash_attention, "mosaic_gpu", shape, "forward", "bfloat16"),
            hot=hot,
        )
        for shape, hot in _SM90_SHAPES.items()
    ),
    *(
        Case(
            f"flash_attention/sm90_backward/{shape}",
            HOPPER,
            functools.partial(_flash_attention, "mosaic_gpu", shape, "backward", "bfloat16"),
            hot=hot,
        )
        for shape, hot in _SM90_BACKWARD_SHAPES.items()
    ),
    *(
        Case(f"flash_attention/sm80/{name}", AMPERE + HOPPER, functools.partial(_flash_attention_sm80, *case), hot=True)
        for name, case in _SM80.items()
    ),
    *(
        Case(
            f"decode_attention/{name}",
            targets,
            functools.partial(_decode_attention, "mosaic_gpu", name, "bfloat16"),
            hot=True,
        )
        for name, targets in _DECODE.items()
    ),
    *(
        Case(
            f"decode_attention/mosaic_tpu/{shape}",
            TPUS,
            functools.partial(_decode_attention, "mosaic_tpu", shape, dtype),
        )
        for shape, dtype in _DECODE_TPU.items()
    ),
    *(
        Case(
            f"flat_gemm/mosaic_gpu/{shape}",
            AMPERE + HOPPER if everywhere else HOPPER,
            functools.partial(_flat_gemm, "mosaic_gpu", shape, "bfloat16"),
            hot=True,
        )
        for shape, everywhere in _GEMM_GPU.items()
    ),
    *(
        Case(
            f"quantized_matmul/mosaic_gpu/{shape}",
            AMPERE + HOPPER,
            functools.partial(_quantized_matmul, "mosaic_gpu", shape, "bfloat16"),
            hot=True,
        )
        for shape in _QUANTIZED_GPU
    ),
    *(
        Case(
            f"sparse_matmul/mosaic_gpu/{shape}",
            HOPPER + (AMPERE if shape in _SPARSE_AMPERE else ()),
            functools.partial(_sparse_matmul, shape, dtype),
            hot=True,
        )
        for shape, dtype in _SPARSE_GPU.items()
    ),
    Case(
        "quantized_matmul/mosaic_gpu/scales_ahead",
        AMPERE + HOPPER,
        functools.partial(_quantized_matmul, "mosaic_gpu", "llama2_7b_qkv_mixed_2_4_m8", "bfloat16", scales_ahead=True),
        hot=True,
    ),
    *(
        Case(
            f"log_bessel/mosaic_gpu/{function}_{dtype}",
            AMPERE + HOPPER,
            functools.partial(_log_bessel, "mosaic_gpu", function, dtype),
        )
        for function, dtype in (
            ("log_iv", "float64"),
            ("log_kv", "float64"),
            ("log_kv", "float32"),
            ("log_kv_gradient", "float64"),
            ("log_iv_gradient", "float32"),
        )
    ),
    *(
        Case(
            f"log_bessel/mosaic_tpu/{function}", TPUS, functools.partial(_log_bessel, "mosaic_tpu", function, "float32")
        )
        for function in ("log_iv", "log_kv", "log_kv_gradient")
    ),
    *(
        Case(
            f"quantized_matmul/mosaic_tpu/{shape}",
            TPUS,
            functools.partial(_quantized_matmul, "mosaic_tpu", shape, dtype),
        )
        for shape, dtype in _QUANTIZED_TPU.items()
    ),
    *(
        Case(f"flat_gemm/mosaic_tpu/{shape}", TPUS, functools.partial(_flat_gemm, "mosaic_tpu", shape, dtype))
        for shape, dtype in _GEMM_TPU.items()
    ),
    Case("flash_attention/mosaic_tpu/window_of_the_m_mask", TPUS, _flash_attention_tpu_window),
    Case("flash_attention/mosaic_tpu/shard_map", TPUS, _flash_attention_tpu_sharded),
    *(
        Case(
            f"flash_attention/mosaic_tpu/{shape}_{direction}",
            TPUS,
            functools.partial(_flash_attention, "mosaic_tpu", shape, direction, dtype),
        )
        for shape, (direction, dtype) in _TPU_SHAPES.items()
    ),
)


def find(name: str) -> Case:
    """The case of that name."""
    return {case.name: case for case in CASES}[name]
