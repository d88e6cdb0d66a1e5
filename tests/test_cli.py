"""The command line: what it writes where, in which form, and its exit codes."""

import io
import json
import os
import re
import sys

import numpy as np
import pytest
import soundfile
from conftest import ROOT, noise

from salmonn_hf import cli, default_model, inference

SILENCE = np.zeros(16000, np.float32)


@pytest.fixture
def asked(monkeypatch):
    """Stands for the model: answers with the length of each segment, and keeps what it was asked."""
    requests = []

    class Model:
        def __init__(self, model, dtype, device, max_new_tokens):
            if model == "broken":
                raise OSError("no such\ncheckpoint")
            self.processor = type("Processor", (), {"transcription_prompt": "Transcribe the speech."})

        def __call__(self, waveforms, prompts, is_transcript):
            assert is_transcript == ("Transcribe" in prompts[0])
            requests.append((len(waveforms), prompts[0]))
            return [f" {len(waveform)}\n samples" for waveform in waveforms]

    monkeypatch.setattr(inference, "Answerer", Model)
    monkeypatch.setattr(cli, "TARGET_SECONDS", 12.0)  # as long as the phrases below
    return requests


@pytest.fixture
def files(tmp_path):
    long = np.concatenate([noise(8), SILENCE, noise(9, 1), SILENCE, noise(10, 2)])
    for name, waveform in (("a", noise(1)), ("long", long), ("silent", SILENCE)):
        soundfile.write(tmp_path / f"{name}.wav", waveform, 16000, subtype="FLOAT")
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    return tmp_path


def run(*arguments):
    return cli.main([*map(str, arguments), "--model", "m"])


def test_plain(asked, files, capsys):
    assert run("transcribe", files / "a.wav") == 0
    assert capsys.readouterr().out == "16000 samples\n"
    assert run("transcribe", files / "a.wav", files / "silent.wav") == 0
    assert capsys.readouterr().out == f"{files}/a.wav: 16000 samples\n{files}/silent.wav: \n"
    assert asked == [(1, "Transcribe the speech."), (1, "Transcribe the speech.")]  # nobody is asked about silence


def test_json_has_the_whole_of_a_long_file(asked, files, capsys):
    assert run("transcribe", files / "long.wav", "--format", "json", "--batch_size", "2") == 0
    answer = json.loads(capsys.readouterr().out)
    chunks = answer["chunks"]
    assert answer["file"] == f"{files}/long.wav"
    assert answer["text"] == " ".join(chunk["text"] for chunk in chunks)
    assert len(chunks) == 3 and asked == [(2, "Transcribe the speech."), (1, "Transcribe the speech.")]
    times = [(chunk["start"], chunk["end"]) for chunk in chunks]  # of the speech, without the pauses
    np.testing.assert_allclose(times, [(0, 8), (9, 18), (19, 29)], atol=0.2)
    assert sum(int(chunk["text"].split()[0]) for chunk in chunks) == 29 * 16000


def test_captions_are_of_30_seconds_and_have_their_times(asked, files, capsys):
    waveform = np.concatenate([noise(25), SILENCE, noise(20, 1)])
    soundfile.write(files / "longer.wav", waveform, 16000, subtype="FLOAT")
    assert run("caption", files / "longer.wav") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("[0.0-25.") and lines[1].endswith(" samples")
    assert "can be heard" in asked[0][1]
    assert run("caption", files / "long.wav") == 0
    assert capsys.readouterr().out == f"{29 * 16000} samples\n"


