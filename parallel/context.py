# SPDX-License-Identifier: Apache-2.0
"""Attention of sequences that are spread over devices: a ring, or an exchange of heads for rows.

    ring           every device keeps its queries; keys and values travel round, one neighbor a hop, with their
                   positions and documents. Partial results are merged by their LSE in float32. Backward they travel
                   again, and their gradients with them: nothing that was visited is stored.
    all_to_all     devices exchange rows for heads, attend to whole sequences of some heads, and exchange back; there
                   must be as many key heads as devices.

So that all devices have the same work, each document is cut into 2 N chunks, and device j has chunks j and 2 N - 1 - j:

    N = 2, documents of 8 and 4:    0 0 1 1 2 2 3 3 | 0 1 2 3      device 0: 0 0 3 3 | 0 3     device 1: 1 1 2 2 | 1 2

Sources: Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023; Jacobs et al.,
"DeepSpeed Ulysses", 2023; Ge et al., "ByteScale", 2025, section 4 (chunks of each document of a packed row).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import flash_attention
from pallas_kernels.core.dispatch import Implementation
from pallas_kernels.core.varying import vary_like
from pallas_kernels.flash_attention.api import gradients_of_part
from pallas_kernels.masks import Causal, Mask, Segments

Method = Literal["ring", "all_to_all"]
Array = jax.Array
Sums = tuple[Array, Array, Array]  # gradients of query, key and value


def zigzag(lengths: Sequence[int], devices: int) -> np.ndarray:
    """Where each token of a packed row goes: row[zigzag(...)] is what the devices hold, one after another.

    >>> zigzag([8, 4], 2).tolist()
    [0, 1, 6, 7, 8, 11, 2, 3, 4, 5, 9, 10]

    Args:
      lengths: of the documents of the row, each a multiple of 2 * devices (`padded_length`).
      devices: N.

    Raises:
      ValueError: a length is no multiple; names it and the next that is.
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(devices)]
    start = 0
    for length in lengths:
        if length % (2 * devices):
            raise ValueError(
                f"zigzag: a document of {length} tokens cannot be cut into {2 * devices} equal chunks; pad it to "
                f"{padded_length(length, devices)}"
            )
        chunks = np.arange(start, start + length).reshape(2 * devices, -1)
        for j in range(devices):
            parts[j] += [chunks[j], chunks[2 * devices - 1 - j]]
        start += length
    return np.concatenate([chunk for part in parts for chunk in part])


def padded_length(length: int, devices: int) -> int:
    """The next multiple of 2 * devices."""
    return length + -length % (2 * devices)


