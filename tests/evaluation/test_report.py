"""Reports of small results: every figure and clip of them is on both pages, and the pages hold together."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
from conftest import efficiency_result, noise

from salmonn_hf.evaluation.challenge_table import challenge_table
from salmonn_hf.evaluation.clips import parquet_clips
from salmonn_hf.evaluation.engine import predict
from salmonn_hf.evaluation.report import worst_clips, write_report
from salmonn_hf.evaluation.results import read_run, write_result
from salmonn_hf.evaluation.scoring import score_answers, score_transcripts
from salmonn_hf.files import write_atomically

NOTE = "captions made from labels"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """An evaluation of each task, as the scripts leave them, over 25 clips of which one is broken, and timings."""
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("results")
    audio, texts = [], []
    for row in range(25):
        stream = io.BytesIO()
        soundfile.write(stream, noise(0.2 + 0.1 * row, row), 16000, format="FLAC")
        audio.append({"bytes": b"broken" if row == 7 else stream.getvalue(), "path": f"{row}.flac"})
        texts.append(" ".join(["word"] * (row % 5 + 1)))
    columns = {"audio": audio, "text": texts, "label": [f"label-{row % 3}" for row in range(25)]}
    columns["clip_id"] = [f"<clip {row}>" for row in range(25)]
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "test.parquet")

    class Model:
        max_seconds = 30.0
        device, dtype = "cpu", "none"

        def __call__(self, waveforms, prompts):
            return ["word word <b>|" for _ in waveforms]

    data = [str(root / "test.parquet")]
    clips = parquet_clips(data, "text")
    for task, score in (("asr", score_transcripts), ("qa", score_answers), ("aac", caption_scores)):
        output = root / task
        settings = {"task": task, "model": "models/nano", "data": data, "note": NOTE if task == "aac" else ""}
        predictions = predict(clips, Model, output, settings)
        write_result(output, predictions, *score(predictions))
    (root / "times").mkdir()
    efficiency = efficiency_result("models/nano", nano=(0.51e9, 0.06, 0.0123), another=(0.9e9, 0.08, 0.0456))
    write_atomically(root / "times" / "efficiency.json", json.dumps(efficiency))
    return root


def caption_scores(predictions):
    """Made up: how captions are scored is not the report's business."""
    values = np.linspace(0, 2, len(predictions))
    part = {"value": 1.0, "low": 0.5, "high": 1.5}
    result = {
        "metrics": {"CIDEr-D": part, "METEOR": part},
        "not_computed": {"SPICE, SPIDEr": "no jars"},
        "breakdowns": {"CIDEr-D": {"label": [{"part": f"label-{i}", "clips": 8, **part} for i in range(3)]}},
    }
    return result, [{"CIDEr-D": float(value), "METEOR": float(value)} for value in values]


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    write_report([results / name for name in ("asr", "aac", "qa", "times")], output)
    return output


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text += data


def test_html_needs_no_other_file(report):
    page = Page((report / "report.html").read_text())
    assert all(source.startswith(("data:audio/flac;base64,", "#")) for source in page.sources)
    assert not {"link", "script", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 4
    assert "b" in page.tags and "word word <b>|" in page.text  # what a model says is text, never markup


def test_players_play_the_worst_clips(report, results):
    page = Page((report / "report.html").read_text())
    worst = worst_clips(read_run(results / "asr"))
    audio = [s for s in page.sources if s.startswith("data:")]
    first = next(clip for clip in worst if "error" not in clip)
    waveform, rate = soundfile.read(io.BytesIO(base64.b64decode(audio[0].partition(",")[2])))
    assert (rate, len(waveform)) == (16000, round(first["seconds"] * 16000))
    np.testing.assert_allclose(waveform, noise(0.2 + 0.1 * first["row"], first["row"]).clip(-1, 1), atol=2e-4)


def test_worst_clips_by_hand(results):
    run = read_run(results / "asr")
    errors = [clip["substitutions"] + clip["deletions"] + clip["insertions"] for clip in worst_clips(run)]
    # "word word b" against one to five words: two errors to three; the broken clip, three words, has none of them.
    assert len(errors) == 20 and errors == sorted(errors, reverse=True) and min(errors) >= 1
    assert worst_clips(read_run(results / "aac"))[0]["row"] == 0
    assert all(not clip["correct"] for clip in worst_clips(read_run(results / "qa")))


def test_both_pages_say_the_same(report, results):
    text = re.sub(r"\\\|", "|", (report / "report.md").read_text())
    page = Page((report / "report.html").read_text()).text
    wer = json.loads((results / "asr" / "result.json").read_text())["metrics"]["wer"]
    for part in (
        f"{wer['value']:.4f}",
        f"{wer['low']:.4f} to {wer['high']:.4f}",
        f"{wer['insertions']} insertions",
        "Broken clip, counted with an empty answer: <clip 7>",
        "Not computed, SPICE, SPIDEr: no jars",
        "0.3049",  # the seed's SPIDEr
        "0.012",  # our TPOT
        "batch 1, 10 s of speech",
        "label-2",
        "word word <b>|",
    ):
        assert part in text, part
        assert part in page, part
    # The note stands at each figure of its run.
    assert text.count(NOTE) >= 4 and page.count(NOTE) >= 4


def test_challenge_table(results):
    rows, origins = challenge_table([read_run(results / name) for name in ("asr", "aac", "times")])
    assert rows[2] == ["seed (cv-03)", "0.3049", "0.0642", "5.32", "0.356", "0.107", "published"]
    name, spider, wer, memory, ttft, tpot, origin = rows[-2]
    assert (name, spider, memory, ttft, tpot, origin) == ("nano", "—", "0.51", "0.060", "0.012", "measured [1]")
    assert wer == f"{read_run(results / 'asr').result['metrics']['wer']['value']:.4f}"
    assert rows[-1] == ["another", "—", "—", "0.90", "0.080", "0.046", "measured [2]"]
    assert "no SPIDEr was computed" in origins[1] and "25 clips of test.parquet" in origins[1]


def test_plots_are_pictures(report):
    plots = sorted((report / "plots").iterdir())
    assert len(plots) == 4
    for file in plots:
        assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert f"plots/{file.name}" in (report / "report.md").read_text()


def test_the_same_results_give_the_same_report(report, results, tmp_path):
    write_report([results / name for name in ("asr", "aac", "qa", "times")], tmp_path)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (report / name).read_bytes()


def test_a_report_without_its_audio_says_so(results, tmp_path):
    data = results / "test.parquet"
    data.rename(results / "gone.parquet")
    try:
        write_report([results / "asr"], tmp_path)
    finally:
        (results / "gone.parquet").rename(data)
    page = Page((tmp_path / "report.html").read_text())
    assert "audio" not in page.tags and "not at hand" in page.text


def test_refuses_a_directory_without_results(tmp_path):
    with pytest.raises(ValueError, match="neither result.json nor efficiency.json"):
        read_run(Path(tmp_path))
