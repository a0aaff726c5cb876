# SPDX-License-Identifier: Apache-2.0
"""flash_attention on NVIDIA GPUs: sm90.py and sm90_backward.py for Hopper, sm80.py for Ampere and Ada.

The type of the config decides which one runs; without one, the device (`config.kinds`). sm80.py runs on Hopper too if
it is asked for.

Short queries of grouped heads fill a tile together in the forward pass: the G heads that share keys and values become
rows of it, [B, T, K * G, H] -> [B, T * G, K, H]. A tile of 128 rows that holds 16 queries uses an eighth of the tensor
cores, and keys and values are read once a head.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.core import device as device_lib
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.softmax import UnifiedMax
from pallas_kernels.flash_attention.config import Sm80Config, Sm90Config
from pallas_kernels.flash_attention.mosaic_gpu import sm80
from pallas_kernels.flash_attention.xla import Gradients
from pallas_kernels.masks import Mask, grouped


def supports(call: Call, device: Device) -> Refusal | None:
    refusal = sm80.supports(call, device)
    if refusal is None and call.direction == "forward" and call.option("unified_max") is not None:
        if device.arch != "sm90":
            return Refusal(f"unified_max has a kernel for Hopper only, and this is {device}")
        if call.arguments[0].dtype == "float16":
            return Refusal("an asynchronous softmax has weights beyond the range of float16; use bfloat16")
    return refusal


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sink: jax.Array | None,
    mask: Mask | None,
    *,
    config: Sm80Config | Sm90Config,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """As `xla.forward`."""
    run = functools.partial(_forward, config=config, **options)
    if sink is not None or not _grouping_pays(query, key, config):
        return run(query, key, value, bias, sink, mask)
    out, lse = _in_groups(run, query, key, value, bias, mask)
    return out, lse


def forward_asynchronously(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sink: jax.Array | None,
    mask: Mask | None,
    unified_max: UnifiedMax,
    *,
    config: Sm90Config,
    **options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `xla.forward_asynchronously`."""
    from pallas_kernels.flash_attention.mosaic_gpu import sm90

    run = functools.partial(
        sm90.forward_asynchronously, unified_max=unified_max, config=config, num_sms=_num_sms(), **options
    )
    # Rows of a tile have one phi, so heads share tiles only if they share it.
    if sink is not None or jnp.ndim(unified_max.phi) or not _grouping_pays(query, key, config):
        return run(query, key, value, bias, sink, mask)
    out, lse, recomputed = _in_groups(run, query, key, value, bias, mask)
    return out, lse, recomputed


def _in_groups(
    run: Callable[..., Sequence[jax.Array]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: Mask | None,
) -> tuple[jax.Array, ...]:
    """`run`'s output, LSE, and whatever else, where the heads of a group are rows of one head."""
    (B, T, N, H), (_, S, K, Hv) = query.shape, value.shape
    G = N // K
    query = jnp.swapaxes(query.reshape(B, T, K, G, H), 2, 3).reshape(B, T * G, K, H)
    bias = None if bias is None else jnp.asarray(grouped.group_rows_of_array(bias, G))
    mask = None if mask is None else grouped.group_rows(mask, G, T, S)
    out, lse, *more = run(query, key, value, bias, None, mask)
    out = jnp.swapaxes(out.reshape(B, T, G, K, Hv), 2, 3).reshape(B, T, N, Hv)
    return out, jnp.swapaxes(lse.reshape(B, K, T, G), 2, 3).reshape(B, N, T), *more


def _grouping_pays(query: jax.Array, key: jax.Array, config: Sm80Config | Sm90Config) -> bool:
    """Whether queries are shorter than a tile, and the multiprocessors are done in fewer rounds if heads share tiles:
    with few planes, one head each keeps more of them busy."""
    block_q = config.block_q if isinstance(config, Sm80Config) else 64 * config.consumers
    (B, T, N, _), K = query.shape, key.shape[2]

    def rounds(heads: int, rows: int) -> int:
        return math.ceil(B * heads * math.ceil(rows / block_q) / _num_sms())

    return block_q > T and rounds(K, T * N // K) < rounds(N, T)


def _forward(*arguments, config: Sm80Config | Sm90Config, **options):
    if isinstance(config, Sm80Config):
        return sm80.forward(*arguments, config=config, **options)
    from pallas_kernels.flash_attention.mosaic_gpu import sm90

    return sm90.forward(*arguments, config=config, num_sms=_num_sms(), **options)


def backward(*arguments, config: Sm80Config | Sm90Config, **options) -> Gradients:
    """As `xla.backward`."""
    if isinstance(config, Sm80Config):
        return sm80.backward(*arguments, config=config, **options)
    from pallas_kernels.flash_attention.mosaic_gpu import sm90_backward

    return sm90_backward.backward(*arguments, config=config, num_sms=_num_sms(), **options)


def _num_sms() -> int:
    return device_lib.current().num_cores or 132
