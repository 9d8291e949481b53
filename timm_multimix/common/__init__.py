"""Errors, file operations, console output and random state for the whole package."""
