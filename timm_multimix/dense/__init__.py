"""Logits at every position of the feature map of a timm model."""
