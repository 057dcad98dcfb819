# SPDX-License-Identifier: Apache-2.0
"""ratelimit without stores and transport."""
