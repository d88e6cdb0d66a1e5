"""The speech recognition pipeline: what it makes of any input is what processor and model make of its segments."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise, tiny_model, tiny_processor
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from salmonn_hf.model.pipeline_salmonn import SalmonnAutomaticSpeechRecognitionPipeline
from salmonn_hf.model.segmentation import split_at_pauses

TASK = "automatic-speech-recognition"
RATE = 16_000
FEW = {"max_new_tokens": 4}


def with_pauses(*seconds):
    """Clips of noise with 0.5 s of silence between them."""
    parts = [part for i, length in enumerate(seconds) for part in (noise(length, i), np.zeros(RATE // 2, np.float32))]
    return np.concatenate(parts[:-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that never ends its answer by itself, and a processor with a setting of its own."""
    directory = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(seed=1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    processor = tiny_processor()
    processor.transcription_prompt = "Write it down."
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def transcriber(checkpoint):
    return pipeline(TASK, model=str(checkpoint), device="cpu", target_length_s=12)  # as long as the phrases below


@pytest.fixture
def asked(transcriber, monkeypatch):
    """Lets the model be replaced: every request's waveforms and settings, answered with their lengths in words."""
    requests = []

    def answer(waveforms, prompt, language, generate_kwargs):
        requests.append({"waveforms": waveforms, "prompt": prompt, "language": language, **generate_kwargs})
        return [f" \n{len(waveform)}  samples " for waveform in waveforms]

    monkeypatch.setattr(transcriber, "_transcribe", answer)
    return requests


def encoded(samples, rate=RATE):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", subtype="FLOAT")
    return stream.getvalue()


# Making one


def test_the_task_gives_salmonns_pipeline(transcriber):
    assert type(transcriber) is SalmonnAutomaticSpeechRecognitionPipeline
    assert isinstance(transcriber, AutomaticSpeechRecognitionPipeline)
    assert transcriber.processor.transcription_prompt == "Write it down."


def test_from_objects(checkpoint, transcriber):
    processor, clip = transcriber.processor, noise(1)
    expected = transcriber(clip, **FEW)
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    for given in ({"processor": processor}, parts, {"processor": processor} | parts):
        made = pipeline(TASK, model=transcriber.model, device="cpu", **given)
        assert type(made) is SalmonnAutomaticSpeechRecognitionPipeline
        assert made.processor.transcription_prompt == "Write it down."
        assert made(clip, **FEW) == expected
    direct = SalmonnAutomaticSpeechRecognitionPipeline(transcriber.model, processor=processor, device="cpu")
    assert direct(clip, **FEW) == expected
    with pytest.raises(ValueError, match="needs a processor=, or a tokenizer= and a feature_extractor="):
        pipeline(TASK, model=transcriber.model, device="cpu")


def test_from_parts_around_a_model_that_was_never_saved():
    processor = tiny_processor()
    made = pipeline(
        TASK, model=tiny_model(), tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor
    )
    assert (made.processor.window_frames, made.processor.queries_per_window) == (8, 2)
    assert isinstance(made(noise(1), **FEW)["text"], str)


def test_save_pretrained(transcriber, tmp_path):
    transcriber.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert again.processor.transcription_prompt == "Write it down."
    assert again(noise(1), **FEW) == transcriber(noise(1), **FEW)


def test_dtype(checkpoint):
    transcriber = pipeline(TASK, model=str(checkpoint), dtype=torch.bfloat16, device="cpu")
    assert transcriber.model.dtype == torch.bfloat16
    assert transcriber(noise(1), **FEW)["text"]


def tiny_whisper(directory):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    config = WhisperConfig(d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=60, **sizes, **ends)
    WhisperForConditionalGeneration(config).save_pretrained(directory)
    WhisperFeatureExtractor().save_pretrained(directory)
    WhisperTokenizer(vocab={"<|endoftext|>": 0, "a": 1}, merges=[]).save_pretrained(directory)


def tiny_wav2vec2(directory):
    config = Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        vocab_size=4,
        num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=4,
    )
    Wav2Vec2ForCTC(config).save_pretrained(directory)
    Wav2Vec2FeatureExtractor().save_pretrained(directory)
    (directory / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "A": 3}))
    Wav2Vec2CTCTokenizer(str(directory / "vocab.json"), pad_token="<pad>", unk_token="<unk>").save_pretrained(
        directory
    )


