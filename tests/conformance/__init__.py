# SPDX-License-Identifier: Apache-2.0
"""What Envoy, engines and codecs agree on, byte for byte."""
