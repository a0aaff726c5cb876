# SPDX-License-Identifier: Apache-2.0
"""Attention in linear memory. See README.md in this folder."""
