# SPDX-License-Identifier: Apache-2.0
"""Logarithms of modified Bessel functions, and ratios of them. See README.md in this folder."""
