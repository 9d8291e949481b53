"""Settings shared by all tests."""
import hypothesis
import pytest
import torch

# The same examples on every run: a test that fails here fails everywhere.
hypothesis.settings.register_profile('timm_multimix', derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile('timm_multimix')

# Tests run in as many processes as there are cores: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
