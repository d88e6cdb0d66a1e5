"""
Push a checkpoint to the Hugging Face hub, and see that what lies there is what lies here.

    python -m salmonn_hf.push runs/mine user/name
    python -m salmonn_hf.push runs/mine user/name --private --audio clip.wav

Before anything is created on the hub, the checkpoint must be complete, name no path of this machine, and transcribe a
clip with the code that it carries. Then its files go to the hub in one commit, which a process with an empty cache
downloads: every file and the transcript must be the local ones. Base parts and directories inside the checkpoint are
not pushed, nor are hidden files, optimizer states and lists of training data. After an interruption the same command
uploads what is missing.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from filecmp import cmpfiles
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from ..model.adapters import name_adapter_base
from ..model.base_part_resolver import is_complete, is_hub_id, resolve_base_part
from ..model.checkpoint import check_weight_files
from ..model.remote_code import save_code
from ..terminal import command

logger = logging.getLogger(__name__)

# In a clone of the repository; the installed package has no recordings.
DEFAULT_CLIP = Path(__file__).resolve().parents[2] / "eval" / "recordings" / "librivox-austen-880.flac"
NOT_PUSHED = (
    ".*", "*.log", "*tfevents*", "*.lock", "*.tsv", "*.parquet",
    "*.pt", "*.pth", "optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "training_args.bin",
)  # fmt: skip
# Files of an earlier push that would be loaded instead of the new ones, or beside them.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
# It does not import this package, so the checkpoint's own code runs. On the CPU, since training may fill the GPU.
TRANSCRIBE = """
import json, sys
from transformers import pipeline

model, revision, audio = sys.argv[1:]
settings = {"revision": revision or None, "trust_remote_code": True, "device": "cpu"}
try:
    transcriber = pipeline("automatic-speech-recognition", model=model, **settings)
    result = transcriber(audio, generate_kwargs={"do_sample": False})
except Exception as error:
    result = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(result))
"""


class PushError(RuntimeError):
    """The checkpoint was not pushed, or what lies on the hub is not what was pushed; the message says which."""


def push_to_hub(
    directory: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    audio: str | os.PathLike | None = None,
    token: str | None = None,
) -> str:
    """
    Push a checkpoint and verify it, see above; gives the commit's hash.

    Args:
        directory: as `save_pretrained` of model and processor write it.
        repo_id: "user/name"; made if it does not exist.
        private (*optional*): for a repository that is made; default: the account's own.
        audio (*optional*): the clip that is transcribed; default: one of the repository's recordings.
        token (*optional*): default: that of `hf auth login` or HF_TOKEN.

    Raises:
        PushError: naming what stands in the way, or the files that differ, and the remedy.
    """
    directory, audio = Path(directory).expanduser().resolve(), Path(audio or DEFAULT_CLIP).expanduser().resolve()
    check_directory(directory)
    if not audio.is_file():
        raise PushError(f"{audio}, the clip to verify with, does not exist; name one with speech as audio (--audio).")
    save_code(directory)
    files = pushed_files(directory)
    api = HfApi(token=token or get_token())
    if api.token is None:
        raise PushError("Not logged in: run `hf auth login`, or set HF_TOKEN to a token that may write.")
    with explained(f"{repo_id} was not pushed"):
        user = api.whoami()["name"]
        validate_repo_id(repo_id)
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        name_adapter_base(directory, repo_id)
        names = (json.loads((directory / "config.json").read_text()).get("base_parts") or {}).values()
        base_parts = {name: resolve_base_part(name, token=api.token) for name in set(names)}
    size = sum((directory / file).stat().st_size for file in files)
    logger.info("transcribing %s with %s", audio.name, directory)
    with temporary_cache(base_parts) as cache:
        expected = transcribe(str(directory), audio, cache, api.token)

    logger.info("pushing %d files, %.1f MB, to %s as %s", len(files), size / 1e6, repo_id, user)
    with explained(f"{repo_id}, as {user}: the push broke off"):
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private)
        elif private and not api.model_info(repo_id).private:
            raise PushError(f"{repo_id} exists and is public. Make it private in its settings, or leave private out.")
        commit = upload(api, directory, files, repo_id)

    logger.info("verifying %s at %s", repo_id, commit)
    with temporary_cache(base_parts) as cache:
        verify(api, directory, files, repo_id, commit, audio, expected, cache)
    logger.info("%s/%s/tree/%s holds the files of %s: %s", constants.ENDPOINT, repo_id, commit, directory, expected)
    return commit


def check_directory(directory: Path):
    """Check that a directory is a complete SALMONN checkpoint that others can load, without a path of this machine."""
    if not (directory / "config.json").is_file():
        raise PushError(f"{directory} is no checkpoint: it has no config.json. Save model and processor there.")
    config = json.loads((directory / "config.json").read_text())
    if (kind := config.get("model_type")) != "salmonn":
        raise PushError(f"{directory} holds a model of type {kind!r}, not 'salmonn'; push it with `hf upload`.")
    if not is_complete(directory):
        raise PushError(f"{directory} is no complete checkpoint: weights are missing. Save the model there again.")
    if not (directory / "processor_config.json").is_file():
        raise PushError(f"{directory} has no processor_config.json; save the processor there with save_pretrained.")
    try:
        check_weight_files(directory)
    except OSError as error:
        raise PushError(str(error)) from error
    local = [(key, path, "Name a repository of the hub in its place, or remove the key.")
             for key, path in local_paths(config | {"base_parts": None})]  # fmt: skip
    for part, name in (config.get("base_parts") or {}).items():
        if Path(name).expanduser().is_dir() or not is_hub_id(name):
            remedy = f"Upload that part (`hf upload user/part {name}`) and name its repository there, or push a full "
            remedy += "checkpoint, as model.merge_lora().save_pretrained makes it."
            local.append((f"base_parts.{part}", name, remedy))
    for key, path, remedy in local:
        raise PushError(f"{directory / 'config.json'}: {key} is {path!r}, a path of this machine. {remedy}")


def local_paths(value, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys and values of a config's strings that are absolute paths."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from local_paths(inner, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, str) and value.startswith(("/", "~/")) and len(value) > 2:
        yield key, value


def pushed_files(directory: Path) -> list[str]:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in NOT_PUSHED)]


def upload(api: HfApi, directory: Path, files: list[str], repo_id: str) -> str:
    """The hash of a commit with `files` that deletes other weights; without a change it is that of the last commit."""
    # Not upload_folder: with Xet it commits in batches, also after some minutes, and a push that is cut off may leave
    # the config of one model beside the weights of another.
    operations = [CommitOperationAdd(file, str(directory / file)) for file in files]
    stale = set(api.list_repo_files(repo_id)) - set(files)
    operations += [CommitOperationDelete(file) for file in sorted(stale) if any(fnmatch(file, p) for p in WEIGHTS)]
    return api.create_commit(repo_id, operations, commit_message="Upload model and processor").oid


@contextmanager
def temporary_cache(base_parts: dict[str, Path]) -> Iterator[Path]:
    """A directory for caches; the hub's holds the base parts, directories by repository, and nothing else."""
    with TemporaryDirectory() as cache:
        for name, directory in base_parts.items():
            repository = Path(cache, "hub", repo_folder_name(repo_id=name, repo_type="model"))
            for folder in ("refs", "snapshots"):
                (repository / folder).mkdir(parents=True)
            (repository / "refs" / "main").write_text("local")
            (repository / "snapshots" / "local").symlink_to(directory)
        yield Path(cache)


