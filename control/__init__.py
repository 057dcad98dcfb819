# SPDX-License-Identifier: Apache-2.0
"""What people change: tenants, keys, limits; REST API and CLI are thin faces, and `peaje up` runs it all."""
