# SPDX-License-Identifier: Apache-2.0
"""Hybrid data parallelism: each sequence on as many devices as it needs, and every device busy for the same time.

    plan.py       what a sequence costs, how many devices it takes, how short ones are packed
    balance.py    which devices take which, and when
    layout.py     micro-batches of all devices as arrays, zigzagged
    execute.py    loss and gradients of a plan: a program for each layout, one sum at the end
    simulate.py   plans on paper, for thousands of devices

Source: Ge et al., "ByteScale: Efficient Scaling of LLM Training with a 2048K Context Length on More Than 12,000 GPUs",
2025.
"""
