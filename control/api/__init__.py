# SPDX-License-Identifier: Apache-2.0
"""The control plane's REST API: a thin face on the use cases."""
