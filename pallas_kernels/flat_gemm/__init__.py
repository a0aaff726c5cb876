# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with a large weight. See README.md in this folder."""
