# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens to a cache of keys and values. See README.md in this folder."""
