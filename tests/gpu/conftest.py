"""The tiny base and the drawn data of the smoke tests."""

from tests.smoke.conftest import smoke_base, smoke_data

__all__ = ["smoke_base", "smoke_data"]
