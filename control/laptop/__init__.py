# SPDX-License-Identifier: Apache-2.0
"""
Run every part of Peaje on one machine, on loopback, as an ordinary user or as root.

`places` knows where things are, `parts` what is run, `supervisor` in which order and what
happens when one dies; `commands` are `peaje up`, `down` and `status`.
"""
