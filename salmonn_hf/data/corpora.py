"""
Training data as others publish it: annotation files and corpora on disk, read row by row.

Each reader is a generator of examples, in the form that Parquet files for training have:

    {"audio": {"bytes": None, "path": str}, "text": str or None, "task": str, "question": str, "source": str}

`task` is one of SALMONN's task names, `question` is "" where the task has none, `source` says which corpus and split
it is. Where a corpus tells them, a row also has `language` (of the text), `testset_id`, and, if its clip is not one
whole file, `start` and `end` (seconds into the file) with `clip_id` (the name of that part), or `expand_wav` (files
that follow the first): `read_clip` gives the clip of any row.

A reader holds one entry of its corpus at a time, and opens no audio. Entries that are no example go to
`drop(path, reason, detail)`, which by default raises; nothing is put in their place. Whether a clip is there, readable
and of the right length is for `clip_seconds` to say.
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import ijson
import numpy as np
import soundfile

from ..model.audio import BLOCK_FRAMES, SAMPLING_RATE, UNKNOWN_FRAMES, AudioError, _ForwardReader, load_audio

EXPAND_SILENCE = SAMPLING_RATE // 10  # samples between the files of `expand_wav`
END_TOLERANCE_SECONDS = 0.1  # annotated ends are rounded


class CorpusError(ValueError):
    """A corpus that is not there or not in its published form. The message names the path and what to do about it."""


class UnusableClip(ValueError):
    """One clip that cannot be trained on: `reason`, the same few words for every such clip, and `detail`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


Drop = Callable[[str, str, str], None]


def refuse(path: str, reason: str, detail: str):
    raise CorpusError(f"{path}: {UnusableClip(reason, detail)}; mend it, or leave such entries out with `drop`.")


def example(path, text, task: str, source: str, question: str = "", **optional) -> dict:
    audio = {"bytes": None, "path": str(path)}
    return {"audio": audio, "text": text, "task": task, "question": question, "source": source, **optional}


# Files


def require_file(path: Path, remedy: str) -> Path:
    if not path.is_file():
        raise CorpusError(f"{path} does not exist; {remedy}.")
    return path


def require_directory(path: Path, remedy: str) -> Path:
    if not path.is_dir():
        raise CorpusError(f"{path} is not a directory; {remedy}.")
    return path


def json_items(path: Path, key: str) -> Iterator:
    """The items of the list under `key` of a JSON file, without ever holding more than one of them."""
    item = None
    with path.open("rb") as file:
        try:
            for item in ijson.items(file, f"{key}.item", use_float=True):
                yield item
        except ijson.JSONError as error:
            raise CorpusError(
                f"{path} is not valid JSON ({str(error).splitlines()[0]}); if it is whole, look for NaN, which JSON "
                "writes as null."
            ) from error
    if item is None:
        raise CorpusError(f"{path} has no items under {key!r}; check that it is the file that is meant.")


