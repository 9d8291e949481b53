"""Settings and fixtures of all tests."""
import logging
import os
import signal

# Tests run in one process per core, so more threads would be slower. Subprocesses inherit the variable.
os.environ.setdefault('OMP_NUM_THREADS', '1')

# Tests compare runs bit by bit, and a GPU adds in no fixed order. TEST_CUDA=1 is for tests/test_cuda.py.
if not os.environ.get('TEST_CUDA'):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

# Shells ignore SIGINT in background jobs, and tests interrupt runs with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite('training_helpers', 'hub_helpers')  # before test modules import them

# Use the same examples in every run, for reproducible failures.
hypothesis.settings.register_profile('timm_multimix', derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile('timm_multimix')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def restored_logging():
    """Restore the handlers and levels of loggers, which commands set."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.getLogger('timm').setLevel(logging.NOTSET)
