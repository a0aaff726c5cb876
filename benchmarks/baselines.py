# SPDX-License-Identifier: Apache-2.0
"""What the suite is measured against: the best that others offer for the same call, in the same process.

A baseline gets the arguments of a call and its direction ("forward" or "forward_backward") and returns the ways to
run it, of which the fastest counts, or raises `Unavailable` with the reason why it cannot. Libraries are imported
when they are asked for: what is not installed is unavailable, not an error.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.operations import Arguments, cotangent_like
from pallas_kernels import masks
from pallas_kernels.core import device
from pallas_kernels.masks.base import And
from pallas_kernels.quantized_matmul.weights import IntWeight
from pallas_kernels.sparse_matmul import reference as sparse_matmul_reference


@dataclasses.dataclass(frozen=True)
class External:
    """A way to run a call that JAX does not run.

    Attributes:
      outputs: runs it once; the outputs of `operations.directed`, as JAX arrays.
      measure: times it, given the seconds to spend.
    """

    outputs: Callable[[], Any]
    measure: Callable[[float], timing.Timing]


# A function and the arguments it wants: those of the call, unless the baseline expects them prepared.
Candidate = tuple[Callable[[Arguments], jax.Array], Arguments] | External
Baseline = Callable[[Arguments, str], list[Candidate]]


class Unavailable(Exception):
    """A baseline cannot run this call, or is not installed."""


def _only(arguments: Arguments, *names: str) -> None:
    """Refuses a call that sets anything else than query, key, value and `names`."""
    others = set(arguments) - {"query", "key", "value", *names}
    if extra := sorted(name for name in others if arguments[name] is not None):
        raise Unavailable(f"takes no {', '.join(extra)}")


def _only_half(arguments: Arguments) -> None:
    """Refuses what is neither bfloat16 nor float16."""
    if (dtype := arguments["query"].dtype) not in (jnp.bfloat16, jnp.float16):
        raise Unavailable(f"takes no {dtype}")


def _only_one_head_dim(arguments: Arguments, largest: int | None = None) -> None:
    """Refuses head dimensions that differ or are too large."""
    found = {arguments["query"].shape[-1], arguments["value"].shape[-1]}
    if len(found) > 1:
        raise Unavailable(f"needs one head dimension, not {' and '.join(map(str, sorted(found)))}")
    if largest is not None and max(found) > largest:
        raise Unavailable(f"needs a head dimension of at most {largest}, not {max(found)}")


def _is_plain(mask: Any, kind: type) -> bool:
    """Whether it is a Causal or a Window whose positions are the default."""
    return isinstance(mask, kind) and mask.query_positions is None and mask.key_positions is None


def _parts(mask: Any) -> list[Any]:
    """The masks that `&` joins."""
    return [*_parts(mask.left), *_parts(mask.right)] if isinstance(mask, And) else [mask]


@dataclasses.dataclass(frozen=True)
class _Band:
    """A mask in the words of other libraries: how far left and right of the diagonal a query sees (None: all), and
    Segments if there are any."""

    left: int | None = None
    right: int | None = None
    segments: masks.Segments | None = None


def _band(mask: Any) -> _Band | None:
    """What a conjunction of Causal, Window and one Segments comes to; None for all others."""
    if mask is None:
        return _Band()
    lefts, rights, segments = [], [], None
    for part in _parts(mask):
        if _is_plain(part, masks.Causal):
            rights.append(0)
        elif _is_plain(part, masks.Window):
            lefts += [] if part.left is None else [part.left]
            rights += [] if part.right is None else [part.right]
        elif isinstance(part, masks.Segments) and segments is None:
            segments = part
        else:
            return None
    return _Band(min(lefts, default=None), min(rights, default=None), segments)


def _flags(arguments: Arguments) -> dict[str, Any] | None:
    """A mask in the flags of jax.nn.dot_product_attention; None where they cannot say it.

    Its causal mask and window are aligned top-left, so they mean the same only where T = S.
    """
    band = _band(arguments.get("mask"))
    if band == _Band():
        return {}
    square = arguments["query"].shape[1] == arguments["key"].shape[1]
    if band is None or band.segments is not None or not square:
        return None
    if band.left is None:
        return {"is_causal": True} if band.right == 0 else None
    if band.right is None:
        return None
    return {"local_window_size": (band.left, band.right), **({"is_causal": True} if band.right == 0 else {})}


def _dense(arguments: Arguments) -> dict[str, jax.Array]:
    """A mask as the array that it stands for, made before the call; nothing if there is none."""
    mask = arguments.get("mask")
    return {} if mask is None else {"mask": mask.as_array(arguments["query"].shape[1], arguments["key"].shape[1])}


def _attend_by(
    function: Callable[..., jax.Array], arguments: Arguments, flags: dict[str, Any] | None, **options: Any
) -> Candidate:
    """A candidate of the signature of jax.nn.dot_product_attention, with flags for a mask where there are some."""
    prepared = {name: value for name, value in arguments.items() if name != "mask"}
    if flags is None:
        prepared.update(_dense(arguments))

    def attend(arguments: Arguments) -> jax.Array:
        given = {name: value for name, value in arguments.items() if value is not None}
        query, key, value = (given.pop(name) for name in ("query", "key", "value"))
        return function(query, key, value, **given, **(flags or {}), **options)

    return attend, prepared


def jax_xla(arguments: Arguments, direction: str) -> list[Candidate]:
    """jax.nn.dot_product_attention by XLA: the whole plane of logits in memory."""
    _only(arguments, "mask", "bias", "scale")
    _only_one_head_dim(arguments)
    return [_attend_by(jax.nn.dot_product_attention, arguments, _flags(arguments), implementation="xla")]


def cudnn(arguments: Arguments, direction: str) -> list[Candidate]:
    """jax.nn.dot_product_attention by cuDNN, which skips what its own causal mask and window hide."""
    _only_cudnn(arguments, "mask", "bias", "scale")
    flags = _flags(arguments)
    if flags is None:
        raise Unavailable("has no flag for this mask; cudnn_masked takes it as an array")
    if flags.get("local_window_size", (0, 0))[1] != 0:
        raise Unavailable("its window has no right side")
    return [_attend_by(jax.nn.dot_product_attention, arguments, flags, implementation="cudnn")]


def cudnn_masked(arguments: Arguments, direction: str) -> list[Candidate]:
    """The same with the mask as a dense array, which it takes for any mask and adds to the logits."""
    _only_cudnn(arguments, "mask", "bias", "scale")
    if arguments.get("mask") is None:
        raise Unavailable("the call has no mask")
    candidates = [_attend_by(jax.nn.dot_product_attention, arguments, None, implementation="cudnn")]
    if direction == "forward" and arguments.get("bias") is None:
        # What it makes of a mask, made beforehand. With the backward pass it would want a gradient of that.
        visible = _dense(arguments)["mask"]
        bias = jnp.where(visible, 0, jnp.finfo(jnp.float16).min).astype(arguments["query"].dtype)
        biased = {**arguments, "mask": None, "bias": bias}
        candidates.append(_attend_by(jax.nn.dot_product_attention, biased, {}, implementation="cudnn"))
    return candidates


def _only_cudnn(arguments: Arguments, *names: str) -> None:
    _only(arguments, *names)
    if device.current().platform != "gpu":
        raise Unavailable("cuDNN needs an NVIDIA GPU")
    _only_half(arguments)
    _only_one_head_dim(arguments, 256)


def cudnn_decode(arguments: Arguments, direction: str) -> list[Candidate]:
    """jax.nn.dot_product_attention by cuDNN with the lengths of dense caches."""
    _only_cudnn(arguments, "lengths", "scale")
    if arguments["query"].ndim != 3:
        raise Unavailable("masks drafted tokens as if they came first")

    def attend(arguments: Arguments) -> jax.Array:
        query, key, value, lengths = (arguments[name] for name in ("query", "key", "value", "lengths"))
        one = jnp.ones_like(lengths)
        return jax.nn.dot_product_attention(
            *(query[:, None], key, value),
            scale=arguments.get("scale"),
            query_seq_lengths=one,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )[:, 0]

    return [(attend, arguments)]


def cublas(arguments: Arguments, direction: str) -> list[Candidate]:
    """jnp.dot, as one would write it. XLA times cuBLAS beside kernels of its own when it compiles, and takes the
    faster."""
    if extra := [name for name in ("bias", "residual", "activation") if arguments.get(name) is not None]:
        raise Unavailable(f"multiplies, and takes no {', '.join(extra)}")

    def dot(arguments: Arguments) -> jax.Array:
        x, w = arguments["x"], arguments["w"]
        return jnp.dot(x, w.T if arguments["transpose_w"] else w)

    return [(dot, arguments)]


def jax_mosaic_gpu(arguments: Arguments, direction: str) -> list[Candidate]:
    """JAX's own FlashAttention-3 for Hopper: jax.experimental.pallas.ops.gpu.attention_mgpu."""
    _only(arguments, "mask")
    if direction != "forward":
        raise Unavailable("has no causal backward pass")
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    if device.current().arch != "sm90":
        raise Unavailable("needs a Hopper GPU")
    if query.dtype != jnp.float16:
        raise Unavailable(f"computes in float16, not {query.dtype}")
    mask = arguments.get("mask")
    if mask is not None and not _is_plain(mask, masks.Causal):
        raise Unavailable("masks causally or not at all")
    # Two warpgroups of 64 rows each take turns; all lengths are whole tiles of 128 and 256.
    if key.shape != value.shape or query.shape[1] != key.shape[1] or key.shape[1] % 256 or query.shape[-1] % 64:
        raise Unavailable("needs T = S in multiples of 256, H = Hv in multiples of 64")
    with _importing():
        from jax.experimental.pallas.ops.gpu import attention_mgpu

    def attend(arguments: Arguments, block_kv: int) -> jax.Array:
        config = attention_mgpu.TuningConfig(
            block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=mask is not None
        )
        return attention_mgpu.attention(arguments["query"], arguments["key"], arguments["value"], config)

    # It does not scale the logits; done beforehand, so that it costs this baseline nothing.
    scaled = {**arguments, "query": (query * query.shape[-1] ** -0.5).astype(query.dtype)}
    return [(functools.partial(attend, block_kv=block_kv), scaled) for block_kv in (256, 128, 64)]


