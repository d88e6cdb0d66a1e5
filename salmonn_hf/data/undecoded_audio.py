"""Columns of audio as the bytes or paths of files, not decoded."""

import io
from contextlib import suppress

import numpy as np
import soundfile

from ..model.audio import SAMPLING_RATE, AudioError, load_audio


def undecoded(dataset, column: str):
    """
    A `datasets.Dataset` (or `IterableDataset`) whose `column` holds `{"bytes", "path"}`.

    Samples in it, `{"array", "sampling_rate"}`, become the bytes of a file of floats.
    """
    from datasets import Audio, IterableDataset, Value

    undecoded = {"bytes": Value("binary"), "path": Value("string")}
    kind = (dataset.features or {}).get(column)
    if isinstance(kind, dict) and {"array", "sampling_rate"} <= set(kind):
        return dataset.map(_as_file, fn_kwargs={"column": column, "dtype": kind["array"].feature.dtype})
    if kind == Value("large_string"):  # as pandas writes; `datasets` casts strings alone to Audio
        dataset = dataset.cast_column(column, Value("string"))
    # Of a stream, `datasets` would encode an Audio column anew, undecoded or not, which needs torchcodec; and
    # decode it when it renames columns, if it were not cast before.
    return dataset.cast_column(column, undecoded if isinstance(dataset, IterableDataset) else Audio(decode=False))


def _as_file(row: dict, column: str, dtype: str) -> dict:
    audio, file = row[column] or {"array": []}, io.BytesIO()
    with suppress(AudioError):  # the clip is then skipped as one of zero length
        waveform = load_audio(audio | {"array": np.asarray(audio["array"], dtype)})
        soundfile.write(file, waveform, SAMPLING_RATE, format="AU", subtype="FLOAT")
    return {column: {"bytes": file.getvalue(), "path": audio.get("path")}}
