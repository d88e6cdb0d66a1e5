"""MusicNet."""

from collections import Counter
from collections.abc import Iterator
from math import ceil
from pathlib import Path

from ..corpus_files import Drop, csv_rows, example, refuse, require_directory, require_file

# General MIDI programs counted from 1, as MusicNet's labels have them: the eleven that occur.
INSTRUMENTS = {1: "piano", 7: "harpsichord", 41: "violin", 42: "viola", 43: "cello", 44: "double bass"}
INSTRUMENTS |= {61: "horn", 69: "oboe", 71: "bassoon", 72: "clarinet", 74: "flute"}
RATE = 44_100  # samples per second, in which the labels count time


def read_examples(
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
    metadata = require_file(Path(root, "musicnet_metadata.csv"), "take it from https://zenodo.org/records/5120004")
    remedy = "give the directory that musicnet.tar.gz unpacks to"
    recordings, labels = (require_directory(Path(root, f"{split}_{kind}"), remedy) for kind in ("data", "labels"))
    ensembles = {row["id"]: row["ensemble"].lower() for row in csv_rows(metadata, ["id", "ensemble"], drop)}
    for path in sorted(labels.glob("*.csv")):
        file = recordings / f"{path.stem}.wav"
        notes = [
            (int(note["start_time"]) / RATE, int(note["end_time"]) / RATE, int(note["instrument"]))
            for note in csv_rows(path, ["start_time", "end_time", "instrument"], refuse)
        ]
        unknown = {instrument for *_, instrument in notes} - set(INSTRUMENTS)
        if unknown or path.stem not in ensembles:
            drop(str(file), "unknown instrument" if unknown else "not in the metadata", str(unknown or path.stem))
            continue
        last = max((end for _, end, _ in notes), default=0.0)
        for number in range(ceil(last / window_seconds)):
            start = number * window_seconds
            end = min(start + window_seconds, last)
            counts = Counter(INSTRUMENTS[i] for on, off, i in notes if on < end and off > start)
            if not counts:
                drop(f"{file}#{start:g}-{end:g}", "no note", "")
                continue
            names = sorted(counts, key=lambda name: (-counts[name], name))
            listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
            text = f"Classical music for {ensembles[path.stem]}, in which the {listed} can be heard."
            part = {"start": start, "end": end, "clip_id": f"{path.stem}-{number:03d}"}
            yield example(file, text, "music_description", f"MusicNet/{split}", language="en", **part)
