"""Copies of base parts in package registries, beside the directories and the hub that the model room knows."""

from ..model.base_part_resolver import BasePartNotFoundError, resolve_base_part
from .registry_copies import REGISTRY_COPIES, find_copy

__all__ = ["REGISTRY_COPIES", "BasePartNotFoundError", "find_copy", "resolve_base_part"]
