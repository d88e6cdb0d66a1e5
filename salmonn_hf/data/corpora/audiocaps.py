"""AudioCaps."""

from collections.abc import Iterator
from pathlib import Path

from ..corpus_files import Drop, csv_rows, example, refuse, require_directory, require_file


def read_examples(root: str | Path, split: str = "train", drop: Drop = refuse) -> Iterator[dict]:
    """
    AudioCaps: `{split}.csv` with the columns audiocap_id, youtube_id, start_time, caption
    (https://github.com/cdjkim/audiocaps, `dataset/`), and the clips in `{split}/`, named by their YouTube id, as
    `{youtube_id}`, `Y{youtube_id}` (AudioSet's way) or `{youtube_id}_{start_time}`, .wav or .flac. Many videos are
    gone from YouTube: rows without a file are dropped.

    Args:
        split: "train", "val" or "test"; in the latter two a clip has five rows, one a caption.
    """
    path = Path(root, f"{split}.csv")
    if not path.exists():
        path = require_file(Path(root, "dataset", f"{split}.csv"), "take it from https://github.com/cdjkim/audiocaps")
    clips = require_directory(Path(root, split), f"put the clips of {path.name} there, named by their youtube_id")
    for row in csv_rows(path, ["youtube_id", "start_time", "caption"], drop):
        video = row["youtube_id"]
        names = (video, f"Y{video}", f"{video}_{row['start_time']}")
        files = [clips / f"{name}{suffix}" for name in names for suffix in (".wav", ".flac")]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            drop(str(files[0]), "missing", "nor under the corpus's other names")
        else:
            yield example(file, row["caption"], "audiocaption", f"AudioCaps/{split}", language="en")
