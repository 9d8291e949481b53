"""Logits at every position of a timm model: feature layouts, heads, and the hook that attaches to a model."""
