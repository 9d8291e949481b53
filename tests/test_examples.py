"""The examples, the notebook and the code of the README run, and the API reference is complete."""
import re
import runpy
from pathlib import Path

import pytest

import timm_multimix

FOLDER = Path(__file__).parent.parent / 'examples'
EXAMPLES = [
    'accelerate_loop.py',
    'fastai_learner.py',
    'hf_trainer.py',
    'lightning_module.py',
    'plain_loop.py',
    'segmentation.py',
    'sequence_classifier.py',
]


def test_list_is_complete():
    assert sorted(path.name for path in FOLDER.glob('*.py')) == EXAMPLES


@pytest.mark.parametrize('name', EXAMPLES)
def test_example(name, tmp_path, monkeypatch, capsys):
    assert len((FOLDER / name).read_text().splitlines()) <= 60
    monkeypatch.chdir(tmp_path)  # examples write into the current folder
    try:
        runpy.run_path(str(FOLDER / name), run_name='__main__')
    except ModuleNotFoundError as error:
        if error.name.startswith('timm_multimix'):
            raise
        pytest.skip(f'{error.name} is not installed')
    accuracy = float(re.findall(r'validation accuracy ([\d.]+) %', capsys.readouterr().out)[-1])
    assert accuracy > 90


def test_readme():
    blocks = re.findall(r'```python\n(.*?)```', (FOLDER.parent / 'README.md').read_text(), re.DOTALL)
    assert len(blocks) == 4
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace['loss'].ndim == 0


def test_api_reference():
    text = (FOLDER.parent / 'docs' / 'api.md').read_text()
    names = re.findall(r'^::: timm_multimix\.(\w+)$', text, re.MULTILINE)
    assert sorted(names) == sorted(set(timm_multimix.__all__) - {'__version__'})


@pytest.mark.slow
def test_notebook(tmp_path):
    nbclient = pytest.importorskip('nbclient')
    nbformat = pytest.importorskip('nbformat')
    pytest.importorskip('ipykernel')
    notebook = nbformat.read(FOLDER.parent / 'notebooks' / 'quickstart.ipynb', as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={'metadata': {'path': str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    accuracies = re.findall(r'test accuracy ([\d.]+) %', ''.join(output.get('text', '') for output in outputs))
    assert len(accuracies) == 2 and min(map(float, accuracies)) > 90
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 4
