"""Embedded datasets, image files, class names, two views, and the schedule of MultiMix batches."""
