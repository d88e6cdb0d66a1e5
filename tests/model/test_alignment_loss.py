"""Losses that align audio embeddings with tokens, against torch's own and by hand."""

import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor
from test_modeling_salmonn import without_dropout

from salmonn_hf.model.alignment_loss import collapse_ctc_path


def test_ctc_loss_is_torchs_own():
    model = tiny_model(tiny_config(ctc_vocab_size=5))
    projector, embedding = model.projector, model.get_input_embeddings()
    projector.ctc_head.token_ids.copy_(torch.tensor([10, 20, 30, 40, 50]))
    frames, mask = torch.randn(2, 60, 16), torch.ones(2, 60, dtype=torch.bool)
    mask[1, 33:] = False
    labels = torch.tensor([[0, 1, 1, 4], [2, 3, -100, -100]])
    output = model(audio_frames=frames, audio_frames_mask=mask, ctc_labels=labels)
    states, lengths = projector.window_states(frames, mask)
    log_probs = projector.ctc_log_probs(states, embedding).split(lengths.tolist())
    total = sum(
        torch.nn.functional.ctc_loss(p[:, None], (y + 1)[None], (len(p),), (len(y),), reduction="sum")
        for p, y in zip(log_probs, (labels[0], labels[1, :2]), strict=True)
    )
    torch.testing.assert_close(output.loss, total / 6)
    torch.testing.assert_close(output.alignment_loss, output.loss)


def test_caption_loss_predicts_the_bag_of_words():
    """Against torch's cross-entropy of the mean embedding's cosines with the tokens' directions, clip by clip."""
    model = tiny_model(tiny_config(ctc_vocab_size=5))
    frames, mask = torch.randn(3, 60, 16), torch.ones(3, 60, dtype=torch.bool)
    mask[1, 33:] = False
    ctc_labels = torch.tensor([[0, 1], [-100, -100], [-100, -100]])
    caption_labels = torch.tensor([[-100, -100, -100], [7, 9, 7], [40, -100, -100]])
    inputs = {"audio_frames": frames, "audio_frames_mask": mask, "ctc_labels": ctc_labels}
    ctc = model(**inputs).loss
    both = model(**inputs, caption_labels=caption_labels).loss

    rows = model.get_input_embeddings().weight
    audio = model.project_audio(audio_frames=frames, audio_frames_mask=mask)
    means = torch.stack([clip.mean(0) for clip in audio.embeds.split(audio.num_tokens.tolist())])
    cosines = torch.nn.functional.cosine_similarity((means - rows.mean(0))[:, None], rows - rows.mean(0), dim=-1)
    repeated, targets = 50 * cosines[[1, 1, 1, 2]], torch.tensor([7, 9, 7, 40])
    caption = torch.nn.functional.cross_entropy(repeated, targets, reduction="sum")
    torch.testing.assert_close(both, (2 * ctc + caption) / 6)
    shared = model(**inputs, caption_labels=caption_labels, num_alignment_labels=torch.tensor(12)).loss
    torch.testing.assert_close(shared, both / 2)


def test_caption_loss_moves_the_projector_and_not_the_token_embeddings():
    model = tiny_model(tiny_config(ctc_vocab_size=5))
    frames, mask = torch.randn(1, 60, 16), torch.ones(1, 60, dtype=torch.bool)
    labels = {"ctc_labels": torch.tensor([[-100]]), "caption_labels": torch.tensor([[7, 9]])}
    model(audio_frames=frames, audio_frames_mask=mask, **labels).loss.backward()
    assert model.projector.proj.weight.grad.abs().sum() > 0 and model.get_input_embeddings().weight.grad is None


def test_the_alignment_loss_stands_beside_the_next_token_loss():
    """Neither is added to the other; both take the number of labels in all batches of an optimizer step."""
    model, processor = tiny_model(without_dropout(ctc_vocab_size=5)), tiny_processor()
    inputs = processor(text=["<|audio|>abc"], audio=[noise(1.0)])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] < 4, -100)
    inputs["ctc_labels"] = torch.tensor([[0, 3]])
    both = model(**inputs)
    plain = model(**{**inputs, "ctc_labels": None})
    assert plain.alignment_loss is None
    torch.testing.assert_close(both.loss, plain.loss)
    frames = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
    torch.testing.assert_close(both.alignment_loss, model(**frames, ctc_labels=inputs["ctc_labels"]).loss)
    shared = model(**inputs, num_items_in_batch=torch.tensor(6), num_alignment_labels=torch.tensor(4))
    torch.testing.assert_close(shared.loss, both.loss / 2)
    torch.testing.assert_close(shared.alignment_loss, both.alignment_loss / 2)


def test_clips_without_speech_take_no_part_in_ctc():
    model = tiny_model(tiny_config(ctc_vocab_size=5))
    frames, mask = torch.randn(2, 40, 16), torch.ones(2, 40, dtype=torch.bool)
    labels = torch.tensor([[0, 1], [-100, -100]])
    both = model(audio_frames=frames, audio_frames_mask=mask, ctc_labels=labels).loss
    one = model(audio_frames=frames[:1], audio_frames_mask=mask[:1], ctc_labels=labels[:1]).loss
    torch.testing.assert_close(both, one)


def test_a_path_is_collapsed_by_ctcs_rule():
    token_ids = torch.tensor([10, 20, 30])
    path = torch.tensor([0, 1, 1, 0, 1, 3, 3, 2, 0, 0])
    assert collapse_ctc_path(path, token_ids) == [10, 10, 30, 20]
    assert collapse_ctc_path(torch.zeros(4, dtype=torch.int64), token_ids) == []