def test_ask(asked, files, capsys):
    assert run("ask", files / "a.wav", "Is anyone speaking?", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["question"] == "Is anyone speaking?"
    assert asked == [(1, "Is anyone speaking?")]


def test_srt(asked, files, capsys):
    assert run("transcribe", files / "long.wav", "--format", "srt") == 0
    blocks = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert len(blocks) == 3
    for number, block in enumerate(blocks, start=1):
        first, times, text = block.split("\n")
        assert first == str(number) and text.endswith("samples")
        assert re.fullmatch(r"\d\d:\d\d:\d\d,\d{3} --> \d\d:\d\d:\d\d,\d{3}", times)
    assert blocks[2].split("\n")[1].endswith(("--> 00:00:28,860", "--> 00:00:29,000"))
    assert cli.srt_time(3723.0456) == "01:02:03,046"
    assert cli.srt_time(59.9996) == "00:01:00,000"


def test_a_file_for_each_input(asked, files, capsys):
    output = files / "out"
    assert run("transcribe", files / "a.wav", files / "long.wav", "--format", "srt", "--output_dir", output) == 0
    assert sorted(file.name for file in output.iterdir()) == ["a.srt", "long.srt"]
    assert capsys.readouterr().out == ""
    assert (output / "a.srt").read_text().endswith("\n16000 samples\n")


@pytest.mark.parametrize("bad", ["broken.wav", "gone.wav"])
def test_one_bad_file_does_not_stop_the_others(asked, files, capsys, bad):
    assert run("transcribe", files / bad, files / "a.wav") == 1
    captured = capsys.readouterr()
    assert captured.out == f"{files}/a.wav: 16000 samples\n"
    assert captured.err.startswith(f"error: {files}/{bad}: ") and captured.err.count("\n") == 1


def test_nothing_done_is_2(asked, files, capsys):
    assert run("transcribe", files / "broken.wav") == 2
    assert run("transcribe", files / "gone.wav") == 2
    assert asked == []
    assert cli.main(["transcribe", str(files / "a.wav"), "--model", "broken"]) == 2
    assert "error: broken: no such checkpoint" in capsys.readouterr().err


def test_where_nothing_can_be_written_is_told_before_the_model_is_loaded(files, capsys, monkeypatch):
    monkeypatch.setattr(inference, "Answerer", None)  # calling it would be a TypeError
    for output in (files / "a.wav", files / "a.wav" / "sub"):
        assert run("transcribe", files / "a.wav", "--output_dir", output) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {output}: cannot be written to (") and error.count("\n") == 1
    assert run("transcribe", files) == 2
    assert capsys.readouterr().err == f"error: {files}: is a directory; name the files in it\n"


def test_a_result_that_cannot_be_written_is_named_and_the_others_are_written(asked, files, capsys):
    (files / "out" / "a.txt").mkdir(parents=True)
    assert run("transcribe", files / "a.wav", files / "long.wav", "--output_dir", files / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {files}/out/a.txt: cannot be written (") and error.count("\n") == 1
    assert (files / "out" / "long.txt").is_file()


def test_without_a_clone_or_a_name_it_says_how_to_get_the_default(files, capsys, monkeypatch):
    monkeypatch.delenv("SALMONN_MODEL", raising=False)
    assert default_model.default_model() == str(ROOT / "model_cards" / default_model.NAME)
    monkeypatch.setattr(default_model, "__file__", str(files / "site-packages" / "salmonn_hf" / "default_model.py"))
    assert default_model.default_model() == default_model.HUB_NAME
    assert cli.main(["transcribe", str(files / "a.wav")]) == 2
    error = capsys.readouterr().err
    assert f"error: {default_model.HUB_NAME}: " in error and default_model.HOW_TO_GET in error
    monkeypatch.setenv("SALMONN_MODEL", "mine")
    assert default_model.default_model() == "mine"


def test_usage_errors_are_2_and_say_what_to_do(files, capsys):
    for arguments, message in (
        (["transcribe", "a.wav", "b.wav", "--format", "srt", "--model", "m"], "give --output_dir"),
        (["caption", "x/a.wav", "y/a.flac", "--output_dir", "o", "--model", "m"], "a.txt"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(arguments)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


def test_names_that_the_terminal_cannot_print(asked, files, monkeypatch):
    name = os.fsdecode(b"caf\xe9.wav")  # no UTF-8
    soundfile.write(files / "a.flac", noise(1), 16000)
    (files / "a.flac").rename(files / name)
    (files / "\xfc.wav").write_bytes((files / name).read_bytes())
    printed, errors = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "stderr", errors)
    assert run("transcribe", files / name, files / "\xfc.wav", files / os.fsdecode(b"gone\xe9.wav")) == 1
    assert run("transcribe", files / name, files / "\xfc.wav", "--format", "json") == 0
    assert run("transcribe", files / name, "--format", "json", "--output_dir", files / "out") == 0
    plain, json_lines = printed.buffer.getvalue().decode("ascii").splitlines()[:2], []
    assert plain == [f"{files}/caf\\udce9.wav: 16000 samples", f"{files}/\\xfc.wav: 16000 samples"]
    json_lines = printed.buffer.getvalue().decode("ascii").splitlines()[2:]
    assert [json.loads(line)["file"] for line in json_lines] == [f"{files}/{name}", f"{files}/\xfc.wav"]
    assert b"gone\\udce9.wav: there is no such file" in errors.buffer.getvalue()
    (written,) = (files / "out").iterdir()
    assert (
        os.fsencode(written.name) == b"caf\xe9.json" and json.loads(written.read_text())["file"] == f"{files}/{name}"
    )


def test_with_a_model(tiny_checkpoint, files, capsys):
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "float32", "--format", "json"]
    assert cli.main(["ask", str(files / "a.wav"), "What?", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    answerer = inference.Answerer(str(tiny_checkpoint), "float32", "cpu", max_new_tokens=448)
    assert answer["text"] == " ".join(answerer([noise(1)], ["What?"])[0].split())
