# SPDX-License-Identifier: Apache-2.0
"""Models composed of the suite's functions, and what is needed to load, run and save them."""
