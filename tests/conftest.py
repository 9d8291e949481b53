"""Settings shared by all tests."""
import os

# Tests run in as many processes as there are cores: threads would only wait for each other. Also in what tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite('training_helpers', 'hub_helpers')  # some tests import them before they are plugins

# The same examples on every run: a test that fails here fails everywhere.
hypothesis.settings.register_profile('timm_multimix', derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile('timm_multimix')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled_gammas(monkeypatch):
    """Draw gammas in eager code as compiled code does, which does not reject and retry."""
    def sample(concentration, size, generator):
        return torch._standard_gamma(concentration.expand(size)).log_()
    monkeypatch.setattr('timm_multimix.losses.weights._sample_log_gamma', sample)
