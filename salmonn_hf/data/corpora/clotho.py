"""Clotho."""

from collections.abc import Iterator
from pathlib import Path

from ..corpus_files import Drop, csv_rows, example, refuse, require_directory, require_file


def read_examples(root: str | Path, split: str = "development", drop: Drop = refuse) -> Iterator[dict]:
    """
    Clotho 2.1: `clotho_captions_{split}.csv` with the columns file_name, caption_1 to caption_5, and the clips in
    `{split}/` (https://zenodo.org/records/4783391). Each clip gives five rows, one a caption.

    Args:
        split: "development", "validation" or "evaluation".
    """
    path = Path(root, f"clotho_captions_{split}.csv")
    require_file(path, "take it from https://zenodo.org/records/4783391")
    clips = require_directory(Path(root, split), f"unpack clotho_audio_{split}.7z there")
    captions = [f"caption_{number}" for number in range(1, 6)]
    for row in csv_rows(path, ["file_name", *captions], drop):
        for caption in captions:
            yield example(clips / row["file_name"], row[caption], "audiocaption", f"Clotho/{split}", language="en")
