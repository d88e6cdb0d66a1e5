"""The test files of the pinned transformers: in its source archive on PyPI, and in no package that pip installs."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers
from filelock import FileLock

VERSION = "5.23.0"
SHA256 = "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"


def directory() -> Path:
    """A directory that holds the package `transformers_tests`, made at the first call."""
    if transformers.__version__ != VERSION:
        raise RuntimeError(
            f"transformers {transformers.__version__} is installed; the contract is that of {VERSION}. Install that, "
            f"or name the new version and its checksum in {__file__}."
        )
    cache = Path(os.environ.get("SALMONN_CACHE") or "~/.cache/salmonn_hf").expanduser()
    final = cache / f"transformers-{VERSION}-tests"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{final.name}.lock"):
        if not final.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as partial:
                unpack(download(Path(partial)), Path(partial) / "unpacked" / "transformers_tests")
                (Path(partial) / "unpacked").rename(final)
    return final


def download(target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    command += ["--dest", str(target), f"transformers=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"The source archive of transformers {VERSION} could not be had from the package index, and with it the "
            f"tests that a model of transformers must pass. `{' '.join(command)}` said:\n{done.stderr.strip()}"
        )
    archive = target / f"transformers-{VERSION}.tar.gz"
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256:
        raise RuntimeError(f"{archive.name} has sha256 {found}, expected {SHA256}.")
    return archive


def unpack(archive: Path, target: Path):
    """The files `tests/*.py` of the archive, as a package, which goes on in `stand_ins`."""
    target.mkdir(parents=True)
    (target / "__init__.py").touch()
    with tarfile.open(archive) as tar:
        for member in tar:
            *_, folder, name = Path(member.name).parts if "/" in member.name else ("", "", "")
            if member.isfile() and folder == "tests" and name.endswith(".py"):
                (target / name).write_bytes(tar.extractfile(member).read())


if __name__ == "__main__":
    try:
        print(directory())
    except RuntimeError as error:
        sys.exit(str(error))
