"""Where frozen base parts come from: a directory, the hub, or a package registry's copy."""

from .resolver import REGISTRY_COPIES, BasePartNotFoundError, RegistryFetchError, resolve_base_part

__all__ = ["REGISTRY_COPIES", "BasePartNotFoundError", "RegistryFetchError", "resolve_base_part"]
