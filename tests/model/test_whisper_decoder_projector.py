"""The projector that is Whisper's whole decoder: its transcript is Whisper's own, and the language model reads it."""

from types import SimpleNamespace

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.model.clip_tensors import pad_clips
from salmonn_hf.model.speech_decoder import SalmonnWhisperDecoder
from salmonn_hf.model.transcript_draft import TranscriptDraft
from salmonn_hf.model.whisper_decoder_projector import END

SOUNDS = {"sound_layers": [1], "sound_summary_size": 8, "sound_kinds": 5, "sound_name_size": 3}


def model_of(**changes):
    model = tiny_model(tiny_config(num_end_frames=3, **changes))
    generator = torch.Generator().manual_seed(0)
    pieces = torch.randint(4, 200, model.projector.pieces.shape, generator=generator)
    lengths = torch.randint(0, 4, (len(pieces), 1), generator=generator)
    model.projector.pieces.copy_(torch.where(torch.arange(pieces.shape[1]) < lengths, pieces, -1))
    if changes.get("sound_layers"):
        model.projector.sound_summary.names.copy_(torch.arange(15).view(5, 3) + 20)
    return model


def frames_of(lengths, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(len(lengths), max(lengths), width, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"audio_frames": frames, "audio_frames_mask": mask}


def test_the_transcript_is_that_of_transformers_whisper(monkeypatch):
    """On 30 s of frames, without padding, against `WhisperForConditionalGeneration.generate`."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 100, "max_target_positions": 30}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 90, "decoder_start_token_id": 91}
    config = WhisperConfig(**sizes, **heads, **tokens)
    whisper = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in whisper.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    decoder = SalmonnWhisperDecoder._from_config(config).eval()
    decoder.load_state_dict(whisper.model.decoder.state_dict())
    features = torch.randn(2, 80, 3000)
    frames = whisper.model.encoder(features).last_hidden_state
    banned = torch.zeros(2, 100, dtype=torch.bool)
    banned[:, [7, *range(91, 100)]] = True
    banned[0, [8, 90]] = True
    mask = torch.ones(frames.shape[:2], dtype=torch.bool)
    monkeypatch.setattr(SalmonnWhisperDecoder, "no_speech", lambda *_: torch.full((2,), -1e9))
    tokens = SimpleNamespace(prompt_ids=[91], end_id=90, no_speech_id=99)
    said, states = decoder.transcribe(frames, mask, tokens, banned, [20, 20])
    whisper.generation_config.update(suppress_tokens=[7, *range(91, 100)], begin_suppress_tokens=[8, 90])
    given = {"max_new_tokens": 21, "num_beams": 1, "do_sample": False}
    wanted = whisper.generate(features, decoder_input_ids=torch.tensor([[91], [91]]), **given)
    for clip, ids in enumerate(said):
        assert (
            wanted[clip].tolist()[-len(ids) :] == ids.tolist()
            or wanted[clip].tolist()[1 : 1 + len(ids)] == ids.tolist()
        )
        rows = torch.cat([torch.tensor([91]), ids[:-1]])[None]
        teacher_forced = whisper.model.decoder(input_ids=rows, encoder_hidden_states=frames[clip : clip + 1])
        torch.testing.assert_close(teacher_forced.last_hidden_state[0], states[clip], atol=1e-4, rtol=1e-4)


def test_clips_of_a_batch_are_transcribed_as_alone():
    projector = model_of().projector
    lengths = [40, 7, 25]
    together = frames_of(lengths)
    batch = projector.transcribe(**together)
    for clip, length in enumerate(lengths):
        alone = projector.transcribe(
            together["audio_frames"][clip : clip + 1, :length], together["audio_frames_mask"][clip : clip + 1, :length]
        )
        own = batch["transcript_ids_mask"][clip]
        assert batch["transcript_ids"][clip][own].tolist() == alone["transcript_ids"][0].tolist()
        torch.testing.assert_close(
            batch["transcript_states"][clip][own], alone["transcript_states"][0], atol=1e-5, rtol=1e-4
        )


def test_end_frames_stand_behind_each_clips_own():
    projector = model_of().projector
    frames = frames_of([5, 2])
    given, mask = projector.with_end(**dict(zip(("frames", "mask"), frames.values(), strict=True)))
    torch.testing.assert_close(given[1, 2:5], projector.end_frames)
    torch.testing.assert_close(given[0, 5:8], projector.end_frames)
    torch.testing.assert_close(given[1, :2], frames["audio_frames"][1, :2])
    assert mask.sum(-1).tolist() == [8, 5]


def test_a_transcript_is_spelt_in_the_language_models_tokens_with_the_state_of_each(monkeypatch):
    projector = model_of().projector
    projector.pieces[11:14] = -1
    projector.pieces[11, :2], projector.pieces[12, :1] = torch.tensor([30, 31]), 32  # and 13 has none
    states = [torch.randn(4, 16), torch.randn(1, 16), torch.randn(2, 16)]
    end = projector.config.end_id
    said = [torch.tensor([11, 13, 12, end]), torch.tensor([end]), torch.tensor([12, 11])]  # the last at its limit
    monkeypatch.setattr(SalmonnWhisperDecoder, "transcribe", lambda *_: (said, states))
    kept = projector.transcribe(**frames_of([40, 20, 20]))
    rows = zip(kept["transcript_ids"], kept["transcript_ids_mask"], strict=True)
    assert [ids[mask].tolist() for ids, mask in rows] == [[30, 31, 32, END], [END], [32, 30, 31]]
    torch.testing.assert_close(kept["transcript_states"][0, :4], states[0][[0, 0, 2, 3]])
    torch.testing.assert_close(kept["transcript_states"][2, :3], states[2][[0, 1, 1]])
    words = projector.has_words(None, None, None, **kept)
    assert words.tolist() == [True, False, True]


def test_the_language_model_reads_its_own_tokens_and_the_states():
    model = model_of()
    projector, embedding = model.projector, model.get_input_embeddings()
    torch.nn.init.normal_(projector.proj.weight)
    ids = torch.tensor([[30, 31, 32, END], [END, 0, 0, 0]])
    states, mask = torch.randn(2, 4, 16), torch.tensor([[True] * 4, [True, False, False, False]])
    states[0, 1] = 0  # which is none
    kept = {"transcript_ids": ids, "transcript_states": states, "transcript_ids_mask": mask}
    output = projector(**frames_of([40, 20]), token_embedding=embedding, **kept)
    assert output.num_tokens.tolist() == [4, 1]
    assert output.draft_ids == [[30, 31, 32], []]
    of_states = projector.proj(projector.state_norm(states)) / 4  # of 16 features
    torch.testing.assert_close(output.embeds[[0, 2]], embedding(ids[0, [0, 2]]) + of_states[0, [0, 2]])
    torch.testing.assert_close(output.embeds[1], embedding(ids[0, 1]))
    ends = torch.stack([of_states[0, 3], of_states[1, 0]])
    torch.testing.assert_close(output.embeds[3:], projector.end_marker + ends)


@pytest.mark.parametrize("changes", [{}, SOUNDS])
def test_text_alone_is_read_like_a_transcript_without_states_and_sounds(changes):
    projector, embedding = (model := model_of(**changes)).projector, model.get_input_embeddings()
    torch.nn.init.normal_(projector.proj.weight)
    if projector.sound_summary is not None:
        projector.sound_summary.names[0] = -1  # the first kind is that of clips without sounds
        projector.sound_summary.mlp[-1].bias.data[0] = -10.0  # which the frames have to say
    text = torch.tensor([30, 31, 32])
    frames = pad_clips([projector.text_frames(text), projector.text_frames(text[:1])])
    output = projector(**frames, token_embedding=embedding)
    assert output.num_tokens.tolist() == [4, 2]
    end = projector.end_marker[None]
    torch.testing.assert_close(output.embeds, torch.cat([embedding(text), end, embedding(text[:1]), end]))


def test_no_more_tokens_than_places():
    projector, embedding = model_of().projector, torch.nn.Embedding(300, 32)
    ids = torch.full((1, 9), 20)
    kept = {"transcript_ids": ids, "transcript_states": torch.randn(1, 9, 16), "transcript_ids_mask": ids > 0}
    output = projector(**frames_of([6]), token_embedding=embedding, **kept)
    assert output.num_tokens.tolist() == output.num_states.tolist() == [3]


def test_the_name_of_a_sound_comes_before_the_words():
    model = model_of(**SOUNDS)
    projector, embedding = model.projector, model.get_input_embeddings()
    frames = frames_of([60, 30])
    frames |= {"sound_frames": frames["audio_frames"], "sound_frames_mask": frames["audio_frames_mask"]}
    ids = torch.tensor([[11, 12, END], [13, END, 0]])
    kept = {"transcript_ids": ids, "transcript_states": torch.randn(2, 3, 16), "transcript_ids_mask": ids != 0}
    without = projector(**frames_of([60, 30]), token_embedding=embedding, **kept)
    named = projector(**frames, token_embedding=embedding, **kept)
    assert (named.num_tokens - without.num_tokens).tolist() == [3, 3]
    clips = (output.embeds.split(output.num_tokens.tolist()) for output in (named, without))
    for clip, words in zip(*clips, strict=True):
        torch.testing.assert_close(clip[3:], words)


@pytest.mark.parametrize("changes", [{}, SOUNDS])
def test_generate_with_drafts_and_kept_frames_gives_the_same(changes):
    model, processor = model_of(**changes), None
    processor = tiny_processor(model.config)
    inputs = processor.apply_transcription_request([noise(1.3)])
    plain = model.generate(**inputs, max_new_tokens=12)
    settings = {"speculation_type": "transcript", "tokenizer": processor.tokenizer}
    assert plain.tolist() == model.generate(**inputs, max_new_tokens=12, **settings).tolist()
    clips = {name: inputs.pop(name) for name in ("input_features", "input_features_mask")}
    kept = model.encode_audio(**clips)
    assert plain.tolist() == model.generate(**inputs, **kept, max_new_tokens=12).tolist()


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = model_of()
    processor = tiny_processor(model.config)
    inputs = processor.apply_transcription_request([noise(0.8), noise(1.9, 1)])
    model.save_pretrained(tmp_path)
    again = SalmonnForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_drafts_keep_capitals_and_marks():
    tokenizer = tiny_processor(model_of().config).tokenizer
    text = "Well, Mr. Dashwood's house is well-kept!"
    draft = TranscriptDraft(tokenizer(" " + text)["input_ids"], tokenizer, 2)
    ids = tokenizer(text)["input_ids"]
    for place in range(len(ids)):
        assert draft.rest_of_draft(ids[:place]) == [*ids[place:], 2], tokenizer.decode(ids[:place])


def test_another_kind_of_draft_is_refused():
    model = model_of()
    processor = tiny_processor(model.config)
    inputs = processor.apply_transcription_request([noise(0.5)])
    with pytest.raises(ValueError, match="ctc_vocab_size"):
        model.generate(**inputs, speculation_type="ctc", tokenizer=processor.tokenizer)
