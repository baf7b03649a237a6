import json

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


@pytest.fixture
def float32():
    """For tests of training, which runs in torch's own default."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def without_times():
    """A record as text, without what differs between two runs of the same numbers."""

    def text(record):
        history = [
            {k: v for k, v in entry.items() if k != "seconds"} for entry in record["history"]
        ]
        kept = {k: v for k, v in record.items() if k != "wall_time_s"}
        return json.dumps(kept | {"history": history})

    return text
