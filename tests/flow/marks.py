"""Which tests of the integer flow this processor can run."""

import pytest

from mono_quant.kernels import onednn

_WHY = onednn.refuse_conv() or onednn.refuse_linear()
needs_integers = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))
"""For what integers alone show: without VNNI oneDNN's sums saturate, and layers stay in float."""