@pytest.mark.parametrize(("make", "kind"), [(tiny_whisper, "seq2seq_whisper"), (tiny_wav2vec2, "ctc")])
def test_other_models_keep_their_pipeline(tmp_path, make, kind):
    make(tmp_path)
    stock = pipeline(TASK, model=str(tmp_path), pipeline_class=AutomaticSpeechRecognitionPipeline, device="cpu")
    made = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert type(made) is AutomaticSpeechRecognitionPipeline
    assert made.type == kind and made.processor is None and made.task == TASK
    assert type(made.tokenizer) is type(stock.tokenizer) and type(made.feature_extractor) is type(
        stock.feature_extractor
    )
    assert made(noise(1)).keys() == {"text"}
    again = pipeline(TASK, model=made.model, tokenizer=made.tokenizer, feature_extractor=made.feature_extractor)
    assert type(again) is AutomaticSpeechRecognitionPipeline
    with pytest.raises(Exception, match="which tokenizer to use"):
        pipeline(TASK, model=made.model, feature_extractor=made.feature_extractor)


# What it answers


def test_a_short_clip_gets_what_model_and_processor_give(transcriber):
    clip = noise(2)
    inputs = transcriber.processor.apply_transcription_request(clip)
    ids = transcriber.model.generate(**inputs, max_new_tokens=20, num_beams=1, do_sample=False, pad_token_id=2)
    text = transcriber.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert transcriber(clip, max_new_tokens=20) == {"text": " ".join(text.split())}
    assert transcriber(clip, generate_kwargs={"max_new_tokens": 20})["text"].split() == text.split()


def test_batches_change_nothing(transcriber):
    clips = [with_pauses(8, 7, 9), noise(0.3), np.zeros(RATE, np.float32), noise(5), with_pauses(10, 10), noise(1)]
    one_by_one = [transcriber(clip, return_timestamps=True, **FEW) for clip in clips]
    assert [len(result["chunks"]) for result in one_by_one] == [3, 1, 0, 1, 2, 1]
    assert len({result["text"] for result in one_by_one}) == len(clips)
    for batch_size in (2, 20):
        assert transcriber(clips, batch_size=batch_size, return_timestamps=True, **FEW) == one_by_one


def test_every_kind_of_input(transcriber, tmp_path):
    clip = noise(1)
    expected = transcriber(clip, **FEW)
    (tmp_path / "a.wav").write_bytes(encoded(clip))
    stereo = np.stack([clip, clip])
    sources = [str(tmp_path / "a.wav"), encoded(clip), torch.tensor(clip), stereo, stereo.T]
    sources += [{"array": clip, "sampling_rate": RATE}, {"raw": stereo, "sampling_rate": RATE}]
    sources += [{"bytes": encoded(clip), "path": None}]
    assert transcriber(sources, batch_size=3, **FEW) == [expected] * len(sources)
    upsampled = {"raw": np.repeat(clip, 3), "sampling_rate": 3 * RATE}
    assert transcriber(upsampled, **FEW) == transcriber(encoded(np.repeat(clip, 3), 3 * RATE), **FEW)
    assert set(upsampled) == {"raw", "sampling_rate"}
    assert transcriber([]) == []


def test_generators_and_datasets_are_streamed(transcriber, asked):
    lengths, pulled = [2, 1, 3, 2], []

    def clips():
        for seconds in lengths:
            pulled.append(seconds)
            yield noise(seconds)

    expected = [{"text": f"{seconds * RATE} samples"} for seconds in lengths]
    results = iter(transcriber(clips(), batch_size=2))
    assert next(results) == expected[0] and len(pulled) == 2
    assert list(results) == expected[1:] and len(pulled) == 4

    class ByIndex(torch.utils.data.Dataset):
        """Like many, it has a length, but no IndexError at its end."""

        def __len__(self):
            return len(lengths)

        def __getitem__(self, index):
            assert index < len(lengths), "read beyond its end"
            return noise(lengths[index])

    results = transcriber(ByIndex(), batch_size=3)
    assert len(results) == 4 and list(results) == expected


