"""The numerical tests under the CPU instruction sets of other machines."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
NUMERICAL_TESTS = ('test_losses.py', 'test_multimix_loss.py', 'test_distillation.py', 'test_weights.py')
ENVIRONMENTS = (
    'ONEDNN_MAX_CPU_ISA=SSE41', 'ONEDNN_MAX_CPU_ISA=AVX2', 'ATEN_CPU_CAPABILITY=default', 'ATEN_CPU_CAPABILITY=avx2',
    'MKL_CBWR=COMPATIBLE', 'MKL_CBWR=AVX2')


@pytest.mark.slow
@pytest.mark.parametrize('setting', ENVIRONMENTS)
def test_numerical_tests_pass_with_other_instruction_sets(setting):
    if setting.lower().endswith('avx2') and not torch.backends.cpu.get_cpu_capability().startswith('AVX'):
        pytest.skip('This processor has no AVX2.')
    variable, value = setting.split('=')
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-k', 'not compile and not memory',
         *(str(TESTS / name) for name in NUMERICAL_TESTS)],
        env={**os.environ, variable: value}, cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
