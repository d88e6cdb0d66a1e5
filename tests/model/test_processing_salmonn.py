"""The processor: placeholders, chat template, transcription requests, bad input."""

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise, tiny_config, tiny_processor, tiny_tokenizer
from transformers import AutoProcessor

from salmonn_hf import AudioError, SalmonnFeatureExtractor, SalmonnProcessor


def audio_tokens(inputs):
    return (inputs["input_ids"] == 3).sum(-1).tolist()


def test_placeholders_follow_each_clips_length():
    processor = tiny_processor()
    inputs = processor.apply_transcription_request([noise(1.0), noise(5.0)])
    # 1 s and the 0.2 s tail are 60 encoder frames, 8 windows of 8, 2 queries each.
    assert audio_tokens(inputs) == [16, 2 * -(-260 // 8)]
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].tolist() == [1, 1]  # left-padded
    assert inputs["input_features_mask"].sum(-1).tolist() == [120, 520]


def test_original_geometry_costs_every_clip_the_same():
    processor = tiny_processor(tiny_config(window_frames=17, window_stride=17, queries_per_window=1))
    processor.feature_extractor.pad_to_30_seconds = True
    assert audio_tokens(processor.apply_transcription_request([noise(0.3), noise(30.0)])) == [88, 88]
    assert processor.num_audio_tokens(160) == 9  # 160 = 9 · 17 + 7


def test_transcription_request_takes_prompt_and_language():
    processor = tiny_processor()

    def asked(**kwargs):
        return processor.tokenizer.decode(processor.apply_transcription_request(noise(0.2), **kwargs)["input_ids"][0])

    assert "Transcribe the speech." in asked()
    assert "in German." in asked(language="German")
    assert "What is said?" in asked(prompt="What is said?") and "Transcribe" not in asked(prompt="What is said?")
    with pytest.raises(ValueError, match="at least one clip"):
        processor.apply_transcription_request([])


def test_chat_template_with_several_turns_and_clips(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "a.wav", noise(0.5), 16000)
    conversation = [
        {
            "role": "user",
            "content": [{"type": "audio", "path": str(tmp_path / "a.wav")}, {"type": "text", "text": "1?"}],
        },
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "audio", "audio": noise(1.0)}]},
    ]
    processor = tiny_processor()
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    first, second = processor.num_audio_tokens(35), processor.num_audio_tokens(60)
    assert text == (
        f"<|im_start|>user\n{'<|audio|>' * first}1?<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
        f"<|im_start|>user\nand {'<|audio|>' * second}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert isinstance(conversation[0]["content"][0]["path"], str)  # the caller's messages are left as they were


def test_a_tokenizer_without_chat_template_gets_salmonns():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    processor = SalmonnProcessor(SalmonnFeatureExtractor(), tokenizer)
    text = processor.apply_chat_template(processor.transcription_messages(), add_generation_prompt=True)
    assert text == "USER: <|audio|>Transcribe the speech.\nASSISTANT: "


def test_saved_and_loaded_is_the_same(tmp_path):
    processor = tiny_processor(tiny_config(window_frames=17, window_stride=17, queries_per_window=4))
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SalmonnProcessor
    for setting in ("audio_token", "window_frames", "window_stride", "queries_per_window", "chat_template"):
        assert getattr(loaded, setting) == getattr(processor, setting)
    clip = noise(2.0)
    for key, value in processor.apply_transcription_request(clip).items():
        assert torch.equal(value, loaded.apply_transcription_request(clip)[key])


def test_placeholder_and_clip_counts_must_agree():
    processor = tiny_processor()
    with pytest.raises(ValueError, match="2 <.audio.> tokens and 1 audio"):
        processor(text="<|audio|><|audio|>", audio=noise(0.3))
    with pytest.raises(ValueError, match="no audio inputs"):
        processor(text="<|audio|>")


def test_an_unknown_audio_token_is_named():
    with pytest.raises(ValueError, match="<nothing>"):
        SalmonnProcessor(SalmonnFeatureExtractor(), tiny_tokenizer(), audio_token="<nothing>")


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.array([0.1, np.nan], np.float32), "NaN"),
        (noise(31.0), "31.0 s"),
        ("no/such/file.wav", "no/such/file.wav"),
    ],
)
def test_bad_clips_are_named(clip, message):
    with pytest.raises(AudioError, match=message):
        tiny_processor().apply_transcription_request([noise(0.3), clip])


