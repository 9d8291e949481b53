"""Models, datasets and loaders from the options of a run or from a checkpoint."""
