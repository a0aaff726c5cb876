# SPDX-License-Identifier: Apache-2.0
"""Products with weights of 2, 4 and 8 bits, and mixtures. See README.md in this folder."""