def csv_rows(path: Path, columns: list[str], drop: Drop) -> Iterator[dict]:
    """The rows of a CSV file that has at least these columns, less the rows that end before them."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = reader.fieldnames or []
        if missing := [column for column in columns if column not in found]:
            raise CorpusError(f"{path} has no column {', '.join(missing)}; it has {found}. Use the published file.")
        for row in reader:
            if any(row[column] is None for column in columns):
                drop(f"{path}#{reader.line_num}", "incomplete entry", str(row)[:200])
                continue
            yield row


# Readers


def annotation(path: str | Path, prefix: str = "", drop: Drop = refuse) -> Iterator[dict]:
    """
    A SALMONN annotation file: `{"annotation": [{"path", "text", "task", "Q", "expand_wav"}, ...]}`.

    As in the reference (`dataset.py` of bytedance/SALMONN; nota-github/audiolm-trainer adds the prefix and
    `testset_id`), `task` is "asr" and `Q` "" where they are not given, and the files of `expand_wav` follow the first
    with 0.1 s of silence before each. The reference's padding to 1 s and its cut at 30 s are not applied.

    Args:
        prefix: directory that the paths are under, with or without a slash at their front. By default they are taken
            as they are.
    """
    path = require_file(Path(path), "give the path of the annotation JSON")

    def under_prefix(name: str) -> str:
        return os.path.join(prefix, name.lstrip("/")) if prefix else name

    for number, entry in enumerate(json_items(path, "annotation")):
        files = [entry.get("path"), *(entry.get("expand_wav") or [])] if isinstance(entry, dict) else [None]
        if not all(isinstance(file, str) and file for file in files):
            drop(f"{path}#{number}", "no path", str(entry)[:200])
            continue
        folders = files[0].strip("/").split("/")[:-1]
        optional = {key: entry[key] for key in ("testset_id", "language") if entry.get(key) is not None}
        if len(files) > 1:
            optional["expand_wav"] = [under_prefix(file) for file in files[1:]]
        yield example(
            under_prefix(files[0]),
            entry.get("text"),
            str(entry.get("task") or "asr"),
            folders[0] if prefix and folders else path.stem,
            str(entry.get("Q") or ""),
            **optional,
        )


def librispeech(root: str | Path, split: str | None = None, drop: Drop = refuse) -> Iterator[dict]:
    """
    LibriSpeech: `{split}/{speaker}/{chapter}/{speaker}-{chapter}-{utterance}.flac` with one `.trans.txt` a chapter, as
    unpacked from https://www.openslr.org/12 (its README.TXT tells the format). The transcripts are all capitals; they
    are given in lower case, for which a language model's tokenizer has words.

    Args:
        root: the directory `LibriSpeech`, which holds the splits.
        split: e.g. "train-clean-100"; by default all that are there.
    """
    root = require_directory(Path(root), "give the directory LibriSpeech, which holds train-clean-100 and so on")
    splits = [split] if split else sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    found = False
    for name in splits:
        require_directory(root / name, f"unpack {name}.tar.gz of https://www.openslr.org/12 there")
        for transcripts in sorted((root / name).glob("*/*/*.trans.txt")):
            found = True
            for line in transcripts.read_text(encoding="utf-8").splitlines():
                utterance, _, text = line.strip().partition(" ")
                if not utterance:
                    continue
                yield example(
                    transcripts.with_name(f"{utterance}.flac"),
                    text.lower(),
                    "asr",
                    f"LibriSpeech/{name}",
                    language="en",
                )
    if not found:
        raise CorpusError(
            f"{root / (split or '*')} holds no {{speaker}}/{{chapter}}/*.trans.txt; check the directory."
        )


GIGASPEECH_SUBSETS = ("XS", "S", "M", "L", "XL", "DEV", "TEST")
GIGASPEECH_PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
GIGASPEECH_GARBAGE = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")


def gigaspeech_text(text_tn: str) -> str:
    """
    GigaSpeech's `text_tn` as text: its four punctuation tags become signs, its capitals lower case.

    Raises:
        UnusableClip: for a garbage utterance, which is no speech, or an unknown tag.
    """
    text = ""
    for token in text_tn.split():
        if token in GIGASPEECH_GARBAGE:
            raise UnusableClip("garbage utterance", token)
        if token in GIGASPEECH_PUNCTUATION:
            text += GIGASPEECH_PUNCTUATION[token] if text else ""
        elif token.startswith("<"):
            raise UnusableClip("unknown tag", token)
        else:
            text += " " * bool(text) + token.lower()
    return text


def gigaspeech(root: str | Path, split: str = "XL", drop: Drop = refuse) -> Iterator[dict]:
    """
    GigaSpeech: `GigaSpeech.json` and the hour-long Opus files that it names (https://github.com/SpeechColab/GigaSpeech,
    "Metadata walkthrough" and "Text Pre-Processing" of the README). Each segment is a row with `start` and `end`, its
    `begin_time` and `end_time`, and `clip_id`, its `sid`. Clips that were cut beforehand are read by `annotation`.

    Args:
        split: a subset, "XS" to "XL", "DEV" or "TEST". Each training subset holds the smaller ones.
    """
    root = Path(root)
    path = require_file(root / "GigaSpeech.json", "give the directory that holds it and `audio`")
    if split not in GIGASPEECH_SUBSETS:
        raise CorpusError(f"{path} has no subset {split!r}; there are {', '.join(GIGASPEECH_SUBSETS)}.")
    for recording in json_items(path, "audios"):
        file = root / recording["path"]
        for segment in recording.get("segments", ()):
            if f"{{{split}}}" not in segment.get("subsets", ()):
                continue
            name = segment.get("sid")
            try:
                part = {"start": float(segment["begin_time"]), "end": float(segment["end_time"]), "clip_id": name}
                text = gigaspeech_text(segment["text_tn"])
            except KeyError:
                drop(f"{file}#{name}", "incomplete entry", str(segment)[:200])
                continue
            except UnusableClip as clip:
                drop(f"{file}#{name}", clip.reason, clip.detail)
                continue
            yield example(file, text, "asr", f"GigaSpeech/{split}", language="en", **part)


def audiocaps(root: str | Path, split: str = "train", drop: Drop = refuse) -> Iterator[dict]:
    """
    AudioCaps: `{split}.csv` with the columns audiocap_id, youtube_id, start_time, caption
    (https://github.com/cdjkim/audiocaps, `dataset/`), and the clips in `{split}/`, named by their YouTube id, as
    `{youtube_id}`, `Y{youtube_id}` (AudioSet's way) or `{youtube_id}_{start_time}`, .wav or .flac. Many videos are
    gone from YouTube: rows without a file are dropped.

    Args:
        split: "train", "val" or "test"; in the latter two a clip has five rows, one a caption.
    """
    root = Path(root)
    path = root / f"{split}.csv"
    if not path.exists():
        path = require_file(root / "dataset" / f"{split}.csv", "take it from https://github.com/cdjkim/audiocaps")
    clips = require_directory(root / split, f"put the clips of {path.name} there, named by their youtube_id")
    for row in csv_rows(path, ["youtube_id", "start_time", "caption"], drop):
        video = row["youtube_id"]
        names = [name + suffix for name in (video, f"Y{video}", f"{video}_{row['start_time']}") for suffix in SUFFIXES]
        file = next((clips / name for name in names if (clips / name).exists()), None)
        if file is None:
            drop(str(clips / names[0]), "missing", "nor under the corpus's other names")
            continue
        yield example(file, row["caption"], "audiocaption", f"AudioCaps/{split}", language="en")


SUFFIXES = (".wav", ".flac")


def clotho(root: str | Path, split: str = "development", drop: Drop = refuse) -> Iterator[dict]:
    """
    Clotho 2.1: `clotho_captions_{split}.csv` with the columns file_name, caption_1 to caption_5, and the clips in
    `{split}/` (https://zenodo.org/records/4783391). Each clip gives five rows, one a caption.

    Args:
        split: "development", "validation" or "evaluation".
    """
    root = Path(root)
    path = require_file(root / f"clotho_captions_{split}.csv", "take it from https://zenodo.org/records/4783391")
    clips = require_directory(root / split, f"unpack clotho_audio_{split}.7z there")
    captions = [f"caption_{number}" for number in range(1, 6)]
    for row in csv_rows(path, ["file_name", *captions], drop):
        for caption in captions:
            yield example(clips / row["file_name"], row[caption], "audiocaption", f"Clotho/{split}", language="en")


WAVCAPS_ANNOTATIONS = {
    "AudioSet_SL": "as_final.json",
    "BBC_Sound_Effects": "bbc_final.json",
    "FreeSound": "fsd_final.json",
    "SoundBible": "sb_final.json",
}


def wavcaps(
    root: str | Path, split: str | None = None, blacklist: str | Path | None = None, drop: Drop = refuse
) -> Iterator[dict]:
    """
    WavCaps: `json_files/{subset}/*_final.json` with `{"data": [{"id", "caption", "duration", ...}]}` and the clips,
    `{subset}/{id}.flac` or, as the archives name the directory, `{subset}_flac/{id}.flac`
    (https://huggingface.co/datasets/cvssp/WavCaps). The ids of AudioSet_SL end in ".wav", their files in ".flac".

    Args:
        split: one of the subsets AudioSet_SL, BBC_Sound_Effects, FreeSound, SoundBible; by default all four.
        blacklist: one of the corpus's `json_files/blacklist/*.json`. Its clips, which are also in the test sets of
            AudioCaps and Clotho, are dropped: without it, models are tested on what they were trained on.
    """
    root = Path(root)
    if split not in (None, *WAVCAPS_ANNOTATIONS):
        raise CorpusError(f"{root} has no subset {split!r}; there are {', '.join(WAVCAPS_ANNOTATIONS)}.")
    banned = {"AudioSet_SL": set(), "FreeSound": set()}
    if blacklist:
        path = require_file(Path(blacklist), "it is one of json_files/blacklist/*.json")
        banned = {"AudioSet_SL": set(json_items(path, "AudioSet")), "FreeSound": set(json_items(path, "FreeSound"))}
    for subset in [split] if split else WAVCAPS_ANNOTATIONS:
        path = require_file(
            root / "json_files" / subset / WAVCAPS_ANNOTATIONS[subset],
            "take it from https://huggingface.co/datasets/cvssp/WavCaps",
        )
        clips = root / f"{subset}_flac"
        if not clips.is_dir():
            clips = require_directory(root / subset, f"unpack the archive {subset}.zip and put its .flac files there")
        for entry in json_items(path, "data"):
            if "id" not in entry:
                drop(str(path), "incomplete entry", str(entry)[:200])
                continue
            file = clips / f"{str(entry['id']).removesuffix('.wav')}.flac"
            if str(entry["id"]) in banned.get(subset, ()):
                drop(str(file), "in the blacklist", Path(blacklist).name)
                continue
            yield example(file, entry.get("caption"), "audiocaption", f"WavCaps/{subset}", language="en")


# General MIDI programs counted from 1, as MusicNet's labels have them: the eleven that occur.
MUSICNET_INSTRUMENTS = {
    1: "piano",
    7: "harpsichord",
    41: "violin",
    42: "viola",
    43: "cello",
    44: "double bass",
    61: "horn",
    69: "oboe",
    71: "bassoon",
    72: "clarinet",
    74: "flute",
}
MUSICNET_RATE = 44_100  # samples per second, in which the labels count time


def musicnet(
    root: str | Path, split: str = "train", window_seconds: float = 30.0, drop: Drop = refuse
) -> Iterator[dict]:
    """
    MusicNet: `musicnet_metadata.csv` (columns id, ensemble, ...), `{split}_data/{id}.wav` and
    `{split}_labels/{id}.csv`, one line a note: start_time and end_time in samples at 44.1 kHz, instrument, note, ...
    (https://zenodo.org/records/5120004; Thickstun et al., 2017).

    The corpus has no descriptions; they are made here. Each recording is cut into windows from its start to the end of
    its last note, and the text of a window names the ensemble, from the metadata, and the instruments with a note in
    that window, from the labels, that with the most notes first:

        Classical music for string quartet, in which the violin, viola and cello can be heard.

    Composer and title are left out: they cannot be heard. Windows without a note are dropped.

    Args:
        split: "train" or "test".
        window_seconds: length of the windows; the last of a recording is shorter.
    """
    root = Path(root)
    metadata = require_file(root / "musicnet_metadata.csv", "take it from https://zenodo.org/records/5120004")
    recordings = require_directory(root / f"{split}_data", "give the directory that musicnet.tar.gz unpacks to")
    labels = require_directory(root / f"{split}_labels", "give the directory that musicnet.tar.gz unpacks to")
    ensembles = {row["id"]: row["ensemble"].lower() for row in csv_rows(metadata, ["id", "ensemble"], drop)}
    for path in sorted(labels.glob("*.csv")):
        file = recordings / f"{path.stem}.wav"
        notes = [
            (int(note["start_time"]) / MUSICNET_RATE, int(note["end_time"]) / MUSICNET_RATE, int(note["instrument"]))
            for note in csv_rows(path, ["start_time", "end_time", "instrument"], refuse)
        ]
        unknown = {instrument for *_, instrument in notes} - set(MUSICNET_INSTRUMENTS)
        if unknown or path.stem not in ensembles:
            drop(str(file), "unknown instrument" if unknown else "not in the metadata", str(unknown or path.stem))
            continue
        last = max((end for _, end, _ in notes), default=0.0)
        for number in range(int(np.ceil(last / window_seconds))):
            start = number * window_seconds
            end = min(start + window_seconds, last)
            counts = Counter(MUSICNET_INSTRUMENTS[i] for on, off, i in notes if on < end and off > start)
            if not counts:
                drop(f"{file}#{start:g}-{end:g}", "no note", "")
                continue
            names = sorted(counts, key=lambda name: (-counts[name], name))
            listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
            yield example(
                file,
                f"Classical music for {ensembles[path.stem]}, in which the {listed} can be heard.",
                "music_description",
                f"MusicNet/{split}",
                language="en",
                start=start,
                end=end,
                clip_id=f"{path.stem}-{number:03d}",
            )


# Clips


@lru_cache(maxsize=256)  # parts of one file, and captions of one clip, follow each other
def _header(path: str, modified: int):
    return soundfile.info(path)


def header(path: str):
    return _header(path, os.stat(path).st_mtime_ns)


def count_frames(path: str) -> int:
    """By decoding: a FLAC file's header says 0 both where it is empty and where its writer could not seek back."""
    with open(path, "rb") as stream, _ForwardReader(stream) as file:
        return sum(iter(lambda: len(file.read(BLOCK_FRAMES)), 0))


def file_seconds(path: str) -> float:
    """
    The length of an audio file by its header. It is decoded only if the header tells none.

    Raises:
        UnusableClip: if it is missing, or soundfile cannot read it.
    """
    try:
        if os.path.getsize(path) == 0:
            return 0.0
        found = header(path)
        frames = found.frames if found.frames != UNKNOWN_FRAMES else count_frames(path)
    except FileNotFoundError as error:
        raise UnusableClip("missing") from error
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a .raw file, which has no header
        raise UnusableClip("unreadable", str(error)) from error
    return frames / found.samplerate


def clip_seconds(row: dict, min_seconds: float = 0.0, max_seconds: float = float("inf")) -> float:
    """
    The length of a row's clip, from the headers of its files.

    Raises:
        UnusableClip: if the row has no text, or the clip is missing, unreadable, empty, shorter than `min_seconds`,
            longer than `max_seconds`, or ends after its file does.
    """
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise UnusableClip("no text", "" if row["text"] is None else repr(row["text"]))
    seconds = file_seconds(row["audio"]["path"])
    if "start" in row:
        if row["end"] > seconds + END_TOLERANCE_SECONDS:
            raise UnusableClip("ends after its file", f"{row['end']:.2f} s of {seconds:.2f} s")
        seconds = min(row["end"], seconds) - row["start"]
    for path in row.get("expand_wav", ()):
        seconds += EXPAND_SILENCE / SAMPLING_RATE + file_seconds(path)
    if seconds <= 0:
        raise UnusableClip("zero length")
    if seconds < min_seconds:
        raise UnusableClip("too short", f"{seconds:.2f} s")
    if seconds > max_seconds:
        raise UnusableClip("too long", f"{seconds:.2f} s")
    return seconds


def read_clip(row: dict) -> np.ndarray:
    """
    The clip of a row: its file, or the part of it from `start` to `end`, or its file and those of `expand_wav` with
    0.1 s of silence before each.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32, mono, at 16 kHz.

    Raises:
        UnusableClip: for a file that is damaged or cut short.
    """
    try:
        if "start" in row:
            return _read_part(row["audio"]["path"], row["start"], row["end"])
        parts = [load_audio(row["audio"]["path"])]
        for path in row.get("expand_wav", ()):
            parts += [np.zeros(EXPAND_SILENCE, np.float32), load_audio(path)]
    except (AudioError, soundfile.LibsndfileError) as error:
        raise UnusableClip("damaged", str(error)) from error
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _read_part(path: str, start: float, end: float) -> np.ndarray:
    with soundfile.SoundFile(path) as file:
        rate = file.samplerate
        file.seek(round(start * rate))
        samples = file.read(round((end - start) * rate), dtype="float32", always_2d=True).mean(axis=1)
    if len(samples) < (end - start - END_TOLERANCE_SECONDS) * rate:
        raise UnusableClip("damaged", f"{len(samples) / rate:.2f} of {end - start:.2f} s are readable")
    return load_audio({"array": samples, "sampling_rate": rate})


def is_ready(row: dict) -> bool:
    """Whether a row's clip is already what `flac_bytes` would make of it: one whole 16 kHz mono FLAC file."""
    found = header(row["audio"]["path"])
    whole = "start" not in row and "expand_wav" not in row
    return whole and (found.format, found.samplerate, found.channels) == ("FLAC", SAMPLING_RATE, 1)


def flac_bytes(waveform: np.ndarray) -> bytes:
    """A float32 waveform at 16 kHz as a 16-bit FLAC file: lossless for what was 16-bit mono at that rate."""
    file = io.BytesIO()
    # Scaled here: libsndfile reads 16-bit samples with a factor of 1/32768, but writes floats with 32767.
    samples = np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()
