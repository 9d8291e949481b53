"""Recipes for --config that are installed with the package, and the command `timm-multimix recipes`."""
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .command_line import Parser, program
from .errors import near_names, usage_errors

_PACKAGE = Path(__file__).parent.parent


def recipes() -> dict[str, Path]:
    """Return the recipe files by name, in alphabetical order."""
    # Installed as timm_multimix.hfconfigs. In a clone and in an editable install the folder is next to the package.
    folder = next(filter(Path.is_dir, (_PACKAGE / 'hfconfigs', _PACKAGE.parent / 'hfconfigs')), _PACKAGE)
    return {path.stem: path for path in sorted(folder.glob('*.yaml'))}


def find_recipe(name: str) -> str:
    """Return the path of a recipe, given its path or its name. Raise ValueError if there is none."""
    if os.path.exists(name):
        return name
    known = recipes()
    if name not in known:
        stem = Path(name).stem
        hint = f' Did you mean {stem}?' if stem in known else near_names(stem, known)
        raise ValueError(
            f'no such file, and no recipe has this name.{hint} `{program("recipes")} list` lists the recipes.')
    return str(known[name])


def main(argv: Sequence[str]) -> int:
    """Run `timm-multimix recipes`: list the recipes, or print one."""
    parser = Parser(
        prog=program('recipes'), description='List the recipes, or print the options of one.',
        epilog=f'example: {program("train")} --config digits_resnet18')
    commands = parser.add_subparsers(dest='command', required=True, metavar='{list,show}')
    commands.add_parser('list', help='print the names and descriptions of the recipes')
    show = commands.add_parser('show', help='print a recipe')
    show.add_argument('name', metavar='NAME', help='name of a recipe, or a YAML file')
    args = parser.parse_args(argv)
    if args.command == 'show':
        with usage_errors(args.name), open(find_recipe(args.name), encoding='utf-8') as file:
            sys.stdout.write(file.read())
        return 0
    known = recipes()
    width = max(map(len, known), default=0)
    for name, path in known.items():
        with open(path, encoding='utf-8') as file:
            print(f'{name:{width}}  {file.readline().lstrip("# ").rstrip()}')
    return 0
