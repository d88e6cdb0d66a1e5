"""Merged wordless windows: by hand, and against the language model alone on embeddings put together by hand."""

import pytest
import torch
from conftest import LANGUAGE_MODELS, noise, tiny_config, tiny_model, tiny_processor
from test_whisper_projector import fill_token_ids

from salmonn_hf.model.whisper_token_head import WORDLESS
from salmonn_hf.model.window_merging import merge_wordless


def merging_model(seed=0, model_type="llama", limit=3):
    """Of noise, about half of whose windows carry no word."""
    config = tiny_config(model_type, num_layers=1, merged_windows=limit)
    model, processor = fill_token_ids(tiny_model(config, seed), seed), tiny_processor(config)
    with torch.no_grad():
        blank = model.projector.ctc_head.blank
        blank.weight.mul_(20)
        lead = blanks(model, states_of(model, processor, noise(3.0))).logit() - torch.tensor(WORDLESS).logit()
        blank.bias.sub_(lead.median())
    return model.eval(), processor


def states_of(model, processor, clip):
    frames = model.encode_audio(**processor.feature_extractor(clip, return_tensors="pt"))
    return model.projector.window_states(**frames)[0]


def blanks(model, states):
    """The blank's probability at each state."""
    return model.projector.ctc_log_probs(states, model.get_input_embeddings())[:, 0].exp()


def groups_by_hand(model, states, limit):
    """Groups of windows, as lists, of one clip's states."""
    groups, wordless = [], [blank > WORDLESS for blank in blanks(model, states).tolist()]
    for window, is_wordless in enumerate(wordless):
        if is_wordless and groups and wordless[window - 1] and len(groups[-1]) < limit:
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups


def embeds_by_hand(model, processor, clip, limit):
    states = states_of(model, processor, clip)
    head, speech_tokens = model.projector.ctc_head, model.projector.speech_tokens
    every_window, _ = head.embed(states, None, speech_tokens, model.get_input_embeddings())
    groups = groups_by_hand(model, states, limit)
    assert 1 < len(groups) < len(states) and any(len(group) == 1 for group in groups)
    return torch.stack([every_window[group].mean(0) for group in groups])


def row_by_hand(model, ids, clips):
    """Embeddings of a prompt whose audio tokens, as many as there may be in a row, stand for a clip each."""
    embedding, clips, pieces = model.get_input_embeddings(), iter(clips), []
    for place, token in enumerate(ids.tolist()):
        if token != model.config.audio_token_id:
            pieces.append(embedding(torch.tensor([token])))
        elif place == 0 or ids[place - 1] != token:
            pieces.append(next(clips) * getattr(embedding, "embed_scale", 1.0))
    return torch.cat(pieces)[None]


def test_runs_are_merged_within_clips_up_to_the_limit():
    embeds = torch.arange(9.0)[:, None].repeat(1, 2)
    wordless = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0, 1]).bool()
    merged, is_first = merge_wordless(embeds, wordless, torch.tensor([5, 4]), 2)
    assert is_first.tolist() == [True, False, True, True, True, True, False, True, True]
    assert merged[is_first, 0].tolist() == [0.5, 2, 3, 4, 5.5, 7, 8]


def test_a_limit_of_one_changes_nothing():
    embeds, wordless = torch.randn(50, 7), torch.rand(50) < 0.7
    merged, is_first = merge_wordless(embeds, wordless, torch.tensor([20, 30]), 1)
    assert is_first.all() and torch.equal(merged, embeds)


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_the_language_model_gets_merged_windows(model_type):
    model, processor = merging_model(model_type=model_type)
    clips = [noise(3.0), noise(1.7, 1)]
    inputs = processor(text=["<|audio|> and <|audio|>?"], audio=clips)
    by_hand = row_by_hand(model, inputs["input_ids"][0], [embeds_by_hand(model, processor, clip, 3) for clip in clips])
    expected = model.language_model(inputs_embeds=by_hand).logits
    logits = model(**inputs).logits
    assert logits.shape[1] < inputs["input_ids"].shape[1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, expected[:, -1:], atol=1e-4, rtol=1e-4)

    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [3]}
    written = model.language_model.generate(inputs_embeds=by_hand, pad_token_id=2, **options)
    output = model.generate(**inputs, **options)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])  # the prompt as it was given
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], written)


def test_loss_of_a_padded_batch_is_that_of_its_rows():
    model, processor = merging_model()
    clips = [noise(3.0), noise(0.9, 1)]
    inputs = processor(text=["<|audio|>abc", "<|audio|>abcdef"], audio=clips)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[0, -3:], labels[1, -6:] = ids[0, -3:], ids[1, -6:]
    total = 0
    for row, own, clip in zip(ids, labels, clips, strict=True):
        by_hand = row_by_hand(model, row[row != 2], [embeds_by_hand(model, processor, clip, 3)])
        answer = own[own != -100]
        logits = model.language_model(inputs_embeds=by_hand).logits[0, -len(answer) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, answer, reduction="sum")
    for train in (False, True):
        torch.testing.assert_close(model.train(train)(**inputs, labels=labels).loss, total / 9, atol=1e-4, rtol=1e-4)


def test_batch_equals_single_and_beams_get_their_own_clips():
    model, processor = merging_model()
    clips = [noise(seconds, seed) for seed, seconds in enumerate((0.4, 3.0, 1.3))]
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    batch = model.generate(**processor.apply_transcription_request(clips), **options)
    beams = model.generate(**processor.apply_transcription_request(clips), **options, num_beams=2)
    first = beams.scores[0].log_softmax(-1).view(3, 2, -1)
    for row, clip in enumerate(clips):
        alone = model.generate(**processor.apply_transcription_request(clip), **options)
        assert torch.equal(alone.sequences[0, -6:], batch.sequences[row, -6:])
        for beam in first[row]:
            torch.testing.assert_close(beam, alone.scores[0][0].log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_drafts_do_not_change_the_text():
    model, processor = merging_model(seed=1)
    inputs = processor.apply_transcription_request([noise(2.0)])
    options = {"max_new_tokens": 24, "suppress_tokens": [3]}
    drafted = model.generate(**inputs, **options, speculation_type="ctc", tokenizer=processor.tokenizer)
    assert torch.equal(drafted, model.generate(**inputs, **options))


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="merged_windows 0 must be at least 1"):
        tiny_config(num_layers=1, merged_windows=0)
