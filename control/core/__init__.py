# SPDX-License-Identifier: Apache-2.0
"""What the control plane decides, without any I/O: roles, rights of keys, the audit chain, token claims."""
