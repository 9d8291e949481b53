"""Convert messages of libraries to terms of the command line, and report missing packages."""
import re
from collections.abc import Sequence
from importlib.util import find_spec

# Python code in messages of timm, torchvision and datasets, and the equivalent option.
_OPTIONS_FOR_ADVICE = (
    (r'`?\bdownload ?= ?True`?', '--dataset-download'),
    (r'`?\btrust_remote_code ?= ?True`?', '--dataset-trust-remote-code'),
    (r'Use `pretrained=False` for random init', 'Leave out --pretrained to start from random weights'),
    (r"`?\bglobal_pool=''`?", "--gp ''"),
    (r"\basl_reduction='(\w+)'", r'--asl-reduction \1'),
    (r'\bjsd_splits\b', '--aug-splits'),
    (r'\bclass_counts and num_samples \(see class_weights\.py\)', '--class-stats'),
    (r'\bclass stats \(see class_weights\.py\)', '--class-stats'),
    (r' ?See `torch._dynamo.list_backends\(\)` for available backends\.', ''),
    (r"\(loss(?:_type=| )'bce'\) with targets \(b, 1\)", '(--loss bce)'),
    (r'(?s)`?\bweights_only=True`? blocked loading .*',
     'the file contains objects that are not data, such as code. They are never loaded.'),
    (r"\bCurrently only 'kl' is supported\b", '--kd-loss-type must be kl'),
)

# Packages that a type of dataset needs in addition to timm's.
DATASET_PACKAGES = {
    'hfds': ('datasets',),
    'hfids': ('datasets',),
    'tfds': ('tensorflow', 'tensorflow-datasets'),
    'wds': ('webdataset',),
}


def for_command_line(message: str) -> str:
    """Replace Python code in the message of a library by the equivalent option."""
    for advice, option in _OPTIONS_FOR_ADVICE:
        message = re.sub(advice, option, message)
    return message


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package.replace('-', '_')) is not None
    except (ImportError, ValueError):  # a blocked or incompletely imported package
        return False


def missing_packages(purpose: str, packages: Sequence[str], extra: str | None = None) -> str | None:
    """Describe packages that are not installed.

    Args:
        purpose: Option or feature that needs the packages.
        packages: Names of the packages for pip.
        extra: Extra of timm-multimix that installs the packages, if there is one.

    Returns:
        One sentence with the command that installs the missing packages; None if all are installed.
    """
    missing = [package for package in packages if not _is_installed(package)]
    if not missing:
        return None
    command = f"pip install 'timm-multimix[{extra}]'" if extra else f'pip install {" ".join(missing)}'
    if len(missing) == 1:
        return f'{purpose} needs the package {missing[0]}, which is not installed: {command}'
    return f'{purpose} needs the packages {" and ".join(missing)}, which are not installed: {command}'
