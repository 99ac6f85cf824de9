"""Settings shared by all tests."""

import pytest
from hypothesis import settings

from arbllm.nn import BinaryLinear

# A first call compiles and imports: timing out on it would test the machine, not the code.
settings.register_profile("arbllm", deadline=None)
settings.load_profile("arbllm")


@pytest.fixture(autouse=True, scope="session")
def _exact_products():
    """Packed layers agree with dense ones to rounding: tests/kernels/test_cpu.py has those of 8 bits."""
    BinaryLinear.exact = True
    yield
    BinaryLinear.exact = False