def context_attention(
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
    segment_ids: Array,
    *,
    mesh: Mesh | AbstractMesh,
    method: Method = "ring",
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """Causal attention within documents of rows that are spread over the mesh axis `context`.

    Rows of the batch may be spread over `data`, heads over `model`.

    Args:
      query, key, value: [B, T, N, H], [B, T, K, H], [B, T, K, Hv], in the order of `zigzag` or any other.
      positions: int32 [B, T], of each token in its document.
      segment_ids: int32 [B, T]: which document that is; tokens see those of their own.
      mesh: of parallel/mesh.py.
      method: see the head of this file.
      scale: of the logits; 1 / sqrt(H) by default.
      implementation: of flash_attention.

    Returns:
      [B, T, N, Hv], differentiable in query, key and value.

    Raises:
      ValueError: T does not divide by the devices of `context`, or the key heads do not ("all_to_all").
    """
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    devices = sizes["context"]
    if query.shape[1] % devices:
        raise ValueError(
            f"context_attention: T={query.shape[1]} must be a multiple of the {devices} devices of context"
        )
    heads = key.shape[2] // sizes.get("model", 1)
    if method == "all_to_all" and heads % devices:
        raise ValueError(
            f'context_attention: method="all_to_all" needs a multiple of {devices} key heads on each device, and there '
            f'are {heads}; use method="ring"'
        )
    inner = {"ring": ring_attention, "all_to_all": exchanged_attention}.get(method)
    if inner is None:
        raise ValueError(f'context_attention: method must be "ring" or "all_to_all", got {method!r}')
    of_heads, of_rows = P("data", "context", "model", None), P("data", "context")
    return jax.shard_map(
        functools.partial(inner, axis="context", scale=scale, implementation=implementation),
        mesh=mesh,
        in_specs=(of_heads, of_heads, of_heads, of_rows, of_rows),
        out_specs=of_heads,
    )(query, key, value, positions, segment_ids)


def exchanged_attention(
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
    segment_ids: Array,
    *,
    axis: str,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """Inside shard_map: as `context_attention` by "all_to_all", of this device's rows."""
    exchange = functools.partial(lax.all_to_all, axis_name=axis, tiled=True)
    q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (query, key, value))
    at, ids = (lax.all_gather(x, axis, axis=1, tiled=True) for x in (positions, segment_ids))
    out = flash_attention(q, k, v, mask=_mask(at, ids, at, ids), scale=scale, implementation=implementation)
    return exchange(out, split_axis=1, concat_axis=2)


def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
    segment_ids: Array,
    *,
    axis: str,
    groups: Sequence[int] | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """Inside shard_map: as `context_attention` by "ring", of this device's rows.

    Args:
      groups: sizes of runs of neighboring devices, each of which is a ring of its own with other documents; they have
        the axis's size together, and divide the largest. None is one ring of all. Document numbers are not negative.

    Raises:
      ValueError: the groups are no such.
    """
    size = lax.axis_size(axis)
    sizes = (size,) if groups is None else tuple(groups)
    if sum(sizes) != size or min(sizes) < 1 or any(max(sizes) % n for n in sizes):
        raise ValueError(
            f"ring_attention: groups must have {size} devices together, and divide the largest, got {list(sizes)}"
        )
    ring = _Ring(axis, sizes, scale, implementation)
    arrays = vary_like((query, key, value, positions, segment_ids), (query, key, value, positions, segment_ids))
    found: Any = _ring_attention(ring, *arrays)
    return found


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "segment_ids"],
    meta_fields=["axis", "groups"],
)
@dataclasses.dataclass(frozen=True)
class RingAttend:
    """`ring_attention` as a model takes it (models.layers.Attend): what says who sees whom, of this device's rows.

    Attributes:
      positions, segment_ids: int32 [B, T].
      axis, groups: as of `ring_attention`.
    """

    positions: Array
    segment_ids: Array
    axis: str
    groups: tuple[int, ...] | None = None

    def __call__(self, query: Array, key: Array, value: Array, *, implementation: Implementation) -> Array:
        who = self.positions, self.segment_ids
        return ring_attention(
            query, key, value, *who, axis=self.axis, groups=self.groups, implementation=implementation
        )


class _Ring(NamedTuple):
    axis: str
    groups: tuple[int, ...]  # sizes of runs of devices, each a ring of its own
    scale: float | None
    implementation: Implementation

    @property
    def hops(self) -> int:
        """Of the largest group. All sizes divide it: what travels is home after it in every group."""
        return max(self.groups)

    def passed_on(self, tree: Any) -> Any:
        """What this device's neighbor in its group had: one exchange for all groups."""
        neighbors, first = [], 0
        for size in self.groups:
            neighbors += [(first + i, first + (i + 1) % size) for i in range(size)]
            first += size
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, neighbors), tree)

    def seen(self, visitor: "_Visitor", hop: Any) -> "_Visitor":
        """A visitor that has been here before is of no document: smaller groups are done."""
        if len(set(self.groups)) == 1:
            return visitor
        sizes = np.repeat(self.groups, self.groups).astype(np.int32)
        done = hop >= jnp.asarray(sizes)[lax.axis_index(self.axis)]
        return visitor._replace(segment_ids=jnp.where(done, -1, visitor.segment_ids))


class _Visitor(NamedTuple):
    """Keys that travel, with what says who sees them."""

    key: Array
    value: Array
    positions: Array
    segment_ids: Array


def _mask(positions: Array, ids: Array, key_positions: Array, key_ids: Array) -> Mask:
    return Causal(positions, key_positions) & Segments(ids, key_ids)


