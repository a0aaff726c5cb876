# SPDX-License-Identifier: Apache-2.0
"""Shared by every operation, specific to none: dispatch, device, tuning, check, tolerance, doctor."""
