"""Any source of audio to one mono float32 waveform at the model's sampling rate."""

import base64
import logging
import os
from collections.abc import Iterable, Mapping
from io import SEEK_END, BytesIO, TextIOBase
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np
import soxr
import torch
from huggingface_hub.utils import httpx
from transformers.utils import is_torchcodec_usable

from .audio_file import AudioFileError, UnknownFormat, audio_streams, sample_blocks
from .downmix import BLOCK_SAMPLES, mix_down

SAMPLING_RATE = 16_000
CONVERSION = "ffmpeg -i INPUT output.flac"
FETCH_TIMEOUT_SECONDS = 30.0
PEAK_LIMIT = 2.0  # of floats: a little over full scale is what resampling or a limiter leaves
INTEGER_PEAK = 64.0  # of floats: more is no gain but samples in the range of integers
MAX_PATH_CHARACTERS = 255  # a longer text that reads as base64 is the file itself


logger = logging.getLogger(__name__)


class AudioError(ValueError):
    """Audio that cannot be used. The message names the input, what is wrong with it, and what to do about it."""


def load_audio(source, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    r"""
    Read audio from wherever it is: any rate, any number of channels, any sample format.

    Args:
        source: one of

            - the path or http(s) URL of a file, the `bytes` of one, or a binary stream. soundfile decodes it; formats
              that it does not know (m4a, mp4, webm) need torchcodec. What is fetched is logged.
            - the file itself as text: a `data:` URI, or base64 alone.
            - an array, tensor or list of floats, already at `sampling_rate`: 1-D, or 2-D with the channels in the
              smaller axis. Integers of 8, 16 or 32 bits are scaled by the range of their type.
            - `{"array": ..., "sampling_rate": ...}`, where `"array"` may be called `"raw"`; or
              `{"bytes": ..., "path": ...}`, as `datasets` gives with `Audio(decode=False)`.
            - a torchcodec `AudioDecoder`, as `datasets` gives by default.
        sampling_rate (`int`): of the result, in Hz.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32: the mean of the channels, less those that would cancel others in
        it, see `downmix.py`; of several joined files, one after the other. Floats up to 2 are taken as they are (full
        scale is [-1, 1]), louder ones scaled down to it. May share memory with `source`.

    Raises:
        AudioError: if there is no such file, it is not audio, is cut short or damaged, or holds more than its header
            tells; if samples are NaN, infinite, or floats in the range of integers, or there are none; or if the type,
            shape or sampling rate of an array is none of the above. Silence is no error.
    """
    if hasattr(source, "get_all_samples"):
        return _from_decoder(source, "the AudioDecoder", sampling_rate)
    if not isinstance(source, Mapping):
        return _load(source, _describe(source), sampling_rate, sampling_rate)

    keys = [key for key in ("array", "raw", "bytes", "path") if source.get(key) is not None]
    if not keys:
        raise AudioError(
            f'The dict with keys {list(source)} holds no audio; give {{"array": ..., "sampling_rate": ...}} or '
            '{"bytes": ..., "path": ...}.'
        )
    audio = source[keys[0]]
    name = str(source["path"]) if source.get("path") else _describe(audio)
    if keys[0] in ("bytes", "path"):
        return _load(audio, name, sampling_rate, sampling_rate)
    rate = source.get("sampling_rate")
    if not isinstance(rate, Real) or rate <= 0:
        raise AudioError(
            f"The sampling_rate of {name} is {rate!r}; give the number of samples per second it was made at."
        )
    return _load(audio, name, rate, sampling_rate)


def _describe(source) -> str:
    if isinstance(source, (str, Path)):
        text = str(source)
        return text if len(text) <= MAX_PATH_CHARACTERS else f"{text[:100]}… ({len(text)} characters)"
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return f"array of shape {tuple(source.shape)}"
    if isinstance(source, (bytes, bytearray, list, tuple)):
        return f"{type(source).__name__} of length {len(source)}"
    return f"{type(source).__name__} object"


def _load(source, name: str, from_rate: float, to_rate: int) -> np.ndarray:
    """`from_rate` is that of a bare array; a file has its own."""
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = _fetch(source)
    elif isinstance(source, str) and (content := file_in_text(source)) is not None:
        source = content
    if isinstance(source, (str, Path)):
        with _open(Path(source)) as stream:
            return _from_stream(stream, name, to_rate)
    if isinstance(source, (bytes, bytearray)):
        return _from_stream(BytesIO(source), name, to_rate)
    if hasattr(source, "read") and hasattr(source, "seek"):
        return _from_stream(source, name, to_rate)
    if isinstance(source, (np.ndarray, torch.Tensor, list, tuple)):
        return _from_array(_to_float_array(source, name), name, from_rate, to_rate)
    raise AudioError(f"{name} is not audio; give a path, URL, bytes, an array, or a dict with an array and its rate.")


def file_in_text(text: str) -> bytes | None:
    """The file that a `data:` URI or a text of base64 holds; `None` for any other text, such as a path."""
    header, comma, payload = text.partition(",")
    is_uri = bool(comma) and header[:5].lower() == "data:"
    if is_uri and not header.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    if not is_uri and len(text) <= MAX_PATH_CHARACTERS:
        return None
    try:
        encoded = unquote_to_bytes(payload) if is_uri else text.encode()
        return base64.b64decode(b"".join(encoded.split()), validate=True)
    except ValueError as error:
        if not is_uri:
            return None
        raise AudioError(f"{header} is not followed by base64 ({error}); encode the whole file.") from error


def _fetch(url: str) -> bytes:
    logger.warning("Fetching %s", url.partition("?")[0])  # what follows may be a key
    try:
        response = httpx.get(url, follow_redirects=True, timeout=FETCH_TIMEOUT_SECONDS)
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise AudioError(
            f"{url} could not be fetched ({error}); check the address, or pass a downloaded file."
        ) from error
    return response.content


def _open(path: Path) -> BinaryIO:
    if os.path.isdir(path):
        raise AudioError(f"{path} is a directory; give the path of one audio file in it.")
    if not os.path.exists(path):  # false too for what cannot be a path, where Path.exists raises
        raise AudioError(f"{_describe(path)} does not exist (looked for it in {Path.cwd()}); check the path.")
    return path.open("rb")


# Files


def _from_stream(stream: BinaryIO, name: str, sampling_rate: int) -> np.ndarray:
    if getattr(stream, "closed", False):
        raise AudioError(f"{name} is closed; give it before it is.")
    if isinstance(stream, TextIOBase) or isinstance(stream.read(0), str):
        raise AudioError(f'{name} is open as text; open it with mode "rb".')
    if stream.seek(0, SEEK_END) == 0:
        raise AudioError(f"{name} is empty (0 bytes) and is not an audio file; get a whole copy of it.")
    try:
        waveforms = [_read_part(part, name, sampling_rate) for part in audio_streams(stream)]
    except UnknownFormat:
        return _from_torchcodec(stream, name, sampling_rate)
    except AudioFileError as error:
        raise AudioError(f"{name} {error}.") from error
    if not waveforms:
        return _from_torchcodec(stream, name, sampling_rate)
    return _checked(waveforms, name)


def _read_part(part, name: str, sampling_rate: int) -> np.ndarray:
    blocks = sample_blocks(part)
    rate, first = next(blocks, (sampling_rate, np.zeros((0, 1), np.float32)))
    return _resampled(chain([mix_down(first)], (mix_down(block) for _, block in blocks)), name, rate, sampling_rate)


def _from_torchcodec(stream: BinaryIO, name: str, sampling_rate: int) -> np.ndarray:
    # An import outside such a condition would make the package a requirement of checkpoints with a copy of this code.
    if is_torchcodec_usable("audio"):
        from torchcodec.decoders import AudioDecoder
    else:
        raise AudioError(
            f"{name} is not an audio file that soundfile can read. For m4a, mp4, webm install torchcodec and FFmpeg; "
            f"or convert it first: {CONVERSION}"
        )
    stream.seek(0)
    try:
        decoder = AudioDecoder(stream.read())
    except (RuntimeError, ValueError) as error:
        raise AudioError(f"{name} is not an audio file ({error}); check what it is.") from error
    return _from_decoder(decoder, name, sampling_rate)


def _from_decoder(decoder, name: str, sampling_rate: int) -> np.ndarray:
    try:
        samples = decoder.get_all_samples()
    except RuntimeError as error:
        raise AudioError(f"{name} is damaged or cut short ({error}); get a whole copy of it.") from error
    return _from_array(samples.data.cpu().numpy(), name, samples.sample_rate, sampling_rate)


# Arrays


def _to_float_array(samples, name: str) -> np.ndarray:
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu()
        samples = (samples.float() if samples.is_floating_point() else samples).numpy()
    elif not isinstance(samples, np.ndarray):
        try:
            samples = np.asarray(samples)
        except ValueError as error:
            raise AudioError(f"The {name} is not one list of numbers ({error}); pass the clips one by one.") from error
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if samples.dtype.kind in "iu" and samples.dtype.itemsize <= 4:
        half_range = 2.0 ** (8 * samples.dtype.itemsize - 1)
        return samples.astype(np.float32) / np.float32(half_range) - np.float32(samples.dtype.kind == "u")
    raise AudioError(
        f"The {name} has dtype {samples.dtype}; give floats in [-1, 1], or integers of 8, 16 or 32 bits at full range."
    )


def _from_array(samples: np.ndarray, name: str, from_rate: float, to_rate: int) -> np.ndarray:
    if samples.ndim not in (1, 2):
        raise AudioError(f"The {name} has {samples.ndim} dimensions; give (samples,) or (channels, samples).")
    if samples.ndim == 1 or samples.size == 0:
        blocks = [samples.reshape(-1)]
    else:
        samples = samples if samples.shape[1] < samples.shape[0] else samples.T
        step = max(1, BLOCK_SAMPLES // samples.shape[1])
        blocks = (mix_down(samples[start : start + step]) for start in range(0, len(samples), step))
    return _checked([_resampled(blocks, name, from_rate, to_rate)], name)


def _resampled(blocks: Iterable[np.ndarray], name: str, from_rate: float, to_rate: int) -> np.ndarray:
    """Consecutive blocks of one waveform put together, at the other rate."""
    parts = []
    resampler = soxr.ResampleStream(from_rate, to_rate, 1, quality="HQ") if from_rate != to_rate else None
    for block in blocks:
        if not np.isfinite(block).all():
            raise AudioError(f"{name} holds NaN or infinite samples; correct what made it.")
        parts.append(block if resampler is None else resampler.resample_chunk(block))
    if resampler is not None:
        parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(parts) if len(parts) > 1 else np.ascontiguousarray(parts[0])


def _checked(waveforms: list[np.ndarray], name: str) -> np.ndarray:
    """Waveforms one behind the other, not far above full scale."""
    waveform = np.concatenate(waveforms) if len(waveforms) > 1 else waveforms[0]
    if len(waveform) == 0:
        raise AudioError(f"{name} has no samples; exclude it, or make the recording again.")
    peak = max(float(waveform.max()), -float(waveform.min()))
    if peak > INTEGER_PEAK:
        raise AudioError(
            f"{name} has floats up to {peak:.6g}, in the range of integers; floats are to be in [-1, 1]. Divide those "
            "of 16 bits by 32768, or give them as int16."
        )
    return waveform if peak <= PEAK_LIMIT else waveform / np.float32(peak)
