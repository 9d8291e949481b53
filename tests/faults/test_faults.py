"""Runs in processes of their own meet faults and end as docs/reliability.md promises. fault_study.py has the faults."""
import random

import fault_study
import pytest

# One of each kind, at moments that differ in what is half-done; hundreds more are slow.
CASES = {
    'killed while a checkpoint is written': (fault_study.kill_at_event, 'SIGKILL', 0),
    'killed twice': (lambda *given: fault_study.kill_at_event(*given, times=2), 'SIGKILL', 3),
    'SIGTERM': (fault_study.kill_at_event, 'SIGTERM', 1),
    'SIGINT': (fault_study.kill_at_event, 'SIGINT', 2),
    'truncated': (fault_study.damage, 'truncated', 1),
    'one bit changed': (fault_study.damage, 'one bit changed', 2),
    'full disk': (fault_study.full_disk, '', 1),
    'some losses not finite': (fault_study.spoiled_batches, '', 1),
    'all further losses not finite': (fault_study.spoiled_run, '', 1),
}


@pytest.fixture(scope='module')
def harness(tmp_path_factory):
    harness = fault_study.Harness(tmp_path_factory.mktemp('faults'))
    yield harness
    harness.close()


@pytest.mark.parametrize('name', CASES)
def test_run_ends_as_promised(harness, name):
    function, kind, seed = CASES[name]
    function(harness, random.Random(seed), kind)


def test_killed_worker(tmp_path):
    harness = fault_study.Harness(tmp_path, workers=1)
    try:
        fault_study.dead_worker(harness, random.Random(3), '')
    finally:
        harness.close()


def test_the_study_notices(harness):
    """The checks of the study fail where a run is not what it should be."""
    run = harness.new_run()
    assert harness.run(run, {}) == 0
    harness.check_same(run)
    path = harness.files(run) / 'summary.csv'
    text = path.read_text()
    path.write_text(text.replace('1', '2'))
    with pytest.raises(AssertionError, match='summary'):
        harness.check_same(run)
    other = harness.new_run()
    assert harness.run(other, {}, seed=1) == 0
    path.write_text(text)
    (harness.files(run) / 'last.pth.tar').write_bytes((harness.files(other) / 'last.pth.tar').read_bytes())
    with pytest.raises(AssertionError, match=r'last\.pth\.tar'):
        harness.check_same(run)


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_hundreds_of_faults(workers):
    faults = fault_study.WORKER_FAULTS if workers else fault_study.FAULTS
    _, failures = fault_study.study(40 if workers else 360, 0, faults, workers)
    assert not failures, '\n'.join(failures)
