# SPDX-License-Identifier: Apache-2.0
"""Hybrid data parallelism: each sequence on as many devices as it needs, and every device busy for the same time.

    plan.py       what a sequence costs, how many devices it takes, how short ones are packed
    balance.py    which devices take which, and when
    simulate.py   the same on paper, for thousands of devices

Source: Ge et al., "ByteScale: Efficient Scaling of LLM Training with a 2048K Context Length on More Than 12,000 GPUs",
2025.
"""