def test_datasets_column(transcriber, asked):
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": encoded(noise(seconds)), "path": f"{seconds}.wav"} for seconds in (1, 2)]
    column = KeyDataset(datasets.Dataset.from_dict({"audio": rows}), "audio")
    assert list(transcriber(column)) == [{"text": "16000 samples"}, {"text": "32000 samples"}]


def test_long_audio_is_cut_joined_and_timed(transcriber, asked):
    waveform = with_pauses(9, 8, 10, 7)
    result = transcriber(waveform, batch_size=3, return_timestamps=True)
    assert [len(request["waveforms"]) for request in asked] == [3, 1]
    heard = [clip for request in asked for clip in request["waveforms"]]
    np.testing.assert_array_equal(np.concatenate(heard), waveform)
    assert result["text"] == " ".join(f"{len(clip)} samples" for clip in heard)
    assert [chunk["text"] for chunk in result["chunks"]] == [f"{len(clip)} samples" for clip in heard]
    times = [chunk["timestamp"] for chunk in result["chunks"]]
    assert times[0][0] == 0 and times[-1][1] == len(waveform) / RATE
    # Those of the speech: the pauses between the segments belong to none.
    np.testing.assert_allclose(times[:-1], [(0, 9), (9.5, 17.5), (18, 28)], atol=0.2)
    assert transcriber(waveform) == {"text": result["text"]}


def test_timestamps_follow_the_source_at_other_rates(transcriber, asked):
    source = {"array": np.repeat(with_pauses(9, 8), 3), "sampling_rate": 3 * RATE}
    times = [chunk["timestamp"] for chunk in transcriber(source, return_timestamps=True)["chunks"]]
    np.testing.assert_allclose(times, [(0, 9), (9.5, 17.5)], atol=0.2)


def test_segment_lengths_can_be_chosen(transcriber, asked):
    transcriber(noise(50), chunk_length_s=10)
    assert max(len(request["waveforms"][0]) for request in asked) <= 10 * RATE
    asked.clear()
    transcriber(with_pauses(3, 3, 3))
    transcriber(with_pauses(3, 3, 3), target_length_s=4)
    assert len(asked) == 1 + 3


def test_segments_are_short_unless_asked_otherwise(checkpoint, monkeypatch):
    transcriber, heard = pipeline(TASK, model=str(checkpoint), device="cpu"), []
    monkeypatch.setattr(transcriber, "_transcribe", lambda waveforms, *_: heard.extend(waveforms) or [""])
    waveform = with_pauses(4, 4, 4)
    transcriber(waveform)
    assert list(map(len, heard)) == [end - start for start, end in split_at_pauses(waveform, target_seconds=6.0)]
    assert len(heard) > 1


def test_silence_is_not_shown_to_the_model(transcriber, asked):
    for silence in (np.zeros(RATE, np.float32), np.full(40 * RATE, 0.0005, np.float32), encoded(np.zeros(100))):
        assert transcriber(silence, return_timestamps=True) == {"text": "", "chunks": []}
    assert asked == []
    clips = [np.zeros(RATE, np.float32), noise(1), np.zeros(RATE, np.float32), noise(2)]
    texts = [result["text"] for result in transcriber(clips, batch_size=4)]
    assert texts == ["", "16000 samples", "", "32000 samples"]


