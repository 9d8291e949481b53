"""Embedded datasets, image files, class names, two views and alternating batches."""
