"""Generation by one function: each row as it is alone, and the limit on a transcript."""

import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor

from salmonn_hf.model.answering import generate_answers, transcript_limit


def test_the_limit_is_16_tokens_and_15_a_second():
    limits = [transcript_limit(samples / 16000) for samples in range(30 * 16000 + 1)]
    assert limits == [16 + 15 * samples // 16000 for samples in range(30 * 16000 + 1)]


def test_rows_have_their_own_limits_and_are_what_they_are_alone():
    model, processor = tiny_model(), tiny_processor()
    model.generation_config.eos_token_id = None  # so that every answer reaches its limit
    clips, limits = [noise(0.5), noise(1.3, 1), noise(0.9, 2)], [3, 9, 6]
    inputs = processor.apply_transcription_request(clips)
    together = generate_answers(model, processor, inputs, limits)
    for clip, limit, answer in zip(clips, limits, together, strict=True):
        request = processor.apply_transcription_request(clip)
        output = model.generate(**request, max_new_tokens=limit, do_sample=False, pad_token_id=2)
        tokens = output[0, request["input_ids"].shape[1] :]
        assert len(tokens) == limit and len(set(tokens.tolist())) > 1
        assert answer == processor.batch_decode([tokens], skip_special_tokens=True)[0].strip()
    assert generate_answers(model, processor, inputs, 9)[1] == together[1]


def test_frames_in_place_of_features():
    model, processor = tiny_model(), tiny_processor()
    inputs = dict(processor.apply_transcription_request([noise(0.5), noise(0.9, 2)]))
    expected = generate_answers(model, processor, inputs, 8)
    features = {name: inputs.pop(name) for name in list(inputs) if name.startswith("input_features")}
    with torch.no_grad():
        frames = model.encode_audio(**features)
    assert generate_answers(model, processor, inputs | frames, 8) == expected and len(set(expected)) == 2


def test_the_model_can_be_told_to_sample():
    model, processor = tiny_model(), tiny_processor()
    inputs = processor.apply_transcription_request([noise(0.5)])
    torch.manual_seed(0)
    sampled = {generate_answers(model, processor, inputs, 8, do_sample=True)[0] for _ in range(3)}
    assert len(sampled) > 1 and len({generate_answers(model, processor, inputs, 8)[0] for _ in range(3)}) == 1


def test_no_transcript_is_made_up_for_a_clip_without_words():
    """The CTC head decides, and only about prompts that ask for a transcript."""
    model, processor = tiny_model(tiny_config(ctc_vocab_size=30)), tiny_processor()
    clips = [noise(0.5), noise(1.3, 1), noise(0.9, 2)]
    inputs = dict(processor.apply_transcription_request(clips))
    expected = generate_answers(model, processor, inputs, 8)
    with torch.no_grad():
        frames = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
        states, num_states = model.projector.window_states(**frames)
        log_probs = model.projector.ctc_log_probs(states, model.get_input_embeddings())
    leads = [(clip[:, 1:].amax(-1) - clip[:, 0]).max() for clip in log_probs.split(num_states.tolist())]
    worst = min(range(3), key=lambda row: leads[row])
    model.projector.config.min_word_lead = float(sorted(leads)[0] + sorted(leads)[1]) / 2
    without = ["" if row == worst else answer for row, answer in enumerate(expected)]
    assert all(expected) and generate_answers(model, processor, inputs, 8) == expected
    assert generate_answers(model, processor, inputs, 8, is_transcript=True) == without
    assert generate_answers(model, processor, inputs, [8, 8, 8], [row == worst for row in range(3)]) == without
    assert generate_answers(model, processor, inputs, 8, [row != worst for row in range(3)]) == expected
    model.projector.config.min_word_lead = float(max(leads)) + 1
    assert generate_answers(model, processor, inputs, 8, is_transcript=True) == ["", "", ""]
