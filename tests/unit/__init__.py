# SPDX-License-Identifier: Apache-2.0
"""Pure pieces, in seconds."""
