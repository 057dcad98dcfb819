# SPDX-License-Identifier: Apache-2.0
"""Rules of the house: each a function of a source tree, each tried on a tree that breaks it."""