def fa3(arguments: Arguments, direction: str) -> list[Candidate]:
    """FlashAttention-3's own CUDA kernels through dew_flash_attn (PyPI dew-flash-attn-cu13).

    Packed documents go to its entry for sequences of varying length; their offsets are made before the call.
    """
    _only(arguments, "mask", "scale", "sink")
    _only_half(arguments)
    _only_one_head_dim(arguments, 256)
    if device.current().arch != "sm90":
        raise Unavailable("needs a Hopper GPU")
    band = _band(arguments.get("mask"))
    if band is None:
        raise Unavailable(f"has no flag for the mask {arguments['mask']}")
    offsets = None if band.segments is None else document_offsets(band.segments, *arguments["query"].shape[:2])
    with _importing():
        import dew_flash_attn as library  # type: ignore[import-not-found]

    # Causal and windows are aligned bottom-right here too; -1 leaves a side open.
    causal = band.left is None and band.right == 0
    window = (-1, -1) if causal else tuple(-1 if side is None else side for side in (band.left, band.right))
    options = {"is_causal": causal, "window_size": window}
    prepared = {name: value for name, value in arguments.items() if name != "mask"}
    if offsets is None:

        def attend(arguments: Arguments) -> jax.Array:
            query, key, value = (arguments[name] for name in ("query", "key", "value"))
            return library.flash_mha(query, key, value, arguments.get("scale"), sinks=arguments.get("sink"), **options)

        return [(attend, prepared)]
    longest = int(np.diff(offsets).max())

    def attend_packed(arguments: Arguments) -> jax.Array:
        # Rows of the batch one after another: a view, [B T, N, H].
        query, key, value = (
            arguments[name].reshape(-1, *arguments[name].shape[2:]) for name in ("query", "key", "value")
        )
        out = library.flash_mha_varlen(
            query,
            key,
            value,
            arguments["offsets"],
            longest,
            arguments.get("scale"),
            sinks=arguments.get("sink"),
            **options,
        )
        return out.reshape(arguments["query"].shape)

    return [(attend_packed, {**prepared, "offsets": jnp.asarray(offsets)})]