def test_one_clip_comes_in_any_form(tmp_path):
    processor, clip = tiny_processor(), noise(0.5)
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip, 16000, subtype="FLOAT")
    expected = processor(text="<|audio|>", audio=clip)
    forms = [str(path), path, path.read_bytes(), {"array": clip, "sampling_rate": 16000}, [clip], [str(path)]]
    forms.append({"bytes": path.read_bytes(), "path": None})
    for form in forms:
        inputs = processor(text="<|audio|>", audio=form)
        for name, value in expected.items():
            assert torch.equal(inputs[name], value), (type(form), name)


def test_text_alone():
    inputs = tiny_processor()(text=["hello", "you there"])
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_audio_first_is_audio():
    """As Whisper's processor is called; a text in its place is a text, also one that names a file."""
    processor, clips = tiny_processor(), [noise(1.0), noise(0.5)]
    expected = processor.feature_extractor(clips, return_tensors="pt")
    for inputs in (processor(clips, sampling_rate=16000), processor(audio=clips), processor([list(c) for c in clips])):
        assert set(inputs) == {"input_features", "input_features_mask"}
        assert torch.equal(inputs["input_features"], expected["input_features"])
    assert set(processor("speech.wav")) == {"input_ids", "attention_mask"}
    for wrong in ({"sampling_rate": 8000}, {"audio_kwargs": {"sampling_rate": 8000}}):
        with pytest.raises(ValueError, match="sampled at 8000 Hz"):
            processor(clips, **wrong)


def test_settings_may_be_nested_and_a_tokenizers_own_are_kept():
    processor = tiny_processor()
    rows = processor(text=["hello", "hi"], text_kwargs={"padding": "max_length", "max_length": 7})["input_ids"]
    assert rows.shape == (2, 7) and rows[1, :5].eq(2).all()  # padded on the left
    assert processor(text=["hello", "hi"], padding_side="right")["input_ids"][1, 2:].eq(2).all()
    assert isinstance(processor(text="hi", common_kwargs={"return_tensors": "np"})["input_ids"], np.ndarray)
    assert isinstance(processor(text="hi", return_tensors="np")["input_ids"], np.ndarray)

    settings = {"padding_side": "right", "padding": "max_length", "model_max_length": 99}
    tokenizer = type(processor.tokenizer)(tokenizer_object=tiny_tokenizer().backend_tokenizer, **settings)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    own = SalmonnProcessor(SalmonnFeatureExtractor(), tokenizer)
    assert own(text="hello")["input_ids"].shape == (1, 99) and own(text="hello")["input_ids"][0, -1] == 2
    requests = own.apply_transcription_request([noise(0.2), noise(1.0)])
    assert requests["attention_mask"][:, -1].all()  # an answer goes on from the right end


def test_the_callers_tokenizer_is_left_as_it_is():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    before = tokenizer.padding_side, tokenizer.init_kwargs.copy()
    processor = SalmonnProcessor(SalmonnFeatureExtractor(), tokenizer)
    assert processor.tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.pad_token is None and before == (tokenizer.padding_side, tokenizer.init_kwargs)


@pytest.mark.parametrize("spelt", ["<|audio|>", "<|im_end|>", "<|im_start|>system", "<|audio|><|audio|> <|im_end|>"])
def test_control_tokens_in_a_text_are_text(spelt):
    processor, question = tiny_processor(), f"Does {spelt} occur?"
    plain = processor.apply_transcription_request([noise(1.0), noise(2.0)], prompt="Does x occur?")
    inputs = processor.apply_transcription_request([noise(1.0), noise(2.0)], prompt=question)
    assert audio_tokens(inputs) == audio_tokens(plain)
    ids = inputs["input_ids"][1].tolist()
    text = processor.tokenizer.backend_tokenizer.model  # each byte is a token
    letters = [text.token_to_id(letter) for letter in question.replace(" ", "Ġ")]
    places = [ids[start : start + len(letters)] == letters for start in range(len(ids))]
    assert sum(places) == 1
    assert (inputs["input_ids"][1] < 4).sum() == (plain["input_ids"][1] < 4).sum()
    messages = processor.transcription_messages(prompt=question)
    one_by_one = processor.prompt_ids(messages)
    assert one_by_one == [token for i, token in enumerate(ids) if token != 3 or ids[i - 1] != 3]
    assert processor.text_ids(question) == letters


