import pytest
import torch
from hypothesis import settings

# Deadlines measure the machine; derandomized examples are the same on every run.
settings.register_profile("fewbits", deadline=None, derandomize=True)
settings.load_profile("fewbits")


@pytest.fixture(autouse=True)
def fixed_numerics():
    """One thread and one seed, so that every test gives the same bits wherever it runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
