"""A small study of detection from end to end."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'

STUDY = dict(
    datasets={'digits': dict(name='scene digits', train=50, validation=50, test=50, epochs=1)},
    models={'resnet': dict(model_name='test_resnet', output_stride=8)},
    methods={'random weights': {}, 'cross-entropy': {}, 'dense': dict(multimix='dense', num_mixes=20)},
    lrs=[0.1, 0.2],
    seeds=2,
    tuning_seeds=1,
    detection=dict(lrs=[1e-3, 2e-3], epochs=[1], train=8, validation=4, test=4),
)


def command(script, *args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, BENCHMARKS / script, *map(str, args)], capture_output=True, text=True)


@pytest.mark.slow
def test_a_study_of_detection_from_end_to_end(tmp_path):
    path, folder = tmp_path / 'small.yaml', tmp_path / 'results'
    path.write_text(yaml.safe_dump(STUDY))
    done = command('detection_study.py', path, '--results', folder, '--workers', 1)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / 'small.jsonl').read_text().splitlines()]
    detectors = [one for one in records if 'detector' in one['settings']]
    # Two learning rates of two classifiers; a grid of two and another seed for three backbones.
    assert len(records) - len(detectors) == 4 and len(detectors) == 9
    assert len({one['key'] for one in records}) == 13
    assert '| dense |' in done.stdout and '**digits, resnet**' in done.stdout
    again = command('detection_study.py', path, '--results', folder, '--workers', 1)
    assert again.stdout == done.stdout and len((folder / 'small.jsonl').read_text().splitlines()) == 13