def document_offsets(segments: masks.Segments, B: int, T: int) -> np.ndarray:
    """Where the documents of packed rows begin, and where the last one ends: int32, rows one after another.

    >>> ids = np.asarray([[0, 0, 0, 1, 1], [4, 4, 5, 5, 5]])
    >>> document_offsets(masks.Segments(ids, ids), 2, 5)
    array([ 0,  3,  5,  7, 10], dtype=int32)

    Raises:
      Unavailable: keys lie in other documents than queries, or a document in several pieces.
    """
    query_ids, key_ids = np.asarray(segments.query_ids), np.asarray(segments.key_ids)
    if not np.array_equal(query_ids, key_ids):
        raise Unavailable("needs the same documents for queries and keys")
    ids = np.broadcast_to(query_ids, (B, T))
    if np.any(np.diff(ids, axis=1) < 0):
        raise Unavailable("needs documents in ascending order")
    begins = np.ones((B, T), bool)
    begins[:, 1:] = np.diff(ids, axis=1) != 0
    return np.append(np.flatnonzero(begins), B * T).astype(np.int32)


def tokamax(arguments: Arguments, direction: str) -> list[Candidate]:
    """tokamax.dot_product_attention by its Mosaic GPU kernels. A window or causal mask it skips by, as cuDNN."""
    _only(arguments, "mask", "bias", "scale", "soft_cap")
    if device.current().platform != "gpu":
        raise Unavailable("its Mosaic GPU kernels need an NVIDIA GPU")
    with _importing():
        import tokamax as library  # type: ignore[import-not-found]

    def attend(*arrays: jax.Array, soft_cap: float | None = None, **options: Any) -> jax.Array:
        try:
            # Named, for left to itself it would quietly fall back to Triton and XLA.
            return library.dot_product_attention(*arrays, logits_soft_cap=soft_cap, implementation="mosaic", **options)
        except NotImplementedError as error:
            raise Unavailable(f"mosaic: {error}") from error

    return [_attend_by(attend, arguments, _flags(arguments))]


