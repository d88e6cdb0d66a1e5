"""WavCaps."""

from collections.abc import Iterator
from pathlib import Path

from ..corpus_files import Drop, example, json_items, refuse, require_directory, require_file, require_subset

ANNOTATIONS = {"AudioSet_SL": "as", "BBC_Sound_Effects": "bbc", "FreeSound": "fsd", "SoundBible": "sb"}


def read_examples(
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
    root, banned = Path(root), {}
    if split:
        require_subset(root, split, ANNOTATIONS)
    if blacklist:
        path = require_file(blacklist, "it is one of json_files/blacklist/*.json")
        banned = {"AudioSet_SL": set(json_items(path, "AudioSet")), "FreeSound": set(json_items(path, "FreeSound"))}
    for subset in [split] if split else ANNOTATIONS:
        path = root / "json_files" / subset / f"{ANNOTATIONS[subset]}_final.json"
        require_file(path, "take it from https://huggingface.co/datasets/cvssp/WavCaps")
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
            else:
                yield example(file, entry.get("caption"), "audiocaption", f"WavCaps/{subset}", language="en")
