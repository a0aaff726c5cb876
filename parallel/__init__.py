# SPDX-License-Identifier: Apache-2.0
"""Multi-device programs: meshes, sharding rules, attention over devices, plans for mixed lengths.

Models never import this package: a program shards a model's parameters and inputs from outside.
"""
