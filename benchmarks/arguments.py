# SPDX-License-Identifier: Apache-2.0
"""Types of command lines that several benchmarks have."""


def integers(text: str) -> list[int]:
    """
    >>> integers("1,8")
    [1, 8]
    """
    return [int(part) for part in text.split(",")]
