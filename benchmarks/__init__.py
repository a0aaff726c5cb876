# SPDX-License-Identifier: Apache-2.0
"""Measurements: `python -m benchmarks.run` for operations, `python -m benchmarks.models` for whole models."""
