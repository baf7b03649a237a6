import pytest
import torch


@pytest.fixture(autouse=True)
def float64_and_a_fixed_seed():
    """Mathematics is tested in float64; tests that are about float32 say so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
