"""Encoder features cached on disk: the frozen encoders run once per clip, not once per epoch."""

import hashlib
import json
import os
import uuid
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import complete_or_absent

# What the features depend on. How the extractor was loaded is not among it.
FEATURE_SETTINGS = (
    "feature_size sampling_rate n_fft hop_length dither tail_seconds pad_to_30_seconds return_input_values"
).split()
READING = 2  # counted up when `load_audio` gives other samples of the same file


def encoder_identity(model, feature_extractor) -> str:
    """Names the features of these encoders: other weights, precision or feature settings, another name."""
    settings = {name: getattr(feature_extractor, name) for name in FEATURE_SETTINGS}
    settings |= {"sound_layers": model.config.sound_layers, "reading": READING}
    frozen = tuple(f"projector.{name}" for name in model.projector.transcribing_parameters)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("audio_tower.", "sound_tower.", *frozen)):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:24]


def clip_key(row: dict, speed: float = 1.0) -> str:
    """Names a clip by its audio: the bytes of its files and how fast they are played."""
    digest = hashlib.sha256(repr(float(speed)).encode())
    for audio in [row["audio"], *({"bytes": None, "path": path} for path in row.get("expand_wav") or ())]:
        data = audio["bytes"] if audio["bytes"] is not None else Path(audio["path"]).read_bytes()
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:32]


@lru_cache(maxsize=64)  # memory-mapped at a time
def open_shard(file: Path) -> tuple:
    """A shard's file, and which tensors each of its clips has."""
    shard = safe_open(file, "pt")
    return shard, json.loads(shard.metadata()["clips"])


class FeatureCache:
    """
    What `SalmonnModel.encode_audio` gives for a clip, by its key (see `clip_key`): a dictionary of tensors without
    padding, `audio_frames` `(frames, width)` and, with a sound encoder, `sound_frames`, see `encode_clips`.

    Clips are written in shards, safetensors files that appear once they are complete: a killed process loses the clips
    of its unfinished shard only. Any number of processes may write, each its own shards, and read those of all.

    Args:
        root: directory, which other encoders' features may share, and the limit with them.
        identity: of the encoders, see `encoder_identity`.
        max_gigabytes: of all shards under `root` (10⁹ bytes), of which the oldest are removed beyond it.

    Raises:
        OSError: if `root` cannot be written.
    """

    def __init__(self, root: str | Path, identity: str, max_gigabytes: float = 50.0, shard_megabytes: float = 32.0):
        self.root, self.directory = Path(root), Path(root) / identity
        self.max_bytes, self.shard_bytes = max_gigabytes * 1e9, shard_megabytes * 1e6
        self.pending, self.pending_bytes = {}, 0
        self.shards: dict[str, str] = {}  # of each clip
        self.seen, self.scanned_at = set(), None
        self.directory.mkdir(parents=True, exist_ok=True)

    def __getstate__(self):  # for worker processes
        return self.__dict__ | {"pending": {}, "pending_bytes": 0}

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a clip, or `None` if they are not there."""
        if key in self.pending:
            return self.pending[key]
        if key not in self.shards:
            self._scan()
            if key not in self.shards:
                return None
        try:
            shard, clips = open_shard(self.directory / self.shards[key])
            return {name: shard.get_tensor(f"{key}.{name}") for name in clips[key]}
        except (OSError, SafetensorError):  # removed by another process, or damaged
            self._forget(self.shards[key])
            return None

    def put(self, key: str, tensors: dict[str, torch.Tensor]):
        if key in self.pending or key in self.shards:
            return
        self.pending[key] = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self.pending_bytes += sum(tensor.nbytes for tensor in self.pending[key].values())
        if self.pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self):
        """Write the clips of the unfinished shard."""
        if not self.pending:
            return
        name = f"{uuid.uuid4().hex}.safetensors"
        tensors = {f"{key}.{part}": value for key, parts in self.pending.items() for part, value in parts.items()}
        clips = {key: list(parts) for key, parts in self.pending.items()}
        try:
            with complete_or_absent(self.directory / name) as partial:
                save_file(tensors, partial, metadata={"clips": json.dumps(clips)})
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Cannot write {self.pending_bytes / 1e6:.0f} MB to the feature cache {self.directory} ({error}). "
                "Free space, lower feature_cache_gigabytes, or name another directory as feature_cache."
            ) from error
        self.shards |= dict.fromkeys(self.pending, name)
        self.seen.add(name)
        self.pending, self.pending_bytes = {}, 0
        self._remove_oldest()

    def _remove_oldest(self):
        files = []
        for file in self.root.glob("*/*.safetensors"):
            with suppress(FileNotFoundError):  # removed by another process
                status = file.stat()
                files.append((status.st_mtime_ns, status.st_size, file))
        excess, files = sum(size for _, size, _ in files) - self.max_bytes, sorted(files)
        while excess > 0 and files:
            _, size, file = files.pop(0)
            file.unlink(missing_ok=True)
            if file.parent == self.directory:
                self._forget(file.name)
            excess -= size

    def _scan(self):
        """Find shards that other processes have written since."""
        changed = os.stat(self.directory).st_mtime_ns
        if changed == self.scanned_at:
            return
        self.scanned_at = changed
        for name in {file.name for file in self.directory.glob("*.safetensors")} - self.seen:
            self.seen.add(name)
            with suppress(OSError, SafetensorError):
                _, clips = open_shard(self.directory / name)
                self.shards |= {key: name for key in clips if key not in self.shards}

    def _forget(self, name: str):
        open_shard.cache_clear()  # an open file that was removed still takes its place on the disk
        self.shards = {key: shard for key, shard in self.shards.items() if shard != name}
