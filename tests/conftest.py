"""Settings shared by all tests."""

from hypothesis import settings

# A first call compiles and imports: timing out on it would test the machine, not the code.
settings.register_profile("arbllm", deadline=None)
settings.load_profile("arbllm")
