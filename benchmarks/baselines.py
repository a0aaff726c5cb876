# SPDX-License-Identifier: Apache-2.0
"""What the suite is measured against: the best that others offer for the same call, in the same process.

A baseline gets the arguments of a call and its direction ("forward" or "forward_backward") and returns the ways to
run it, of which the fastest counts, or raises `Unavailable` with the reason why it cannot.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels.core import device
from pallas_kernels.masks.base import And

Arguments = dict[str, Any]
# A function and the arguments it wants: those of the call, unless the baseline expects them prepared.
Candidate = tuple[Callable[[Arguments], jax.Array], Arguments]
Baseline = Callable[[Arguments, str], list[Candidate]]


class Unavailable(Exception):
    """A baseline cannot run this call, or is not installed."""


def _only(arguments: Arguments, *names: str) -> None:
    """Refuses a call that sets anything else than query, key, value and `names`."""
    others = set(arguments) - {"query", "key", "value", *names}
    if extra := sorted(name for name in others if arguments[name] is not None):
        raise Unavailable(f"takes no {', '.join(extra)}")


def _is_plain(mask: Any, kind: type) -> bool:
    """Whether it is a Causal or a Window whose positions are the default."""
    return isinstance(mask, kind) and mask.query_positions is None and mask.key_positions is None


def _parts(mask: Any) -> list[Any]:
    """The masks that `&` joins."""
    return [*_parts(mask.left), *_parts(mask.right)] if isinstance(mask, And) else [mask]


def _mask_options(arguments: Arguments) -> dict[str, Any]:
    """A mask in the words of jax.nn.dot_product_attention: flags where it has them, else the dense array.

    Its causal mask and window are aligned top-left, so the flags mean the same only where T = S.
    """
    mask = arguments.get("mask")
    if mask is None:
        return {}
    T, S = arguments["query"].shape[1], arguments["key"].shape[1]
    options: dict[str, Any] = {}
    for part in _parts(mask):
        if T == S and _is_plain(part, masks.Causal):
            options["is_causal"] = True
        elif T == S and _is_plain(part, masks.Window) and None not in (part.left, part.right):
            options["local_window_size"] = (part.left, part.right)
        else:
            return {"mask": jnp.asarray(mask.as_array(T, S))}
    return options


def dot_product_attention(implementation: Literal["xla", "cudnn"]) -> Baseline:
    """jax.nn.dot_product_attention, by XLA or cuDNN."""

    def baseline(arguments: Arguments, direction: str) -> list[Candidate]:
        _only(arguments, "mask", "bias", "scale")
        if implementation == "cudnn":
            if device.current().platform != "gpu":
                raise Unavailable("cuDNN needs an NVIDIA GPU")
            if arguments["query"].dtype.name not in ("bfloat16", "float16"):
                raise Unavailable(f"cuDNN's fused attention takes no {arguments['query'].dtype}")

        def attend(arguments: Arguments) -> jax.Array:
            return jax.nn.dot_product_attention(
                arguments["query"],
                arguments["key"],
                arguments["value"],
                bias=arguments.get("bias"),
                scale=arguments.get("scale"),
                implementation=implementation,
                **_mask_options(arguments),
            )

        return [(attend, arguments)]

    return baseline


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
    try:
        from jax.experimental.pallas.ops.gpu import attention_mgpu
    except ImportError as error:
        raise Unavailable(f"import failed: {error}") from error

    def attend(arguments: Arguments, block_kv: int) -> jax.Array:
        config = attention_mgpu.TuningConfig(
            block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=mask is not None
        )
        return attention_mgpu.attention(arguments["query"], arguments["key"], arguments["value"], config)

    # It does not scale the logits; done beforehand, so that it costs this baseline nothing.
    scaled = {**arguments, "query": (query * query.shape[-1] ** -0.5).astype(query.dtype)}
    return [(functools.partial(attend, block_kv=block_kv), scaled) for block_kv in (256, 128, 64)]


def tokamax(arguments: Arguments, direction: str) -> list[Candidate]:
    """tokamax.dot_product_attention, with the implementation that it chooses, if it is installed."""
    _only(arguments, "mask", "bias", "scale", "soft_cap")
    try:
        import tokamax as library  # type: ignore[import-not-found]
    except ImportError as error:
        raise Unavailable(f"is not installed ({error})") from error

    def attend(arguments: Arguments) -> jax.Array:
        return library.dot_product_attention(
            arguments["query"],
            arguments["key"],
            arguments["value"],
            bias=arguments.get("bias"),
            scale=arguments.get("scale"),
            logits_soft_cap=arguments.get("soft_cap"),
            **_mask_options(arguments),
        )

    return [(attend, arguments)]


BASELINES: Mapping[str, Mapping[str, Baseline]] = {
    "flash_attention": {
        "cudnn": dot_product_attention("cudnn"),
        "jax_xla": dot_product_attention("xla"),
        "jax_mosaic_gpu": jax_mosaic_gpu,
        "tokamax": tokamax,
    }
}
