"""A frozen base part by name: a directory, or a repository on the hub.

A checkpoint's own code knows no other source. The installed package registers a resolver that knows package registries
as well, see `salmonn_hf.base_parts`.
"""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download


def directory_or_hub(name: str) -> Path:
    """
    The directory `name`, or that of the hub's repository `name`, downloaded once.

    Raises:
        OSError: if the hub cannot be reached or has no such repository.
    """
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name))


_resolver: Callable[[str], Path] = directory_or_hub


def register_resolver(resolver: Callable[[str], Path]):
    """Let `resolver` find base parts from now on."""
    global _resolver
    _resolver = resolver


def resolve_base_part(name: str) -> Path:
    """The directory that holds a base part's config, weights and tokenizer or preprocessor files."""
    return _resolver(name)
