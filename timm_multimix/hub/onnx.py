"""Export of a model folder to ONNX, with a dynamic batch size."""
import logging
import os
from pathlib import Path

import torch
from timm.models import create_model
from torch import nn

from ..build.hub_files import HubError

ONNX_NAME = 'model.onnx'
_BATCH_SIZES = (1, 8)
_TOLERANCE = 1e-3  # largest difference of two logits, relative to the largest logit if that is greater than 1


def write_onnx(folder: str | os.PathLike, verify: bool = False) -> None:
    """Write model.onnx for the model in a folder, with the input 'images' and the output 'logits'.

    With `verify`, compare the outputs of onnxruntime with the outputs of the model.

    Raises:
        HubError: if PyTorch cannot export the model, or if the outputs differ.
    """
    model = create_model(f'local-dir:{Path(folder).absolute()}', pretrained=True).eval()
    path = os.path.join(folder, ONNX_NAME)
    images = torch.zeros(2, *model.pretrained_cfg['input_size'])
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    try:
        torch.onnx.export(
            model, (images,), path, dynamo=True, input_names=['images'], output_names=['logits'],
            dynamic_shapes=({0: torch.export.Dim('batch', min=1)},), external_data=False, verbose=False)
    except Exception as error:  # the exporter raises exceptions of many types
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        raise HubError(f'PyTorch cannot export this model to ONNX: {reason}') from error
    if verify:
        _verify(model, path, images.shape[1:])


@torch.no_grad()
def _verify(model: nn.Module, path: str, input_size: tuple[int, ...]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    generator = torch.Generator().manual_seed(0)
    for batch_size in _BATCH_SIZES:
        images = torch.randn(batch_size, *input_size, generator=generator)
        expected = model(images)
        logits = torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])
        difference = (logits - expected).abs().max().item() if logits.shape == expected.shape else float('nan')
        if not difference <= _TOLERANCE * max(1.0, expected.abs().max().item()):
            raise HubError(
                f'The outputs of {ONNX_NAME} for a batch of {batch_size} differ from the outputs of the model by '
                f'{difference:.2g}.')
