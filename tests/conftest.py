"""What every test starts from."""

from __future__ import annotations

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread, before any fixture: the sums of a product depend on it, and code under test may have set another."""
    torch.set_num_threads(1)
