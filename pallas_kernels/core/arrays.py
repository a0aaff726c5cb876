# SPDX-License-Identifier: Apache-2.0
"""The arrays of a call, apart from the numbers, flags and None beside them, which are part of the program."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def is_array(leaf: Any) -> bool:
    """Whether a leaf is data."""
    return isinstance(leaf, (jax.Array, np.ndarray))


def arrays_of(tree: Any) -> list[jax.Array]:
    """The array leaves, in order."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def with_arrays(tree: Any, arrays: Sequence[jax.Array]) -> Any:
    """`tree` with its array leaves replaced, in order.

    >>> import numpy as np
    >>> arguments = {"query": np.ones(2), "scale": 0.5, "sink": None}
    >>> with_arrays(arguments, ["another"])
    {'query': 'another', 'scale': 0.5, 'sink': None}
    """
    replacements = iter(arrays)
    return jax.tree.map(lambda leaf: next(replacements) if is_array(leaf) else leaf, tree)
