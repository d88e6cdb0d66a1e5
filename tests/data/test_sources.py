"""Sources: every form they come in, columns, what is skipped and how it is listed, what a recipe may not say."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import noise, tiny_config, tiny_model, tiny_processor
from datasets import Audio, Features, Value

from salmonn_hf.data.arguments import DataArguments
from salmonn_hf.data.augmentation import Augmentation
from salmonn_hf.data.clip_audio import read_clip
from salmonn_hf.data.clip_dataset import ClipDataset
from salmonn_hf.data.clip_table import ClipTable
from salmonn_hf.data.skipped_clips import SkippedClips
from salmonn_hf.data.sources import Source
from salmonn_hf.evaluation.clips import parquet_clips
from salmonn_hf.model.audio import load_audio
from salmonn_hf.training.recipe import parse_recipe


def flac(seconds, seed=0):
    file = io.BytesIO()
    soundfile.write(file, noise(seconds, seed), 16000, format="FLAC")
    return file.getvalue()


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def embedded(data, name, **columns):
    return {"audio": {"bytes": data, "path": name}, **columns}


def test_parquet_with_other_column_names(tmp_path):
    rows = [{"sound": {"bytes": flac(0.5), "path": "a"}, "captions": ["x", "y"], "q": "why", "kind": "QA", "other": 1}]
    columns = {"audio": "sound", "text": "captions", "question": "q", "task": "kind"}
    table = ClipTable(Source(write(tmp_path / "a.parquet", rows), columns=columns))
    assert len(table) == 1 and table.seconds.tolist() == [0.5]
    row = table[0]
    assert (row["text"], row["question"], row["task"]) == (["x", "y"], "why", "QA") and "other" not in row
    assert list(table.tasks_and_texts()) == [("QA", ["x", "y"])]
    np.testing.assert_allclose(read_clip(row), noise(0.5), atol=1e-4)


def test_a_stream_of_audio_is_not_decoded(tmp_path):
    """What `datasets` wrote as Audio it would decode with torchcodec."""
    schema = Features({"sound": Audio(), "text": Value("string")}).arrow_schema
    rows = [{"sound": {"bytes": flac(0.3), "path": "a.flac"}, "text": "red"}]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    source = Source(str(tmp_path / "a.parquet"), columns={"audio": "sound"}, streaming=True)
    expected = {"audio": {"bytes": flac(0.3), "path": "a.flac"}, "text": "red"}
    assert list(source.open().shuffle(seed=0)) == [expected]


def test_audiofolder(tmp_path):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", noise(0.3 if name == "a" else 0.6), 16000)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,one\nb.wav,two\n")
    table = ClipTable(Source(str(tmp_path)))
    assert sorted((row["text"], len(read_clip(row))) for row in (table[0], table[1])) == [
        ("one", 4800),
        ("two", 9600),
    ]


def test_annotation_with_prefix_and_files_that_follow(tmp_path):
    for name, seconds in (("a", 0.5), ("b", 0.25)):
        soundfile.write(tmp_path / f"{name}.wav", noise(seconds), 16000)
    entries = [
        {"path": "/a.wav", "text": "one", "expand_wav": ["b.wav"]},
        {"path": "/b.wav", "text": "yes", "task": "QA", "Q": "Is it?"},
        {"path": "/gone.wav", "text": "x"},
        {"path": "/a.wav", "text": None},
        {"text": "no path"},
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"annotation": entries}))
    skipped = SkippedClips(tmp_path / "skipped.tsv")
    table = ClipTable(Source(str(path), prefix=str(tmp_path)), skipped=skipped)
    assert [row["task"] for row in (table[0], table[1])] == ["asr", "QA"] and table[1]["question"] == "Is it?"
    assert table.seconds.tolist() == pytest.approx([0.85, 0.25]) and len(read_clip(table[0])) == 13600
    lines = (tmp_path / "skipped.tsv").read_text().splitlines()
    assert [tuple(line.rsplit("/")[-1].split("\t")[:2]) for line in lines[1:]] == [
        ("gone.wav", "unreadable"),
        ("a.wav", "no text"),
        ("train.json#4", "no text"),
    ]
    assert skipped.counts == {"unreadable": 1, "no text": 2} and skipped.first_paths["no text"][0].endswith("/a.wav")
    # A file that was changed is read anew.
    path.write_text(json.dumps({"annotation": entries[:1]}))
    assert len(ClipTable(Source(str(path), prefix=str(tmp_path)))) == 1


def test_unusable_clips_are_listed_by_path_and_never_replaced(tmp_path):
    empty = io.BytesIO()
    soundfile.write(empty, np.zeros(0, np.float32), 16000, format="FLAC")
    rows = [
        embedded(flac(0.5), "good.flac", text="a"),
        embedded(b"not audio", "broken.flac", text="b"),
        embedded(empty.getvalue(), "empty.flac", text="c"),
        embedded(b"", "nothing.flac", text="c"),
        embedded(flac(0.5), "null.flac", text=None),
        embedded(flac(0.5), "blank.flac", text="  "),
        embedded(flac(0.1), "short.flac", text="d"),
        embedded(flac(1.5), "long.flac", text="e"),
        embedded(flac(0.6, 1), "good-too.flac", text="f"),
    ]
    skipped = SkippedClips(tmp_path / "run" / "skipped.tsv")
    source = Source(write(tmp_path / "a.parquet", rows))
    table = ClipTable(source, min_seconds=0.2, max_seconds=1.0, skipped=skipped)
    assert [table[index]["audio"]["path"] for index in range(len(table))] == ["good.flac", "good-too.flac"]
    assert list(table.transcripts()) == ["a", "f"]
    lines = (tmp_path / "run" / "skipped.tsv").read_text().splitlines()
    assert [tuple(line.split("\t")[:2]) for line in lines[1:]] == [
        ("broken.flac", "unreadable"),
        ("empty.flac", "zero length"),
        ("nothing.flac", "zero length"),
        ("null.flac", "no text"),
        ("blank.flac", "no text"),
        ("short.flac", "too short"),
        ("long.flac", "too long"),
    ]


def test_lengths_of_the_index_are_believed_and_speed_changes_them(tmp_path):
    path = write(tmp_path / "a.parquet", [embedded(flac(0.5), "a", text="x", seconds=3.0)])
    assert ClipTable(Source(path)).seconds.tolist() == [3.0]
    assert ClipTable(Source(path, speed=1.5)).seconds.tolist() == [2.0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"path": "a.parquet", "wieght": 2}, "'wieght'.*'weight'"),
        ({"path": "a.parquet", "task": "asr_cn"}, "'asr_cn'.*'asr"),
        ({"path": "a.parquet", "columns": {"txt": "x"}}, "'txt'.*'text'"),
        ({"path": "a.parquet", "weight": 0}, "above 0"),
        ({"path": "a.parquet", "prefix": "x"}, "prefix"),
        ({"path": "a.json", "streaming": True}, "streamed"),
        ({"weight": 1}, "no path"),
        ("{path: a}", "not JSON"),
    ],
)
def test_what_a_source_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Source.parse(settings)


def test_a_missing_column_is_named_with_the_nearest(tmp_path):
    path = write(tmp_path / "a.parquet", [embedded(flac(0.5), "a", texts="x")])
    with pytest.raises(ValueError, match="no column 'text'.*Did you mean 'texts'.*columns: {text: NAME}"):
        Source(path).open()


def test_a_missing_file_is_named_with_what_to_do():
    with pytest.raises(FileNotFoundError, match="no data/none.parquet.*--train_files"):
        Source("data/none.parquet").open()


def test_sources_of_a_recipe_and_of_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "sources:\n  - {path: a.parquet, weight: 0.5, columns: {text: captions}}\n  - {path: b.json, prefix: c}\n"
    )
    (arguments,) = parse_recipe(DataArguments, [str(recipe)])
    assert arguments.training_sources() == [
        Source("a.parquet", weight=0.5, columns={"text": "captions"}),
        Source("b.json", prefix="c"),
    ]
    (arguments,) = parse_recipe(DataArguments, [str(recipe), "--sources", '{"path": "d.parquet", "task": "asr"}'])
    assert arguments.training_sources() == [Source("d.parquet", task="asr")]


def test_short_form_is_a_source_for_each_file_and_speed():
    arguments = DataArguments(train_files=["a.parquet", "b.parquet"], speeds=[0.9, 1.1], speed_files=["b.parquet"])
    assert [(source.path, source.speed) for source in arguments.training_sources()] == [
        ("a.parquet", 1.0),
        ("b.parquet", 1.0),
        ("b.parquet", 0.9),
        ("b.parquet", 1.1),
    ]
    arguments.speed_files = None
    assert len(arguments.training_sources()) == 6
    arguments.sources, arguments.eval_sources = ['{"path": "c.parquet"}'], ['{"path": "d.parquet"}']
    assert arguments.training_sources()[6:] == [Source("c.parquet")]
    arguments.eval_file = "e.parquet"
    assert [source.path for source in arguments.evaluation_sources()] == ["e.parquet", "d.parquet"]


def test_transcripts_are_the_texts_of_their_task(tmp_path):
    rows = [embedded(flac(0.5), str(i), text=f"{task} text", task=task) for i, task in enumerate(("asr", "QA", None))]
    path = write(tmp_path / "a.parquet", rows)
    assert list(ClipTable(Source(path)).transcripts()) == ["asr text", "None text"]
    assert list(ClipTable(Source(path, task="audiocaption")).transcripts()) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "neither sources nor train_files"),
        ({"sources": ["{}"], "joined_clips": 3}, "joined_clips: of train_files alone"),
        ({"train_files": ["a"], "max_seconds": 60.0}, "30 s that the encoder takes"),
        ({"train_files": ["a"], "masked_frames": 1.0}, "share from 0 to below 1"),
    ],
)
def test_contradictory_data_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


def test_an_unwritable_list_of_skipped_clips_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="skipped.tsv.*can be written"):
        SkippedClips(tmp_path / "file" / "skipped.tsv")


def listed(directory):
    """Two recordings, and what a list of them should be read as."""
    (directory / "wavs").mkdir()
    for name, seconds in (("a", 0.5), ("b", 0.25)):
        soundfile.write(directory / "wavs" / f"{name}.wav", noise(seconds), 16000, subtype="FLOAT")
    return [("1984, or NA", 8000), ("NA", 4000)]


LISTS = {
    "l.csv": 'audio,text,seconds\nwavs/a.wav,"1984, or NA",0.5\nwavs/b.wav,NA,0.25\n',
    "bom.csv": '\ufefffile_name,text\r\nwavs/a.wav,"1984, or NA"\r\nwavs/b.wav,NA\r\n',
    "l.tsv": "path\ttext\nwavs/a.wav\t1984, or NA\nwavs/b.wav\tNA\n",
    "l.jsonl": '{"file": "wavs/a.wav", "text": "1984, or NA"}\n\n{"file": "wavs/b.wav", "text": "NA"}\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_files_in_training_and_evaluation(tmp_path, name):
    expected = listed(tmp_path)
    (tmp_path / name).write_text(LISTS[name], encoding="utf-8")
    table = ClipTable(Source(str(tmp_path / name)))
    assert [(row["text"], len(read_clip(row))) for row in map(table.__getitem__, range(2))] == expected
    assert table.seconds.tolist() == [0.5, 0.25]
    clips = parquet_clips([str(tmp_path / name)], "text")
    assert [(clip.references[0], len(clip.waveform())) for clip in clips] == expected


def test_a_list_with_columns_of_other_names_or_none(tmp_path):
    listed(tmp_path)
    (tmp_path / "l.csv").write_text("clip,said\nwavs/a.wav,x\n,y\nwavs/gone.wav,z\n")
    skipped = SkippedClips()
    table = ClipTable(Source(str(tmp_path / "l.csv"), columns={"audio": "clip", "text": "said"}), skipped=skipped)
    assert len(table) == 1 and len(read_clip(table[0])) == 8000 and skipped.counts == {"unreadable": 2}
    with pytest.raises(ValueError, match=r"no column audio or file_name .*it has \['clip', 'said'\].*columns: {audio"):
        Source(str(tmp_path / "l.csv")).open()
    (tmp_path / "l.jsonl").write_text('{"audio": "wavs/a.wav", "text": "x"}\n["y"]\n')
    with pytest.raises(Exception, match="l.jsonl, line 2 is no JSON object"):
        Source(str(tmp_path / "l.jsonl")).open()
    with pytest.raises(FileNotFoundError, match="no .*none.csv"):
        Source(str(tmp_path / "none.csv")).open()
    with pytest.raises(ValueError, match="cannot be streamed"):
        Source("l.csv", streaming=True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_parquet_of_arrays(tmp_path, dtype, rate):
    samples = (noise(0.5) * (32767 if dtype == "int16" else 1)).astype(dtype)
    kind = pa.struct({"array": pa.list_(pa.from_numpy_dtype(dtype)), "sampling_rate": pa.int64()})
    audio = [{"array": samples, "sampling_rate": rate}, {"array": [], "sampling_rate": rate}, None]
    pq.write_table(pa.table({"audio": pa.array(audio, kind), "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    expected = load_audio({"array": samples, "sampling_rate": rate})
    skipped = SkippedClips()
    table = ClipTable(Source(str(tmp_path / "a.parquet")), skipped=skipped)
    assert skipped.counts == {"zero length": 2} and table.seconds.tolist() == [8000 / rate]
    np.testing.assert_array_equal(read_clip(table[0]), expected)
    np.testing.assert_array_equal(parquet_clips([str(tmp_path / "a.parquet")], "text")[0].waveform(), expected)
    streamed = next(iter(Source(str(tmp_path / "a.parquet"), streaming=True).open()))
    np.testing.assert_array_equal(read_clip(streamed), expected)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_of_paths(tmp_path, kind):
    listed(tmp_path)
    paths = pa.array([str(tmp_path / "wavs" / "a.wav")], kind)
    pq.write_table(pa.table({"audio": paths, "text": ["a"]}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert len(read_clip(ClipTable(Source(path))[0])) == 8000
    assert len(parquet_clips([path], "text")[0].waveform()) == 8000


BROKEN_LISTS = {
    "broken.jsonl": ('{"audio": "a.wav", "text": "x"}\n{"audio":\n', "broken.jsonl, line 2 is no JSON object"),
    "semicolons.csv": ("audio;text\na.wav;x\n", "semicolons.csv has no column audio.*commas instead of semicolons"),
    "empty.csv": ("", "empty.csv has no entries"),
    "empty.jsonl": ("", "empty.jsonl has no entries"),
    "empty.parquet": ("", "empty.parquet is no Parquet file"),
}


@pytest.mark.parametrize("name", BROKEN_LISTS)
def test_broken_lists_are_named_in_training_and_evaluation(tmp_path, name):
    content, message = BROKEN_LISTS[name]
    path = tmp_path / name
    path.write_text(content)
    for read in (lambda: Source(str(path)).open(), lambda: parquet_clips([str(path)], "text")):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert "columns: {" not in str(error.value)


def test_hints_name_the_option_that_names_the_column(tmp_path):
    path = write(tmp_path / "a.parquet", [embedded(flac(0.5), "a", sentence="x")])
    with pytest.raises(ValueError, match="no column 'text'.*--text_column NAME"):
        DataArguments(train_files=[path]).load()
    with pytest.raises(ValueError, match="no column 'text'.*Name it with --text_column"):
        parquet_clips([path], "text")
    with pytest.raises(ValueError, match="'sentences'.*Did you mean 'sentence'. Name it with --captions_column"):
        parquet_clips([path], "sentences", references_option="captions_column")
    with pytest.raises(ValueError, match="no column 'question'.*Name it with --question_column"):
        parquet_clips([path], "sentence", question="question")


def test_text_alone_is_a_sentence_a_line(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("One two three.\n\nA second sentence, of thirty-one.\n", encoding="utf-8")
    skipped = SkippedClips()
    source = Source(str(path))
    table = ClipTable(source, skipped=skipped)
    assert [row["text"] for row in (table[0], table[1])] == ["One two three.", "A second sentence, of thirty-one."]
    assert table.seconds.tolist() == pytest.approx([14 / 15, 33 / 15])
    assert list(table.transcripts()) == ["One two three.", "A second sentence, of thirty-one."]
    example = ClipDataset([table], tiny_processor().feature_extractor)[0, 1]
    assert example["clip"] == {"text": "A second sentence, of thirty-one."} and example["task"] == "asr"
    assert example["text"] == "A second sentence, of thirty-one." and example["messages"] is None
    for settings in ({"task": "asr"}, {"streaming": True}, {"speed": 1.1}, {"columns": {"text": "a"}}):
        with pytest.raises(ValueError, match="text alone, without task, columns, speed or streaming"):
            Source(str(path), **settings)


def test_text_alone_is_refused_where_no_projector_transcribes(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("One two three.\n", encoding="utf-8")
    arguments = DataArguments(sources=[json.dumps({"path": str(path)})], feature_cache="")
    train, evaluation = arguments.load()
    given = (train, evaluation, tiny_model(), tiny_processor(), Augmentation(), 0)
    with pytest.raises(ValueError, match=r"does not transcribe.*\.txt"):
        arguments.datasets(*given)
    model = tiny_model(tiny_config(num_end_frames=3))
    assert len(arguments.datasets(train, evaluation, model, *given[3:])[0]) == 1


def test_what_the_audio_does_not_tell_is_replaced(tmp_path):
    path = write(tmp_path / "a.parquet", [embedded(flac(0.5), "a", text=["Well... no...", "Well."])])
    table = ClipTable(Source(path, replace={"...": ".", "Well": "So"}))
    assert ClipDataset([table], tiny_processor().feature_extractor)[0]["texts"] == ["So. no.", "So."]
