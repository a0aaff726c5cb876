# SPDX-License-Identifier: Apache-2.0
"""Products with 2:4 sparse weights. See README.md in this folder."""