def torch_flash(arguments: Arguments, direction: str) -> list[Candidate]:
    """FlashAttention-2 through torch.nn.functional.scaled_dot_product_attention, on the same arrays."""
    _only(arguments, "mask", "scale")
    _only_half(arguments)
    _only_one_head_dim(arguments, 256)
    flags = _flags(arguments)
    if flags not in ({}, {"is_causal": True}):
        raise Unavailable("masks causally with T = S, or not at all")
    borrowed = _borrowing("FlashAttention-2")
    import torch  # type: ignore[import-not-found]
    from torch.nn import attention, functional  # type: ignore[import-not-found]

    query, key, value = inputs = [borrowed(arguments[name]) for name in ("query", "key", "value")]
    options = {"scale": arguments.get("scale"), "enable_gqa": query.shape[2] != key.shape[2], **flags}
    both = direction == "forward_backward"
    shape = (*query.shape[:-1], value.shape[-1])
    cotangent = borrowed(cotangent_like(shape).astype(arguments["query"].dtype)) if both else None
    for array in inputs:
        array.requires_grad_(both)

    def run() -> list[Any]:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            # It takes [B, N, T, H], of any strides.
            heads_first = (array.transpose(1, 2) for array in (query, key, value))
            out = functional.scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)
        return [out, *(torch.autograd.grad(out, inputs, cotangent) if both else [])]

    def outputs() -> list[jax.Array]:
        arrays = [array.detach().contiguous() for array in run()]
        torch.cuda.synchronize()
        return [jnp.from_dlpack(array) for array in arrays]

    return [External(outputs, lambda budget: timing.measure_torch(run, budget=budget))]


