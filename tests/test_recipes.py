"""Every recipe parses without a warning, builds its model and takes two steps."""
from pathlib import Path

import pytest
import torch
import yaml
from training_helpers import make_images

from timm_multimix.options import build_training_parser, preset_options
from timm_multimix.training.config import parse_args, read_config
from timm_multimix.training.loop import train_epoch
from timm_multimix.training.run import build_run

RECIPES = sorted((Path(__file__).parent.parent / 'hfconfigs').glob('*.yaml'))


def test_there_are_recipes():
    assert len(RECIPES) >= 9


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, tmp_path, caplog, monkeypatch):
    lines = recipe.read_text().splitlines()
    assert lines[0].startswith('# ') and lines[1].startswith('# Checked: ')
    assert f'train --config {recipe.stem}' in '\n'.join(lines[:7])
    recipe_options = yaml.safe_load(recipe.read_text())
    assert read_config(str(recipe), build_training_parser()) == recipe_options
    assert recipe_options['multimix'] == 'dense'
    if recipe.stem.endswith('_paper'):  # the values are written out, and are those of the preset
        assert recipe_options.items() >= preset_options('paper').items()

    images = make_images(tmp_path, count=3, size=64)
    # Only what ties a recipe to its data and its machine is replaced.
    args = parse_args([
        '--config', str(recipe), '--data-dir', str(images), '--dataset', '', '--val-split', '', '--img-size', '64',
        '--batch-size', '4', '--workers', '0', '--device', 'cpu', '--multimix-n', '30', '--eval-metric', 'loss',
        '--output', str(tmp_path / 'output')])
    assert not caplog.records
    args.pretrained = False
    state = build_run(args)
    setup, averages = state.setup, train_epoch(state)
    assert setup.updates_per_epoch == 2
    assert 'loss' in averages and set(averages) <= {'loss', 'dense', 'pooled', 'clean', 'plain', 'top1', 'unreadable'}
    assert all(torch.isfinite(p).all() for p in setup.task.parameters())
