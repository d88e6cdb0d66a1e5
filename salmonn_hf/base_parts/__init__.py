"""Where frozen base parts come from: a directory, the hub, or a copy in a package registry."""

from ..model.base_part_resolver import BasePartNotFoundError
from .registry_copies import REGISTRY_COPIES
from .resolver import resolve_base_part

__all__ = ["REGISTRY_COPIES", "BasePartNotFoundError", "resolve_base_part"]