def _decoded(arguments: Arguments) -> Arguments:
    """A call of quantized_matmul or sparse_matmul as one of matrices: x and a weight [K, N] in x's dtype."""
    if extra := [name for name in ("bias", "activation", "scales") if arguments.get(name) is not None]:
        raise Unavailable(f"multiplies, and takes no {', '.join(extra)}")
    return {"x": arguments["x"], "w": arguments["weight"].dequantize().astype(arguments["x"].dtype)}


def cublas_decoded(arguments: Arguments, direction: str) -> list[Candidate]:
    """jnp.dot with the weight in x's dtype, decoded beforehand: what quantizing is to be faster than."""
    return [(lambda given: jnp.dot(given["x"], given["w"]), _decoded(arguments))]


def _packed_by_torch(arguments: Arguments, name: str) -> tuple[Any, Any, Any, IntWeight]:
    """What libraries for PyTorch want of a call: x, codes uint8 [N, K], scales [N, groups], and the weight itself."""
    weight = arguments["weight"]
    _decoded(arguments)
    if not isinstance(weight, IntWeight) or weight.bits != 4 or weight.group_size != 128:
        raise Unavailable(f"{name} is measured on int4 with groups of 128")
    borrowed = _borrowing(name)
    N = weight.shape[1]
    codes = (weight.integers() + 8).astype(jnp.uint8)[:N]
    return borrowed(arguments["x"]), borrowed(codes), borrowed(weight.scale[:, :N].T + 0), weight


def _rotated(run: Callable[[int], Any], nbytes: int) -> External:
    """A product of PyTorch by copy i of its weights, of so many bytes each."""
    import torch  # type: ignore[import-not-found]

    def outputs() -> list[jax.Array]:
        out = run(0).contiguous()
        torch.cuda.synchronize()
        return [jnp.from_dlpack(out)]

    return External(outputs, lambda budget: timing.measure_kernels(run, copies=timing.copies(nbytes), budget=budget))


