"""LibriSpeech."""

from collections.abc import Iterator
from pathlib import Path

from ..corpus_files import CorpusError, Drop, example, refuse, require_directory


def read_examples(root: str | Path, split: str | None = None, drop: Drop = refuse) -> Iterator[dict]:
    """
    LibriSpeech: `{split}/{speaker}/{chapter}/{speaker}-{chapter}-{utterance}.flac` with one `.trans.txt` a chapter, as
    unpacked from https://www.openslr.org/12 (format: its README.TXT). The transcripts are all capitals; they are given
    in lower case, for which a language model's tokenizer has words.

    Args:
        root: the directory `LibriSpeech`, which holds the splits.
        split: e.g. "train-clean-100"; by default all that are there.
    """
    root = require_directory(root, "give the directory LibriSpeech, which holds train-clean-100 and so on")
    found = False
    for name in [split] if split else sorted(folder.name for folder in root.iterdir() if folder.is_dir()):
        require_directory(root / name, f"unpack {name}.tar.gz of https://www.openslr.org/12 there")
        for transcripts in sorted((root / name).glob("*/*/*.trans.txt")):
            found = True
            for line in transcripts.read_text(encoding="utf-8").splitlines():
                utterance, _, text = line.strip().partition(" ")
                if utterance:
                    file = transcripts.with_name(f"{utterance}.flac")
                    yield example(file, text.lower(), "asr", f"LibriSpeech/{name}", language="en")
    if not found:
        raise CorpusError(f"{root / (split or '*')} holds no {{speaker}}/{{chapter}}/*.trans.txt; check the path.")
