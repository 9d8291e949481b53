"""Embedded datasets, image files, class names, two views and batches that alternate."""
