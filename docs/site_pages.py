"""Hook of mkdocs that makes pages of files outside docs/: README, changelog, contributing, examples and notebook."""
import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINKS = (
    (r'\]\(docs/', ']('),
    (r'\]\(examples/(\w*)(\.py)?\)', r'](examples.md#\1)'),
    (r'\]\((\.\./)?notebooks/quickstart\.ipynb\)', '](quickstart.md)'),
    (r'\]\(CHANGELOG\.md\)', '](changes.md)'),
    (r'\]\(CONTRIBUTING\.md\)', '](contributing.md)'),
)


def _examples() -> str:
    paths = sorted((ROOT / 'examples').glob('*.py'))
    return '# Examples\n\n' + '\n'.join(
        f'## {path.stem.replace("_", " ")} {{#{path.stem}}}\n\n```python\n{path.read_text()}```\n' for path in paths)


def _notebook() -> str:
    cells = json.loads((ROOT / 'notebooks' / 'quickstart.ipynb').read_text())['cells']
    texts = [''.join(cell['source']).replace('](../docs/', '](docs/') for cell in cells]
    return '\n\n'.join(
        f'```python\n{text}\n```' if cell['cell_type'] == 'code' else text
        for cell, text in zip(cells, texts, strict=True))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages. Links between files become links between pages."""
    pages = {
        'index.md': (ROOT / 'README.md').read_text(),
        'changes.md': (ROOT / 'CHANGELOG.md').read_text(),
        'contributing.md': (ROOT / 'CONTRIBUTING.md').read_text(),
        'examples.md': _examples(),
        'quickstart.md': _notebook(),
    }
    for name, text in pages.items():
        for pattern, link in LINKS:
            text = re.sub(pattern, link, text)
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, 'LICENSE', abs_src_path=str(ROOT / 'LICENSE')))
    return files
