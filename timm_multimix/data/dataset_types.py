"""Kinds of datasets: which of them can run code, and which splits they have."""
import importlib.util
import inspect
import os
import re
from collections.abc import Iterable

DATASET_TYPES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
TRAIN_SPLITS = ('train', 'training')
VALIDATION_SPLITS = ('val', 'valid', 'validation', 'eval', 'evaluation')
# Without a folder of this name, timm uses the whole folder. These are the defaults of the options.
_WHOLE_FOLDER = ('train', 'validation')
_TORCH_FOLDERS = ('image_folder', 'folder')
_TORCH_TWO_SPLITS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist')


def dataset_prefix(name: str) -> str:
    """The type in a dataset's name TYPE/NAME, in lower case; '' for a folder."""
    prefix, separator, _ = (name or '').partition('/')
    return prefix.lower() if separator else ''


def _scripts_run() -> bool:
    """Whether the installed version of Hugging Face datasets can run a dataset's own script; so assumed if unknown."""
    if importlib.util.find_spec('datasets') is None:
        return True
    import datasets
    return 'trust_remote_code' in inspect.signature(datasets.load_dataset).parameters


def _is_address(text: str) -> bool:
    """Whether text is an address such as pipe:COMMAND or http://HOST, and not a path. C:\\ is a path."""
    return bool(re.match(r'\s*[A-Za-z][\w+.-]+:', text)) or '::' in text


def code_danger(name: str, root: str | None = None, splits: Iterable[str] = (), trust_remote_code: bool = False) -> str:
    """Explain how opening a dataset can run code; '' if it cannot.

    Args:
        name: Name of the dataset as --dataset takes it, '' for a folder.
        root: Its folder or address.
        splits: Names of its splits, which can be addresses too.
        trust_remote_code: Whether the dataset's own code may run.
    """
    prefix = dataset_prefix(name)
    if prefix == 'wds':
        is_local = bool(root) and os.path.isdir(root) and not _is_address(root)
        if not is_local or any(':' in split for split in splits):
            return 'webdataset opens addresses such as pipe:, http: and s3: by running a command'
    elif prefix in ('hfds', 'hfids') and (trust_remote_code or _scripts_run()):
        return 'a Hugging Face dataset may run a script of its own'
    elif prefix == 'tfds' and re.search(r':(?![\d*])', name):
        return 'a community dataset of TensorFlow Datasets runs code of its own'
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
    shown = ', '.join(folders[:5]) + (', ...' if len(folders) > 5 else '')
    wanted = f'Slices such as {split} are for other datasets: a' if '[' in split else 'A'
    raise ValueError(
        f'there is no split {split!r}. {wanted} split of {root} is a folder in it: {shown or "it has none"}.')


def check_split(name: str, root: str | None, split: str) -> None:
    """Check that a split exists, where timm would silently take other images.

    Raises:
        ValueError: if it does not exist.
    """
    prefix, base = dataset_prefix(name), name.rpartition('/')[2].lower()
    if prefix == 'torch' and base in _TORCH_TWO_SPLITS:
        if split not in (*TRAIN_SPLITS, *VALIDATION_SPLITS, 'test'):
            raise ValueError(f'there is no split {split!r}. {name} has the splits train and validation.')
    elif (not prefix or base in _TORCH_FOLDERS or prefix not in (*DATASET_TYPES, 'demo')) and os.path.isdir(root or ''):
        _check_folder_split(root, split)
