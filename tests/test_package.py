"""Public names, layers of the package, and lazy imports."""
import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import timm_multimix

PACKAGE = Path(timm_multimix.__file__).parent
MODULES = sorted(
    '.'.join(path.with_suffix('').relative_to(PACKAGE.parent).parts).removesuffix('.__init__')
    for path in PACKAGE.rglob('*.py') if path.name != '__main__.py')
# From the bottom up. A module imports from its own layer and lower layers.
LAYERS = (
    ('common', 'version'), ('losses',), ('dense', 'data'), ('build',),
    ('teacher', 'task', 'options', 'calibration', 'hub'), ('evaluation', 'detection'),
    ('training', 'patch', 'evaluate'), ('cli',))
HEAVY = ('timm', 'huggingface_hub', 'torchvision', 'safetensors', 'sklearn', 'scipy', 'matplotlib')


def test_public_names():
    assert set(timm_multimix.__all__) - {'__version__'} == set(timm_multimix._MODULES)
    for name in timm_multimix.__all__:
        assert getattr(timm_multimix, name) is getattr(timm_multimix, name)
    assert set(timm_multimix.__all__) <= set(dir(timm_multimix))
    with pytest.raises(AttributeError, match='no attribute'):
        timm_multimix.multimix_entropy  # noqa: B018


def run(code: str) -> str:
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize('code', [
    'import timm_multimix.losses', 'from timm_multimix import MultiMixLoss, attend', 'import timm_multimix'])
def test_losses_need_torch_only(code):
    assert run(f'import sys; {code}; print([name for name in {HEAVY} if name in sys.modules])').strip() == '[]'


def imports(module: str) -> set[str]:
    """Return the packages and top-level modules of timm_multimix that a module imports."""
    path = PACKAGE.joinpath(*module.split('.')[1:])
    path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
    package = list(path.relative_to(PACKAGE.parent).with_suffix('').parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            name = package[:len(package) - node.level + 1] + (node.module or '').split('.')
            found.update([name[1]] if len(name) > 1 and name[1] else [alias.name for alias in node.names])
    return found


@pytest.mark.parametrize('layer', range(len(LAYERS)), ids=lambda index: LAYERS[index][0])
def test_layers_import_from_below(layer):
    allowed = {name for names in LAYERS[:layer + 1] for name in names}
    for module in MODULES:
        parts = module.split('.')
        if len(parts) > 1 and parts[1] in LAYERS[layer]:
            assert imports(module) <= allowed, module


def test_no_import_cycle():
    """Imports in functions and of types are included."""
    graph = {}
    for module in MODULES[1:]:
        name = module.split('.')[1]
        graph[name] = graph.get(name, set()) | imports(module) - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError


# Each module is imported in a child of a process that has imported the dependencies, which is fast.
IMPORT_EACH = """
import os, sys
import captum.attr, huggingface_hub, matplotlib.figure, sklearn, timm, timm.data, timm.task, torch, torchvision, yaml
for module in sys.argv[1:]:
    if not os.fork():
        __import__(module)
        os._exit(0)
    if os.wait()[1]:
        print(module)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_every_module_can_be_imported_first():
    modules = [module for module in MODULES if module != 'timm_multimix']
    outcome = subprocess.run([sys.executable, '-c', IMPORT_EACH, *modules], capture_output=True, text=True, check=True)
    assert outcome.stdout == '', outcome.stderr


def test_distribution_contains_all_packages():
    tomllib = pytest.importorskip('tomllib')  # Python 3.11
    settings = tomllib.loads((PACKAGE.parent / 'pyproject.toml').read_text())['tool']['setuptools']
    folders = {path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob('__init__.py')}
    assert {*settings['packages']} - {*settings['package-dir']} == {'.'.join(folder.parts) for folder in folders}
