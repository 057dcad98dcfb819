# SPDX-License-Identifier: Apache-2.0
"""What was used, and what does it cost?"""
