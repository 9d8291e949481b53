"""Functions of other libraries that are not public. A failure shows what to change after an update of the library."""
import inspect
import json

import timm

UPDATE = 'timm has changed: update timm_multimix/common/library_internals.py and its users'


def test_save_config_for_hf(tmp_path):
    from timm_multimix.common.library_internals import save_config_for_hf  # fails here if timm has moved it
    parameters = list(inspect.signature(save_config_for_hf).parameters)
    assert parameters == ['model', 'config_path', 'model_config', 'model_args', 'data_config'], UPDATE
    model = timm.create_model('test_resnet', num_classes=3)
    save_config_for_hf(model, tmp_path / 'config.json', model_config=dict(label_names=['a', 'b', 'c']))
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'test_resnet' and config['num_classes'] == 3, UPDATE
    assert config['label_names'] == ['a', 'b', 'c'] and config['pretrained_cfg']['input_size'], UPDATE
