"""Transfer of a trained backbone to object detection: torchvision's detectors on timm backbones, measured by mAP."""
from .main import main

__all__ = ['main']