def test_prompt_and_language(transcriber, checkpoint, monkeypatch):
    prompts = []
    generate = transcriber.model.generate

    def spy(input_ids, **kwargs):
        prompts.append(transcriber.tokenizer.decode(input_ids[0], skip_special_tokens=True))
        return generate(input_ids, **kwargs)

    monkeypatch.setattr(transcriber.model, "generate", spy)
    transcriber(noise(1), **FEW)
    transcriber(noise(1), prompt="What is said?", **FEW)
    transcriber(noise(1), language="German", **FEW)
    transcriber(noise(1), generate_kwargs={"language": "German", **FEW})
    for prompt, wanted in zip(prompts, ["Write it down.", "What is said?", "German", "German"], strict=True):
        assert wanted in prompt


def test_a_language_that_it_was_not_trained_to_write_is_refused(transcriber, monkeypatch):
    monkeypatch.setattr(transcriber.model.config, "languages", ["en"])
    for language in ("English", "en", "EN"):
        transcriber(noise(1), language=language, **FEW)
    for given in ({"language": "German"}, {"language": "de"}, {"generate_kwargs": {"language": "Klingon"}}):
        with pytest.raises(ValueError, match="was trained to write English"):
            transcriber(noise(1), **given)


def test_decoding_is_greedy_and_long_enough_unless_told_otherwise(transcriber, monkeypatch):
    seen = []

    def spy(input_ids, **kwargs):
        seen.append(kwargs)
        return torch.cat([input_ids, input_ids[:, :1]], dim=1)

    monkeypatch.setattr(transcriber.model, "generate", spy)
    transcriber(noise(1))
    assert seen[-1]["max_new_tokens"] == 16 + 15
    assert "num_beams" not in seen[-1] and "do_sample" not in seen[-1] and "max_length" not in seen[-1]
    assert transcriber.model.generation_config.suppress_tokens == [transcriber.model.config.audio_token_id]
    transcriber(noise(1), generate_kwargs={"num_beams": 3, "max_length": 500})
    assert seen[-1]["num_beams"] == 3 and "max_new_tokens" not in seen[-1]
    monkeypatch.setattr(transcriber.model.generation_config, "max_new_tokens", 77)
    transcriber(noise(1))
    assert "max_new_tokens" not in seen[-1]


def test_endless_text_is_cut_by_each_clips_own_length(transcriber, monkeypatch):
    """As one clip of the batch would be alone; a limit that the caller gives is the caller's."""

    def babble(input_ids, max_new_tokens, **kwargs):
        letters = transcriber.tokenizer("abcdefghijklmnopqrstuvwxyz" * 9, add_special_tokens=False)["input_ids"]
        return torch.cat([input_ids, torch.tensor([letters[:max_new_tokens]] * len(input_ids))], dim=1)

    monkeypatch.setattr(transcriber.model, "generate", babble)
    clips = [noise(1), noise(4), noise(0.5)]
    lengths = [len(result["text"]) for result in transcriber(clips, batch_size=3)]
    assert lengths == [31, 76, 23] == [len(transcriber(clip)["text"]) for clip in clips]
    assert len(transcriber(clips[0], max_new_tokens=100)["text"]) == 100
    monkeypatch.setattr(transcriber, "_generate_kwargs", {"max_new_tokens": 90})  # as pipeline(max_new_tokens=90) does
    assert len(transcriber(clips[0])["text"]) == 90


