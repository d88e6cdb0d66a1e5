"""Batches: what the labels cover, whatever the padding; clips that are left out."""

import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor

from salmonn_hf.data import task_prompts
from salmonn_hf.data.collator import ClipCollator
from salmonn_hf.data.encoder_features import encode_clips, num_frames
from salmonn_hf.model.clip_tensors import pad_clips
from salmonn_hf.training.freezing import freeze_base_parts


def example(seconds, text, messages=None, seed=0):
    features = tiny_processor().feature_extractor([noise(seconds, seed)], return_tensors="pt")
    clip = {"input_features": features["input_features"][0]}
    return {"clip": clip, "messages": messages, "task": "asr", "text": text, "path": "x", "seconds": seconds}


def test_labels_cover_the_answer_only_whatever_the_padding_side():
    processor = tiny_processor()
    asked = task_prompts.messages("QA", "How many?", system="Be brief.", draw=(0, 0, 0))
    examples = [example(0.4, " one"), example(1.0, "green two "), example(0.7, "three", asked)]
    batches = []
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        batches.append(ClipCollator(processor, [])(examples))
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batches[0][name], batches[1][name])
    batch = batches[0]
    requests = [processor.transcription_messages(), processor.transcription_messages(), asked]
    for row, text in enumerate(["one", "green two", "three"]):
        answer = batch["input_ids"][row][batch["labels"][row] != -100]
        assert processor.tokenizer.decode(answer) == text + "<|im_end|>"
        assert batch["labels"][row, -1] == processor.tokenizer.eos_token_id
        frames = num_frames(examples[row]["clip"])
        assert (batch["input_ids"][row] == 3).sum() == processor.num_audio_tokens(frames)
        seen = processor.tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row] == 1])
        prompt = processor.apply_chat_template(requests[row], add_generation_prompt=True)
        assert seen.replace("<|audio|>", "") == prompt.replace("<|audio|>", "") + text + "<|im_end|>"
    assert "Be brief." in seen and "How many?" in seen


def test_loss_is_on_the_answer_on_either_side_of_the_padding():
    """Right-padded rows, as other collators make them, give the loss of left-padded ones."""
    model, processor = tiny_model(), tiny_processor()
    model.training = True  # the outermost alone: logits are left out as in training, and there is no dropout
    batch = ClipCollator(processor, [])([example(0.4, "one"), example(1.0, "green two", seed=1)])
    frames = pad_clips(encode_clips(model, batch["clips"]))
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    positions = {"position_ids": (text["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    padding = int((text["attention_mask"][0] == 0).sum())
    right = {name: torch.stack([value[0].roll(-padding), value[1]]) for name, value in (text | positions).items()}
    assert padding > 0
    torch.testing.assert_close(
        model(**text, **positions, **frames).loss, model(**right, **frames).loss, rtol=1e-5, atol=1e-6
    )


def test_collated_prompt_is_that_of_the_transcription_request():
    """Training and inference must see the same tokens for the same clip."""
    model, processor = tiny_model(), tiny_processor()
    clip = noise(1.3)
    inputs = processor.apply_transcription_request(clip)
    frames = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])["audio_frames"][0]
    assert ClipCollator(processor, []).prompt_ids(len(frames)) == inputs["input_ids"][0].tolist()


def test_clips_that_cannot_be_decoded_are_left_out_of_the_batch():
    model = tiny_model(tiny_config(ctc_vocab_size=3))
    collator = ClipCollator(tiny_processor(), [40, 41, 42])
    bad = {"path": "bad.flac", "skipped": "damaged"}
    batch = collator([bad, example(0.4, "one")])
    assert batch["skipped"] == [("bad.flac", "damaged")] and len(batch["clips"]) == len(batch["labels"]) == 1
    # Nothing is put in the place of a batch that is lost: it gives neither loss nor gradient.
    batch = collator([bad])
    freeze_base_parts(model)
    frames = pad_clips(encode_clips(model, batch["clips"]))
    batch = {name: value for name, value in batch.items() if name not in ("clips", "seconds", "skipped")}
    one = torch.tensor(1)
    output = model(**batch, **frames, num_items_in_batch=one, num_ctc_labels=one)
    output.loss.backward()
    assert output.loss == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_only_transcripts_are_spelt_and_only_captions_are_bags_of_words():
    """What the CTC head learns of a sound must not be its caption: the clip says none of its words."""
    processor = tiny_processor()
    tokens = [processor.tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "abc"]
    collator = ClipCollator(processor, tokens)
    examples = [
        example(0.4, text) | {"task": task} for task, text in (("asr", "ab"), ("audiocaption", "C"), ("QA", "b"))
    ]
    batch = collator(examples)
    assert [[label for label in row if label != -100] for row in batch["ctc_labels"].tolist()] == [[0, 1], [], []]
    captions = [[label for label in row if label != -100] for row in batch["caption_labels"].tolist()]
    assert captions == [[], processor.tokenizer(" c", add_special_tokens=False).input_ids, []]
    assert "caption_labels" not in collator(examples[::2])
    assert "caption_labels" not in ClipCollator(processor, tokens, caption_bags=False)(examples)


def test_control_tokens_in_questions_and_answers_are_text():
    """In what is trained on, too: one clip has its placeholders, and an answer ends where it ends."""
    from salmonn_hf.data.task_prompts import messages

    processor = tiny_processor()
    collator = ClipCollator(processor, [])
    prompt = collator.prompt_ids(50, messages("QA", "Is <|audio|> or <|im_end|> said?"))
    assert prompt.count(3) == processor.num_audio_tokens(50)
    assert prompt.count(2) == collator.prompt_ids(50, messages("QA", "Is it said?")).count(2)
    answer = collator.answer_ids("It is <|im_end|>.")
    assert answer.count(2) == 1 and answer[-1] == 2
    assert processor.tokenizer.decode(answer[:-1]) == "It is <|im_end|>."
    assert 3 not in collator.caption_ids("a <|audio|> b")


def test_text_alone_is_copied_beside_clips():
    """What the language model reads of it is what it is to write; a clip in the same batch is as it is alone."""
    model, processor = tiny_model(tiny_config(num_end_frames=3)), tiny_processor(tiny_config(num_end_frames=3))
    torch.nn.init.normal_(model.projector.proj.weight)
    text = {"clip": {"text": " green two "}, "messages": None, "task": "asr", "text": " green two ", "seconds": 1.0}
    batch = ClipCollator(processor, [])([text | {"path": "x"}, example(1.0, "one")])
    ids = processor.text_ids("green two")
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == [*ids, processor.tokenizer.eos_token_id]
    frames = encode_clips(model, batch["clips"])
    audio = model.project_audio(**pad_clips(frames))
    embedding = model.get_input_embeddings()
    torch.testing.assert_close(audio.embeds[: len(ids)], embedding(torch.tensor(ids)))
    places = (batch["input_ids"][0] == 3).sum()
    assert places == processor.num_audio_tokens(len(frames[0]["audio_frames"])) >= len(ids) + 1
    (alone,) = encode_clips(model, ClipCollator(processor, [])([example(1.0, "one")])["clips"])
    torch.testing.assert_close(frames[1]["transcript_states"], alone["transcript_states"], atol=1e-5, rtol=1e-4)
    alone = model.project_audio(**pad_clips([alone]))
    torch.testing.assert_close(audio.embeds[len(ids) + 1 :], alone.embeds, atol=1e-5, rtol=1e-4)
