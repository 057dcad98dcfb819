# SPDX-License-Identifier: Apache-2.0
"""How much may they use, right now?"""
