# SPDX-License-Identifier: Apache-2.0
"""Multi-device programs: meshes, sharding rules and, later, collectives that overlap with compute.

Models never import this package: a program shards a model's parameters and inputs from outside.
"""
