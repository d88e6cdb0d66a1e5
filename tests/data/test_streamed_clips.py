"""Streams: mixed and shuffled by seed and pass, and gone on with behind the clips of a resumed run."""

from itertools import islice

import pytest
from conftest import tiny_processor
from test_sources import embedded, flac, write

from salmonn_hf.data import task_prompts
from salmonn_hf.data.clip_dataset import ClipDataset
from salmonn_hf.data.sources import Source
from salmonn_hf.data.streamed_clips import StreamedClips


def stream(tmp_path, **settings):
    files = []
    for name, count in (("a", 8), ("b", 4)):
        rows = [embedded(flac(0.3, i), f"{name}{i}", text=f"{name} {i}", seconds=0.3) for i in range(count)]
        if name == "a":
            rows.append(embedded(flac(0.3), "a-blank", text=" ", seconds=0.3))
            rows.append(embedded(flac(0.3), "a-long", text="x", seconds=31.0))
        files.append(write(tmp_path / f"{name}.parquet", rows))
    sources = [Source(file, streaming=True, task="asr") for file in files]
    return StreamedClips(ClipDataset([], tiny_processor().feature_extractor, seed=4), sources, **settings)


@pytest.fixture
def no_sleep(monkeypatch):
    """`datasets` sleeps for seconds behind each pass."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def test_streams_are_mixed_and_shuffled_by_seed_and_pass(tmp_path, no_sleep):
    data = stream(tmp_path, buffer=5)
    items = list(islice(data, 3 * 14))
    texts = [item[0]["text"] if isinstance(item, tuple) else item["skipped"] for item in items]
    passes = [texts[start : start + 14] for start in (0, 14, 28)]
    whole = sorted([f"a {i}" for i in range(8)] + [f"b {i}" for i in range(4)] + ["no text", "too long (31.00 s)"])
    assert all(sorted(texts) == whole for texts in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0] != whole
    row, source, number, index, seconds = item = next(item for item in items[14:] if isinstance(item, tuple))
    example = data.clips.example(*item)
    assert example["text"] == row["text"] and example["messages"] == task_prompts.messages("asr", draw=(4, 1, index))

    again = stream(tmp_path, buffer=5)
    again.skip_first = 17
    assert list(islice(again, 3 * 14)) == [None] * 17 + items[17:]


def test_a_stream_without_rows_ends(tmp_path):
    """As that of a worker process, where there are more of them than files."""
    data = stream(tmp_path)
    data.streams = [rows.take(0) for rows in data.streams]
    assert list(data) == []