def transcribe(model: str, audio: Path, cache: Path, token: str, revision: str = "") -> str:
    """The transcript of a clip by `pipeline`, in a process of its own with its caches in `cache`."""
    caches = {"HF_HUB_CACHE": "hub", "HF_MODULES_CACHE": "modules", "HF_XET_CACHE": "xet"}
    environment = os.environ | {name: str(cache / folder) for name, folder in caches.items()} | {"HF_TOKEN": token}
    command = [sys.executable, "-c", TRANSCRIBE, model, revision, str(audio)]
    # Not here, where "user/name" might be a directory.
    result = subprocess.run(command, cwd=cache, env=environment, capture_output=True, text=True)
    crash = {"error": f"exit code {result.returncode}\n{result.stderr[-2000:]}"}
    answer = crash if result.returncode else json.loads(result.stdout.splitlines()[-1])
    if "error" in answer:
        raise PushError(f"{model} cannot transcribe {audio}: {answer['error']}")
    return answer["text"]


def verify(api, directory: Path, files: list[str], repo_id: str, commit: str, audio: Path, expected: str, cache: Path):
    """Check that a commit, downloaded anew, has the directory's files and gives the `expected` transcript."""
    text = failure = None
    try:
        text = transcribe(repo_id, audio, cache, api.token, revision=commit)
    except PushError as error:  # a file that differs may well be the reason, and says more
        failure = error
    with explained(f"{repo_id} was pushed as commit {commit}, but could not be verified"):
        # What the pipeline has downloaded is not downloaded again, only the card and the like.
        snapshot = Path(api.snapshot_download(repo_id, revision=commit, cache_dir=cache / "hub"))
    remedy = "Push again; if that does not help, delete the repository and push anew."
    bad_state = f"{repo_id} holds a bad state: at commit {commit}"
    _, differing, missing = cmpfiles(snapshot, directory, files, shallow=False)
    if differing or missing:
        names = ", ".join(differing + missing)
        raise PushError(f"{bad_state}, {names} came back other than in {directory}. {remedy}")
    if failure is not None:
        raise PushError(f"{repo_id} holds the files of {directory}, but does not work: {failure}") from failure
    if text != expected:
        raise PushError(f"{bad_state}, {audio.name} makes {text!r}, in {directory} {expected!r}. {remedy}")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors of the hub and of the connection into a [`PushError`] that says `what` failed and the remedy."""
    try:
        yield
    except PushError:
        raise
    except OfflineModeIsEnabled as error:
        raise PushError(f"{what}: HF_HUB_OFFLINE is set. Unset it.") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = (error.__cause__ or error) if isinstance(error, RuntimeError) else error  # of an upload that failed
        reasons = [f"{type(each).__name__}: {' '.join(str(each).split())}" for each in dict.fromkeys((error, cause))]
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        remedy = f"If {constants.ENDPOINT} can be reached, the same command goes on."
        if status == 401:
            remedy = "The token is not valid, or may not see the repository: run `hf auth login`."
        elif status == 403:
            remedy = "The repository is somebody else's, or the token may not write: choose another name or token."
        elif isinstance(error, ValueError) or (status is not None and status < 500):
            remedy = "The hub refused it."
        raise PushError(f"{what}. {'; '.join(reasons)} {remedy}") from error


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m salmonn_hf.push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIR", help="checkpoint: model, processor and card")
    parser.add_argument("repo_id", metavar="user/name", help="the repository; made if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make it private")
    parser.add_argument("--audio", help="clip to verify with; default: one of eval/recordings")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        commit = push_to_hub(arguments.directory, arguments.repo_id, arguments.private, arguments.audio)
    except PushError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(commit)
    return 0
