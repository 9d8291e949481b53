"""Errors, atomic file writing, console output and random state, used by the whole package."""