def _forward(
    ring: _Ring, query: Array, key: Array, value: Array, positions: Array, segment_ids: Array
) -> tuple[Array, Array]:
    """Output, and LSE [B, N, T]."""

    def attend(visitor: _Visitor, hop: Any) -> tuple[Array, Array]:
        mask = _mask(positions, segment_ids, *ring.seen(visitor, hop)[2:])
        options: dict[str, Any] = {"scale": ring.scale, "implementation": ring.implementation}
        out, lse = flash_attention(query, visitor.key, visitor.value, mask=mask, return_lse=True, **options)
        return out.astype(jnp.promote_types(out.dtype, jnp.float32)), lse

    def visit(hop: Any, carry: tuple[_Visitor, tuple[Array, Array]]) -> tuple[_Visitor, tuple[Array, Array]]:
        visitor, part = carry
        # Sent before it is attended to: the next hop's copy runs under this hop's products.
        return ring.passed_on(visitor), _merged(part, attend(visitor, hop))

    visitor, last = _Visitor(key, value, positions, segment_ids), ring.hops - 1
    if last == 0:
        out, lse = attend(visitor, 0)
    else:
        of_out, of_lse = jax.eval_shape(attend, visitor, 0)
        nothing = jnp.zeros(of_out.shape, of_out.dtype), jnp.full(of_lse.shape, -jnp.inf, of_lse.dtype)
        visitor, part = lax.fori_loop(0, last, visit, (visitor, vary_like(nothing, (query, key, value))))
        out, lse = _merged(part, attend(visitor, last))
    return out.astype(query.dtype), lse


def _merged(part: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Output and LSE of two parts of the keys. A row that saw none has LSE -inf."""
    (out, lse), (more, more_lse) = part, other
    most = jnp.maximum(lse, more_lse)
    most = jnp.where(most == -jnp.inf, 0, most)
    weights = [jnp.exp(x - most) for x in (lse, more_lse)]
    total = weights[0] + weights[1]
    shares = [jnp.swapaxes(w / jnp.where(total == 0, 1, total), 1, 2)[..., None] for w in weights]
    return out * shares[0] + more * shares[1], most + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: _Ring, query: Array, key: Array, value: Array, positions: Array, segment_ids: Array) -> Array:
    return _forward(ring, query, key, value, positions, segment_ids)[0]


def _forward_rule(ring: _Ring, *arrays: Array) -> tuple[Array, tuple[Any, ...]]:
    out, lse = _forward(ring, *arrays)
    return out, (arrays, out, lse)


def _backward_rule(ring: _Ring, residuals: tuple[Any, ...], dout: Array) -> tuple[Any, ...]:
    (query, key, value, positions, segment_ids), out, lse = residuals
    kind = jnp.promote_types(query.dtype, jnp.float32)

    def add(visitor: _Visitor, hop: Any, sums: Sums) -> Sums:
        """Gradients of this hop; those of keys and values go on with these: the last hop brings them home."""
        mask = _mask(positions, segment_ids, *ring.seen(visitor, hop)[2:])
        options: dict[str, Any] = {"scale": ring.scale, "implementation": ring.implementation}
        whole = out, lse, dout, jnp.zeros_like(lse)
        more = gradients_of_part(query, visitor.key, visitor.value, *whole, mask=mask, **options)
        dquery, dkey, dvalue = (total + part.astype(kind) for total, part in zip(sums, more, strict=True))
        return dquery, *ring.passed_on((dkey, dvalue))

    def visit(hop: Any, carry: tuple[_Visitor, Sums]) -> tuple[_Visitor, Sums]:
        visitor, sums = carry
        return ring.passed_on(visitor), add(visitor, hop, sums)

    visitor, last = _Visitor(key, value, positions, segment_ids), ring.hops - 1
    arrays = query, key, value
    dquery, dkey, dvalue = (jnp.zeros(x.shape, kind) for x in arrays)
    sums: Sums = vary_like((dquery, dkey, dvalue), (*arrays, dout))
    if last:
        visitor, sums = lax.fori_loop(0, last, visit, (visitor, sums))
    sums = add(visitor, last, sums)
    return (*(d.astype(x.dtype) for d, x in zip(sums, arrays, strict=True)), None, None)


_ring_attention.defvjp(_forward_rule, _backward_rule)
