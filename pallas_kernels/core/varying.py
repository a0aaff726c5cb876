# SPDX-License-Identifier: Apache-2.0
"""Values inside shard_map carry the mesh axes they vary over; loops and custom gradients need them to agree."""

import jax


def varying_axes(tree) -> frozenset[str]:
    """Mesh axes that any leaf varies over; empty outside shard_map and with check_vma=False."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary_like[Tree](tree: Tree, like) -> Tree:
    """Marks every leaf as varying over the axes that `like` varies over.

    The numbers stay. JAX transposes the mark to a psum, which is what the gradient of a replicated value needs.
    """
    axes = varying_axes(like)

    def mark(x):
        return jax.lax.pcast(x, tuple(axes - varying_axes(x)), to="varying")

    return jax.tree.map(mark, tree) if axes else tree
