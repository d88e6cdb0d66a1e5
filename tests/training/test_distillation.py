"""Transcripts learned from a teacher, beside other tasks learned from their text."""

import pytest
import torch
from conftest import noise, tiny_model, tiny_processor
from torch.nn import functional as F

from salmonn_hf.data.collator import ClipCollator
from salmonn_hf.training.arguments import SalmonnTrainingArguments
from salmonn_hf.training.distillation import DistillingTrainer
from salmonn_hf.training.freezing import freeze_base_parts

TASKS = ["asr", "audiocaption", "asr_noise", "asr"]
TEXTS = ["read the card", "a dog", "it is a long way from here", "yes"]


def lora_model(seed: int):
    torch.manual_seed(seed)
    model = tiny_model()
    model.add_lora({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]})
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    freeze_base_parts(model, freeze_speech_parts=True)
    return model.eval()


@pytest.fixture
def teacher():
    return lora_model(1)


def trainer_of(model, teacher, tmp_path):
    args = SalmonnTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    collator = ClipCollator(tiny_processor(), [])
    return DistillingTrainer(model=model, args=args, teacher=teacher, data_collator=collator)


def batch(trainer, texts, tasks=TASKS):
    features = trainer.data_collator.processor.feature_extractor
    examples = []
    for seed, (text, task) in enumerate(zip(texts, tasks, strict=True)):
        clip = features([noise(0.5 + 0.4 * seed, seed)], return_tensors="pt")
        clip = {"input_features": clip["input_features"][0]}
        examples.append({"clip": clip, "messages": None, "task": task, "text": text, "seconds": 1.0})
    return trainer.data_collator(examples)


def test_loss_is_the_teachers_divergence_and_the_texts(teacher, tmp_path):
    """Row by row, against each model's own logits without padding."""
    model = lora_model(2)
    trainer = trainer_of(model, teacher, tmp_path)
    collated = batch(trainer, TEXTS)
    inputs = trainer.encode(collated)
    expected = 0.0
    for row in range(4):
        real = inputs["attention_mask"][row].bool()
        labels = inputs["labels"][row, real]
        frames = {name: inputs[name][row : row + 1] for name in ("audio_frames", "audio_frames_mask")}
        kept = {name: value[:, inputs["audio_frames_mask"][row]] for name, value in frames.items()}
        alone = {"input_ids": inputs["input_ids"][row : row + 1, real], **kept}
        before = (labels != -100).nonzero()[:, 0] - 1
        with torch.no_grad():
            own, of_teacher = (m(**alone).logits[0, before].log_softmax(-1) for m in (model, teacher))
        if TASKS[row].startswith("asr"):
            expected += (of_teacher.exp() * (of_teacher - own)).sum()
        else:
            expected += F.nll_loss(own, labels[before + 1], reduction="sum")
    loss = trainer.compute_loss(model, collated, num_items_in_batch=torch.tensor(10))
    torch.testing.assert_close(loss, expected / 10, rtol=1e-4, atol=1e-5)
    assert loss > 0.1


def test_no_loss_where_the_teacher_is_matched(teacher, tmp_path):
    """Whatever the transcripts say: nothing is learned from them."""
    model = lora_model(1)
    trainer = trainer_of(model, teacher, tmp_path)
    inputs = batch(trainer, ["a", "b c", "d", "e"], ["asr"] * 4)
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(10))
    assert loss.abs().item() < 1e-6


def test_a_batch_without_a_clip_adds_nothing(teacher, tmp_path):
    model = lora_model(2)
    trainer = trainer_of(model, teacher, tmp_path)
    loss = trainer.compute_loss(model, batch(trainer, [None], ["asr"]), num_items_in_batch=torch.tensor(1))
    assert loss.item() == 0


def test_everything_from_the_frames_to_the_words_stays_as_it_is():
    model = lora_model(2)
    freeze_base_parts(model, freeze_speech_parts=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
