# SPDX-License-Identifier: Apache-2.0
"""The generic rate limit service: rules that operators bring, and what they say to any descriptor."""
