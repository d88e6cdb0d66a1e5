"""
A frozen base part by name: a directory, or a repository on the hub.

The code that a checkpoint carries knows no other source, and starts no other program. The installed package registers
copies in package registries as well, see `salmonn_hf.base_parts`.
"""

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import get_session, validate_repo_id

logger = logging.getLogger(__name__)

HUB_PROBE_SECONDS = 4.0
# Weight file names of a hub repository, preferred format first: one format is enough, and many repositories hold
# several.
WEIGHT_PATTERNS = {
    "model.safetensors": ["model.safetensors", "model-*-of-*.safetensors"],
    "pytorch_model.bin": ["pytorch_model.bin", "pytorch_model-*-of-*.bin"],
}
OTHER_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja"]

# Pairs of a source and the reason why it did not have a base part, in the order in which they were tried.
Tried = list[tuple[str, str]]


class BasePartNotFoundError(OSError):
    """No source has the base part `name`; `tried` lists the sources, each with the reason, in order."""

    def __init__(self, name: str, tried: Tried, remedy: str):
        self.name = name
        self.tried = tried
        attempts = "".join(f"\n  - {source}: {why}" for source, why in tried)
        super().__init__(f"base part {name!r} was not found. Tried:{attempts}\n{remedy}")


# Finds a part in a copy from a package registry, `(name, tried, fetch)` to a directory or None; of the package alone.
_find_copy: Callable[[str, Tried, bool], Path | None] | None = None


def register_copies(find_copy: Callable[[str, Tried, bool], Path | None]):
    """Let `find_copy` be asked as well from now on: with `fetch` False before the hub, with True after it."""
    global _find_copy
    _find_copy = find_copy


def resolve_base_part(
    name: str | os.PathLike, local_files_only: bool = False, token: str | bool | None = None, cache_dir=None
) -> Path:
    """
    Find or fetch a base part and return a directory that `from_pretrained` loads.

    Looked at in this order: a local directory, the hub's cache, the package's cache of converted copies, the hub
    (after a reachability probe of at most `HUB_PROBE_SECONDS`), and the package registries. So a second run on a
    machine without a hub touches no network. Without the package there are no copies.

    Args:
        name: a directory with config.json and weights, or a repository such as "openai/whisper-base.en".
        local_files_only: look at what is on this machine and fetch nothing. HF_HUB_OFFLINE=1 skips only the hub.
        token, cache_dir (*optional*): of the hub, as for `snapshot_download`.

    Raises:
        BasePartNotFoundError: nothing had it; the message says what was tried and what to do.
    """
    name, tried = os.fspath(name), []
    found = from_directory(name, tried)
    if found is None and is_hub_id(name):
        found = from_hub_cache(name, tried, cache_dir) or (_find_copy and _find_copy(name, tried, False))
        if found is None and not local_files_only:
            found = from_hub(name, tried, token, cache_dir) or (_find_copy and _find_copy(name, tried, True))
    if found is not None:
        return found
    remedy = "Give the path of a directory that holds config.json, weights and tokenizer or preprocessor files"
    if is_hub_id(name):
        remedy += f", such as one made by `hf download {name} --local-dir DIR` on a machine that reaches the hub"
    if local_files_only:
        remedy += ", or allow downloads: local_files_only was given, so nothing was fetched"
    elif _find_copy is None:
        remedy += ", or install the package salmonn_hf, which knows copies of some parts in package registries"
    raise BasePartNotFoundError(name, tried, f"{remedy}.")


def from_directory(name: str, tried: Tried) -> Path | None:
    directory = Path(name).expanduser()
    if is_complete(directory):
        return directory
    missing = "lacks config.json or weights (safetensors or pytorch_model.bin)"
    tried.append((f"local directory {directory}", missing if directory.is_dir() else "does not exist"))
    return None


def is_complete(directory: Path) -> bool:
    """Whether a directory holds config.json and all of its weight files (every shard its index names)."""
    if not (directory / "config.json").is_file():
        return False
    for weights in WEIGHT_PATTERNS:
        if (directory / weights).is_file():
            return True
        index = directory / f"{weights}.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            return all((directory / shard).is_file() for shard in shards)
    return False


def is_hub_id(name: str) -> bool:
    """Whether a name could be a repository's on the hub: "user/name"."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def from_hub_cache(name: str, tried: Tried, cache_dir=None) -> Path | None:
    # snapshot_download(local_files_only=True) would miss snapshots that, like ours, leave out repeated formats.
    config = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir)
    if not isinstance(config, str):
        tried.append(("hub cache", "not there"))
        return None
    directory = Path(config).parent
    # A model loaded without its tokenizer or feature extractor leaves a snapshot that has weights only.
    front_files = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
    if is_complete(directory) and any((directory / file).is_file() for file in front_files):
        return directory
    tried.append(("hub cache", f"incomplete in {directory}"))
    return None


def from_hub(name: str, tried: Tried, token: str | bool | None = None, cache_dir=None) -> Path | None:
    source = f"hub {constants.ENDPOINT}"
    if constants.is_offline_mode():
        tried.append((source, "skipped, because HF_HUB_OFFLINE is set"))
        return None
    if (reason := hub_unreachable(constants.ENDPOINT)) is not None:
        tried.append((source, reason))
        logger.info("%s: %s", source, reason)
        return None
    logger.info("fetching %s from the %s", name, source)
    try:
        files = HfApi(token=token).list_repo_files(name)
        weights = next((w for w in WEIGHT_PATTERNS if w in files or f"{w}.index.json" in files), None)
        if weights is None:
            tried.append((source, f"the repository has neither {' nor '.join(WEIGHT_PATTERNS)}"))
            return None
        patterns = {"allow_patterns": OTHER_PATTERNS + WEIGHT_PATTERNS[weights], "ignore_patterns": ["*/*"]}
        directory = Path(snapshot_download(name, token=token, cache_dir=cache_dir, **patterns))
    except (HTTPError, OSError) as error:  # a connection that breaks, a refusal, a name that the hub does not know
        tried.append((source, _one_line(error)))
        return None
    if is_complete(directory):
        return directory
    tried.append((source, "the repository lacks config.json or a part of its weights"))
    return None


def hub_unreachable(endpoint: str, seconds: float = HUB_PROBE_SECONDS) -> str | None:
    """
    Why `endpoint` does not answer within `seconds`, or None when it does.

    Runs in a thread of its own, because name resolution obeys no time-out of the HTTP client's.
    """
    outcome: list[str | None] = []

    def probe() -> None:
        try:
            status = get_session().head(endpoint, timeout=seconds).status_code
        except Exception as error:  # noqa: BLE001 - whatever it is, the hub did not answer, and the caller is told why
            outcome.append(f"not reachable: {_one_line(error)}")
        else:
            outcome.append(f"answers with HTTP status {status}" if status >= 500 else None)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"not reachable: no answer in {seconds:g} s"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