def test_a_phrase_repeated_without_end_is_written_once(transcriber, monkeypatch):
    """`generate` is stopped at the eighth time, whatever the other clips of the batch say."""
    texts = ["no, " * 20, "go on, go on, go on"]
    rows = [transcriber.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    stopped = []

    def repeat(input_ids, stopping_criteria, **kwargs):
        (guard,) = stopping_criteria
        tokens = torch.full((2, len(rows[0])), transcriber.tokenizer.pad_token_id)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
        sequences = torch.cat([input_ids, tokens], dim=1)
        stopped.append(guard(sequences[:, : input_ids.shape[1] + 4 * 8], None).tolist())
        return sequences[:, : input_ids.shape[1] + 4 * 8]

    monkeypatch.setattr(transcriber.model, "generate", repeat)
    results = transcriber([noise(3), noise(3)], batch_size=2)
    assert [result["text"] for result in results] == ["no,", "go on, go on, go on"]
    assert stopped == [[True, True]]  # the second by its padding


def test_what_it_refuses(transcriber, tmp_path):
    for timestamps in ("word", "char"):
        with pytest.raises(ValueError, match=f"return_timestamps='{timestamps}'.*True or False"):
            transcriber(noise(1), return_timestamps=timestamps)
    with pytest.raises(ValueError, match="2 texts for 1 prompts"):
        transcriber(noise(1), num_beams=2, num_return_sequences=2, **FEW)
    with pytest.raises(ValueError, match=f"{tmp_path}/none.wav does not exist"):
        transcriber(str(tmp_path / "none.wav"))


# In a process of its own


def run(code, tmp_path, *arguments):
    """Run a script away from the package's directory; its output, after a check that nothing else was printed."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "TQDM_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-W", "default::UserWarning", "-c", code, *map(str, arguments)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize(
    "option",
    [
        {"stride_length_s": 5},
        {"return_language": True},
        {"chunk_length_s": 31},
        {"chunk_length_s": -1},
        {"chunk_length_s": "5"},
        {"target_length_s": -1},
        {"target_length_s": "5"},
        {"target_length_s": float("nan")},
    ],
    ids=str,
)
def test_options_of_other_pipelines_are_refused_by_name(transcriber, checkpoint, option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))}"):
        transcriber(noise(1.0), **option)
    with pytest.raises(ValueError, match=f"^{next(iter(option))}"):
        pipeline(TASK, model=str(checkpoint), **option)


def test_ways_of_decoding_give_the_greedy_text(transcriber):
    clip = noise(3.0)
    greedy = transcriber(clip, max_new_tokens=30)["text"]
    for options in (
        {"prompt_lookup_num_tokens": 3},
        {"generate_kwargs": {"prompt_lookup_num_tokens": 3}},
        {"assistant_model": transcriber.model.language_model},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
        {"use_cache": False},
        {"stop_strings": ["never said"]},
        {"stride_length_s": 0, "return_language": False, "chunk_length_s": 30},
    ):
        assert transcriber(clip, max_new_tokens=30, **options)["text"] == greedy, options
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        transcriber([clip, clip], batch_size=2, prompt_lookup_num_tokens=3)


def test_a_fresh_process_prints_nothing_but_the_text(tiny_checkpoint, tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
import salmonn_hf
from transformers import pipeline
transcriber = pipeline("automatic-speech-recognition", model=sys.argv[1], device="cpu")
clips = [np.random.default_rng(i).standard_normal(8000 * (i + 1)) * 0.1 for i in range(3)]
transcriber(clips, batch_size=2, return_timestamps=True, max_time=0.01)  # every other setting is the default
for _ in range(11):
    transcriber(clips[0], generate_kwargs={"max_new_tokens": 1})
print(type(transcriber).__module__)
"""
    package = os.path.dirname(os.path.dirname(sys.modules["salmonn_hf"].__file__))
    assert run(code, tmp_path, tiny_checkpoint, package) == "salmonn_hf.model.pipeline_salmonn\n"


def test_the_code_in_the_checkpoint_is_enough(tiny_checkpoint, tmp_path):
    code = """
import sys
import numpy as np
from transformers import pipeline
transcriber = pipeline("automatic-speech-recognition", model=sys.argv[1], trust_remote_code=True, device="cpu")
clip = np.random.default_rng(0).standard_normal(16000) * 0.1
print(transcriber(clip, max_new_tokens=4)["text"].encode())
transcriber.save_pretrained("again")
assert "salmonn_hf" not in sys.modules
"""
    clip = np.random.default_rng(0).standard_normal(16000) * 0.1
    transcriber = pipeline(TASK, model=str(tiny_checkpoint), device="cpu")
    assert run(code, tmp_path, tiny_checkpoint) == f"{transcriber(clip, **FEW)['text'].encode()}\n"
    assert {file.name for file in (tmp_path / "again").iterdir()} == {file.name for file in tiny_checkpoint.iterdir()}
