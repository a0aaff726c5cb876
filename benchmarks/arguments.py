# SPDX-License-Identifier: Apache-2.0
"""Types of command lines that several benchmarks have."""

import argparse
from collections.abc import Callable, Sequence


def integers(text: str) -> list[int]:
    """
    >>> integers("1,8")
    [1, 8]
    """
    return [int(part) for part in text.split(",")]


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Names with commas between them, each of which is known.

    >>> some_of(["float64", "float32"])("float32")
    ['float32']
    """

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known: {', '.join(known)}")
        return names

    return parse