def humming(arguments: Arguments, direction: str) -> list[Candidate]:
    """humming's kernels (PyPI humming-kernels), on the same codes and scales, with the tiles it chooses."""
    x, codes, scales, weight = _packed_by_torch(arguments, "humming")
    with _importing():
        import torch  # type: ignore[import-not-found]
        from humming.layer import HummingLayer  # type: ignore[import-not-found]

    K, N = weight.shape
    fields = codes.reshape(N, K // 8, 8).to(torch.int64) << (4 * torch.arange(8, device="cuda"))
    words = fields.sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    def layer() -> Any:
        made = HummingLayer(
            shape_n=N, shape_k=K, weight_config={"dtype": "uint4", "group_size": 128}, torch_dtype=torch.bfloat16
        ).cuda()
        made.load_from_tensors({"weight": words.clone(), "weight_scale": scales.clone()})
        made.transform()
        return made

    layers = [layer() for _ in range(timing.copies(weight.nbytes))]
    return [_rotated(lambda i: layers[i](x), weight.nbytes)]


def tinygemm(arguments: Arguments, direction: str) -> list[Candidate]:
    """PyTorch's own int4 product, on the same codes and scales."""
    x, codes, scales, weight = _packed_by_torch(arguments, "tinygemm")
    import torch  # type: ignore[import-not-found]

    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    both = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()  # [groups, N, 2]
    weights = [packed.clone() for _ in range(timing.copies(weight.nbytes))]
    return [_rotated(lambda i: torch.ops.aten._weight_int4pack_mm(x, weights[i], 128, both), weight.nbytes)]


def _of_torch(arguments: Arguments, name: str) -> tuple[Any, Any, Any, int]:
    """A call of sparse_matmul for PyTorch: x [M, K], the dense weight [N, K], float32 scales of outputs or None, and
    the bytes of the weight as it is stored."""
    if extra := [name for name in ("bias", "activation") if arguments.get(name) is not None]:
        raise Unavailable(f"is measured without {', '.join(extra)}")
    borrowed = _borrowing(name)
    weight, scales = arguments["weight"], arguments.get("scales")
    x, w = arguments["x"], sparse_matmul_reference.dense(weight).T + 0
    if scales is not None and x.dtype != jnp.int8:
        raise Unavailable("takes x in int8")
    return borrowed(x), borrowed(w), None if scales is None else borrowed(scales[0] * scales[1]), weight.nbytes


def cusparselt(arguments: Arguments, direction: str) -> list[Candidate]:
    """cuSPARSELt through PyTorch, with the algorithm that its search finds fastest; scales fused, as ours are."""
    x, w, scale, nbytes = _of_torch(arguments, "cuSPARSELt")
    import torch  # type: ignore[import-not-found]

    try:
        packed = [torch._cslt_compress(w) for _ in range(timing.copies(nbytes))]
    except RuntimeError as error:
        raise Unavailable(f"this PyTorch has no cuSPARSELt: {error}") from None
    # Floating products take no other type than their own.
    kind = None if scale is None else getattr(torch, jnp.dtype(arguments["out_dtype"]).name)
    best = torch._C._cusparselt.mm_search(packed[0], x.t(), None, scale, kind, True)
    how = dict(zip(("alg_id", "split_k", "split_k_mode"), best, strict=False))
    options = {"alpha": scale, "out_dtype": kind, "transpose_result": True, **how}
    return [_rotated(lambda i: torch._cslt_sparse_mm(packed[i], x.t(), **options), nbytes)]


def torch_int8(arguments: Arguments, direction: str) -> list[Candidate]:
    """cuBLASLt's int8 product through PyTorch, `torch._int_mm`: timed without the scales, which it has not."""
    x, w, scale, _ = _of_torch(arguments, "torch._int_mm")
    import torch  # type: ignore[import-not-found]

    if scale is None:
        raise Unavailable("multiplies integers")
    kind = getattr(torch, jnp.dtype(arguments["out_dtype"]).name)
    weights = [w.clone() for _ in range(timing.copies(w.numel()))]
    product = _rotated(lambda i: torch._int_mm(x, weights[i].t()), w.numel())

    def outputs() -> list[jax.Array]:
        out = (torch._int_mm(x, weights[0].t()) * scale).to(kind)
        torch.cuda.synchronize()
        return [jnp.from_dlpack(out)]

    return [dataclasses.replace(product, outputs=outputs)]


def _borrowing(name: str) -> Callable[[jax.Array], Any]:
    """Makes tensors of PyTorch, on the GPU, of arrays; Unavailable where a library of that name cannot have them."""
    if device.current().platform != "gpu":
        raise Unavailable(f"{name} needs an NVIDIA GPU")
    with _importing():
        import torch  # type: ignore[import-not-found]
    if not torch.cuda.is_available():
        raise Unavailable("this PyTorch sees no GPU")
    return lambda array: torch.from_dlpack(jax.block_until_ready(array)).clone()


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """A library that cannot be imported is not available; its shared objects may be missing, too."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise Unavailable(f"is not installed ({error})") from error


BASELINES: Mapping[str, Mapping[str, Baseline]] = {
    "flash_attention": {
        "cudnn": cudnn,
        "cudnn_masked": cudnn_masked,
        "fa3": fa3,
        "tokamax": tokamax,
        "torch_flash": torch_flash,
        "jax_mosaic_gpu": jax_mosaic_gpu,
        "jax_xla": jax_xla,
    },
    "decode_attention": {"cudnn": cudnn_decode},
    "flat_gemm": {"cublas": cublas},
    "sparse_matmul": {"cublas": cublas_decoded, "cusparselt": cusparselt, "torch_int8": torch_int8},
    "quantized_matmul": {"cublas": cublas_decoded, "humming": humming, "tinygemm": tinygemm},
}
