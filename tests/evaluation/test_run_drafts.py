"""The comparison of drafted with plain decoding: what it counts, and that it sees a text that differs."""

import json
import runpy
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import noise, tiny_processor
from test_ctc_draft import drafting_model
from test_evaluation import flac

from salmonn_hf.model.pipeline_salmonn import SalmonnAutomaticSpeechRecognitionPipeline

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "run_drafts.py"


@pytest.mark.parametrize("same_text", [3, 2])
def test_run_drafts(same_text, tmp_path, monkeypatch, capsys):
    drafting_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    waveforms = [noise(seconds, row) for row, seconds in enumerate((0.4, 0.8, 0.6))]
    audio = [{"bytes": flac(waveform), "path": None} for waveform in waveforms]
    pyarrow.parquet.write_table(pyarrow.table({"audio": audio, "text": ["a"] * 3}), tmp_path / "clips.parquet")
    transcribe, asked = SalmonnAutomaticSpeechRecognitionPipeline._transcribe, []

    def watched(self, waveforms, prompt, language, generate_kwargs):
        asked.append(generate_kwargs.get("speculation_type"))
        texts = transcribe(self, waveforms, prompt, language, generate_kwargs)
        return ["something else"] if same_text == 2 and len(asked) == 8 else texts  # of the last clip's draft

    monkeypatch.setattr(SalmonnAutomaticSpeechRecognitionPipeline, "_transcribe", watched)
    arguments = ["--model", tmp_path, "--data", tmp_path / "clips.parquet", "--output", tmp_path / "new" / "out.json"]
    monkeypatch.setattr(sys, "argv", ["run_drafts.py", *map(str, arguments), "--device", "cpu"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads((tmp_path / "new" / "out.json").read_text())
    assert asked == [None, "ctc"] * 4  # the first clip twice, to warm up
    assert (result["clips"], result["same_text"]) == (3, same_text)
    assert result["passes"]["greedy"] > result["clips"] and result["passes"]["drafts"] >= result["clips"]
    assert min(result["seconds"].values()) > 0
    assert f"the same text {same_text} times" in capsys.readouterr().out
