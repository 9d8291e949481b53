"""Functions of other libraries that are not public. tests/test_library_internals.py checks that they still exist.

Each has a comment with the reason why no public function replaces it.
"""
# Writes timm's config.json. The public functions save_for_hf and push_to_hf_hub write a config.json too, but also a
# pickle of the weights, and they cannot save weights in the channels_last memory format.
from timm.models._hub import save_config_for_hf

__all__ = ['save_config_for_hf']