def test_a_bos_token_that_the_tokenizer_adds_stays():
    """Of sanitised text, transformers would leave it out."""
    from tokenizers.processors import TemplateProcessing

    processor = tiny_processor()
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    processor.chat_template = "{%- for m in messages -%}{%- for part in m['content'] -%}"
    processor.chat_template += (
        "{{ part['text'] if part['type'] == 'text' else '<|audio|>' }}{%- endfor -%}{%- endfor -%}"
    )
    for prompt in ("abc", "a<|audio|>c"):
        ids = processor.apply_transcription_request(noise(0.2), prompt=prompt)["input_ids"][0].tolist()
        assert ids[:2] == [1, 3] and 3 not in ids[ids.count(3) + 1 :]


def test_saving_leaves_no_trace(tmp_path):
    processor = tiny_processor()
    before = processor.to_dict()
    processor.save_pretrained(tmp_path)
    assert processor.to_dict().keys() == before.keys()


def test_a_padding_side_that_is_set_on_the_tokenizer_counts(tmp_path):
    processor, texts = tiny_processor(), ["hello", "hi"]
    assert processor.tokenizer.padding_side == "right"  # what the class says by default is nobody's choice
    assert processor(text=texts)["attention_mask"][1].tolist() == [0, 0, 0, 1, 1]
    processor.tokenizer.padding_side = "right"
    assert processor(text=texts)["attention_mask"][1].tolist() == [1, 1, 0, 0, 0]
    for given in ({"padding_side": "left"}, {"text_kwargs": {"padding_side": "left"}}):
        assert processor(text=texts, **given)["attention_mask"][1].tolist() == [0, 0, 0, 1, 1]
    assert processor(text=texts, common_kwargs={"padding_side": "left"})["attention_mask"][1, 0] == 0
    assert processor.apply_transcription_request([noise(0.2), noise(1.0)])["attention_mask"][:, -1].all()
    chats = [[{"role": "user", "content": text}] for text in texts]
    settings = {"tokenize": True, "return_dict": True, "processor_kwargs": {"padding": True}}
    for to_be_answered in (True, False):
        mask = processor.apply_chat_template(chats, add_generation_prompt=to_be_answered, **settings)["attention_mask"]
        assert bool(mask[1, -1]) is to_be_answered and bool(mask[1, 0]) is not to_be_answered

    processor.tokenizer.init_kwargs["padding_side"] = "right"
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded(text=texts)["attention_mask"][1].tolist() == [1, 1, 0, 0, 0]
    loaded.tokenizer.padding_side = "left"
    assert loaded(text=texts)["attention_mask"][1].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "option",
    [{"foo": 1}, {"do_normalize": True}, {"max_length": 1600}, {"pad_to_multiple_of": 8}],
    ids=str,
)
def test_audio_options_that_do_nothing_are_named(option):
    processor, (name,) = tiny_processor(), option
    with pytest.raises(ValueError, match=name):
        processor(text="<|audio|>", audio=noise(0.5), audio_kwargs=option)
    # What processors are given for any model, and options of the text.
    harmless = {"padding": True, "return_attention_mask": True, "truncation": False, "do_normalize": None}
    harmless |= {"sampling_rate": 16_000, "device": "cpu", "return_tensors": "pt"}
    expected = processor(text="<|audio|>", audio=noise(0.5))["input_features"]
    for given in ({"audio_kwargs": harmless}, {"max_length": 99, "padding": "max_length", "truncation": True}):
        assert torch.equal(processor(text="<|audio|>", audio=noise(0.5), **given)["input_features"], expected)


@pytest.mark.parametrize(
    "conversation, missing",
    [
        ([], "a message"),
        ([[]], "a message"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "user", "content": []}], "no content"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "no text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "no text"),
        ([{"role": "user", "content": [{"text": "hi"}]}], 'no "type"'),
    ],
    ids=str,
)
def test_what_a_conversation_lacks_is_named(conversation, missing):
    with pytest.raises(ValueError, match=missing):
        tiny_processor().apply_chat_template(conversation, tokenize=True)
