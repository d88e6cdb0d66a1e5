"""
How long an index of many clips takes to the first example, and how much memory it holds, on this machine.

    python training/benchmarks/measure_start_up.py --rows 1600000

The index is made here, in the form that `prepare_data.py` writes; its rows name a few hundred short FLACs in rotation.
It is opened as a recipe's source, grouped by length, drawn from, and gone through for an epoch, after a small index
was: what is measured is the rows, not the libraries. Pages of memory-mapped files count as resident, but the system
takes them back: `anonymous` memory is what the process holds itself. Nothing else should run on the machine.
"""

import argparse
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from salmonn_hf import SalmonnFeatureExtractor
from salmonn_hf.data.clip_dataset import ClipDataset
from salmonn_hf.data.clip_parquet import INDEX_COLUMNS, PATHS_PER_GROUP, write_clips
from salmonn_hf.data.clip_table import ClipTable
from salmonn_hf.data.flac import flac_bytes
from salmonn_hf.data.mixture_sampler import MixtureSampler
from salmonn_hf.data.sources import Source
from salmonn_hf.model.audio import SAMPLING_RATE
from salmonn_hf.terminal import command

STEP_SIZE = 64  # clips of an optimizer step
WORDS = "a of the bird car door rain dog speaks closes sings passes slowly loudly behind window garden".split()


def write_noise(directory: Path, count: int) -> list[tuple[str, float]]:
    """FLACs of noise from 1 to 3 s: their paths and seconds."""
    rng, clips = np.random.default_rng(0), []
    for index, seconds in enumerate(rng.uniform(1, 3, count).tolist()):
        clips.append((str(directory / f"{index}.flac"), seconds))
        Path(clips[-1][0]).write_bytes(flac_bytes(rng.normal(0, 0.1, int(seconds * SAMPLING_RATE))))
    return clips


def index_rows(count: int, clips: list[tuple[str, float]]) -> Iterator[dict]:
    draw = random.Random(1)
    for number in range(count):
        path, seconds = clips[number % len(clips)]
        text, task = " ".join(draw.choices(WORDS, k=12)), "asr" if number % 2 else "audiocaption"
        values = ({"bytes": None, "path": path}, text, task, "", "synthetic", "en", "", str(number), seconds)
        yield dict(zip(INDEX_COLUMNS, values, strict=True))


def open_index(path: Path) -> tuple[ClipDataset, MixtureSampler]:
    dataset = ClipDataset([ClipTable(Source(str(path)))], SalmonnFeatureExtractor())
    return dataset, MixtureSampler(dataset, STEP_SIZE)


def draw_examples(dataset: ClipDataset, sampler: MixtureSampler, count: int):
    for item in islice(sampler, count):
        dataset[item]


def megabytes() -> np.ndarray:
    """Resident memory of this process, and how much of it is anonymous."""
    status = Path("/proc/self/status").read_text()
    return np.array([int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024 for name in ("VmRSS", "RssAnon")])


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--rows", type=int, default=1_600_000, help="of the index")
    parser.add_argument("--files", type=int, default=300, help="audio files that they name in rotation")
    parser.add_argument("--drawn", type=int, default=2000, help="examples to draw, of which the clips are read")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        os.environ["HF_DATASETS_CACHE"] = str(work / "cache")  # before `datasets` is imported: nothing is cached yet
        clips = write_noise(work, arguments.files)
        for name, rows in (("small", 60_000), ("index", arguments.rows)):
            write_clips(work / f"{name}.parquet", index_rows(rows, clips), INDEX_COLUMNS, PATHS_PER_GROUP)
        draw_examples(*open_index(work / "small.parquet"), arguments.drawn)
        memory = {"before": megabytes()}
        began = time.perf_counter()
        dataset, sampler = open_index(work / "index.parquet")
        memory["opened"] = megabytes()
        draw_examples(dataset, sampler, 1)
        first_start = time.perf_counter() - began

        draw_examples(dataset, sampler, arguments.drawn)
        memory[f"{arguments.drawn:,} examples drawn"] = megabytes()
        began = time.perf_counter()
        in_epoch = [megabytes() for number, _ in enumerate(sampler) if number % 50_000 == 0]
        epoch = time.perf_counter() - began
        memory |= {"in an epoch, at most": np.max([memory["before"], *in_epoch], axis=0), "after it": megabytes()}

        began = time.perf_counter()
        draw_examples(*open_index(work / "index.parquet"), 1)
        second_start = time.perf_counter() - began

    print(f"rows {len(dataset):,}\nfirst example after {first_start:.1f} s; when started again {second_start:.1f} s")
    print(f"order of an epoch {epoch:.1f} s\n{'':28} resident  anonymous")
    for moment, (resident, anonymous) in memory.items():
        print(f"{moment:28} {resident:5.0f} MB  {anonymous:6.0f} MB")
    grown = (max(anonymous for _, anonymous in memory.values()) - memory["before"][1]) * 2**20 / len(dataset)
    print(f"anonymous memory per row {grown:.0f} bytes")


if __name__ == "__main__":
    main()
