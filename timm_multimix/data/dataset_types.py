"""Types of datasets: risk of code execution, and checks of their splits."""
import importlib.util
import inspect
import os
import re
from collections.abc import Iterable

DATASET_TYPES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
TRAIN_SPLITS = ('train', 'training')
VALIDATION_SPLITS = ('val', 'valid', 'validation', 'eval', 'evaluation')
# Default splits. timm uses the whole folder if these subfolders do not exist.
_WHOLE_FOLDER = ('train', 'validation')
_TORCH_FOLDERS = ('image_folder', 'folder')
_TORCH_TWO_SPLITS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist')
# Types that need --data-dir.
NEED_FOLDER = ('torch', 'wds')


def dataset_prefix(name: str) -> str:
    """Return the type in the name TYPE/NAME of a dataset, in lower case; '' for a folder."""
    prefix, separator, _ = (name or '').partition('/')
    return prefix.lower() if separator else ''


def _scripts_run() -> bool:
    """Return whether Hugging Face datasets can run the script of a dataset; True if the package is not installed."""
    if importlib.util.find_spec('datasets') is None:
        return True
    import datasets
    return 'trust_remote_code' in inspect.signature(datasets.load_dataset).parameters


def _is_address(text: str) -> bool:
    """Return whether text is a URL such as pipe:COMMAND or http://HOST. C:\\ is a path."""
    return bool(re.match(r'\s*[A-Za-z][\w+.-]+:', text)) or '::' in text


def code_danger(name: str, root: str | None = None, splits: Iterable[str] = (), trust_remote_code: bool = False) -> str:
    """Describe how opening a dataset can run code; '' if it cannot. `root` and `splits` can be URLs."""
    prefix = dataset_prefix(name)
    if prefix == 'wds':
        is_local = bool(root) and os.path.isdir(root) and not _is_address(root)
        if not is_local or any(':' in split for split in splits):
            return 'webdataset opens URLs such as pipe:, http: and s3: by running a command'
    elif prefix in ('hfds', 'hfids') and (trust_remote_code or _scripts_run()):
        return 'a Hugging Face dataset can run its own script'
    elif prefix == 'tfds' and re.search(r':(?![\d*])', name):
        return 'a community dataset of TensorFlow Datasets runs its own code'
    elif prefix and prefix not in (*DATASET_TYPES, 'demo'):
        return '' if root and os.path.exists(root) else f'{prefix}/ is an unknown type of dataset'
    return ''


def _check_folder_split(root: str, split: str) -> None:
    synonyms = next((names for names in (TRAIN_SPLITS, VALIDATION_SPLITS) if split in names), (split,))
    exists = any(os.path.exists(os.path.join(root, name)) for name in synonyms)
    if exists or split in _WHOLE_FOLDER:
        return
    with os.scandir(root) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    names = ', '.join(folders[:5]) + (', ...' if len(folders) > 5 else '')
    hint = 'An image folder does not support slices. ' if '[' in split else ''
    raise ValueError(
        f'there is no split {split!r}. {hint}The splits of {root} are its subfolders: {names or "it has none"}.')


def check_split(name: str, root: str | None, split: str) -> None:
    """Raise ValueError if a split does not exist and timm would silently use other images instead."""
    prefix, base = dataset_prefix(name), name.rpartition('/')[2].lower()
    if prefix == 'torch' and base in _TORCH_TWO_SPLITS:
        if split not in (*TRAIN_SPLITS, *VALIDATION_SPLITS, 'test'):
            raise ValueError(f'there is no split {split!r}. {name} has the splits train and validation.')
    elif (not prefix or base in _TORCH_FOLDERS or prefix not in (*DATASET_TYPES, 'demo')) and os.path.isdir(root or ''):
        _check_folder_split(root, split)
    elif not prefix and os.path.isfile(root or '') and split not in _WHOLE_FOLDER:
        raise ValueError(f'there is no split {split!r}. {root} is a single file without splits.')
