"""The trainer itself: what it sets up, and that no argument of `Trainer` is ignored."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor
from test_training import history, parts, run, stage1_model, stage1_recipe, stage2_recipe, write_parquet  # noqa: F401
from transformers import Trainer, TrainerCallback, TrainingArguments

from salmonn_hf.data.arguments import DataArguments
from salmonn_hf.data.augmentation import Augmentation
from salmonn_hf.data.collator import ClipCollator
from salmonn_hf.training.arguments import REFUSED, SalmonnTrainingArguments
from salmonn_hf.training.distillation import DistillingTrainer
from salmonn_hf.training.trainer import SalmonnTrainer

# ruff: noqa: F811 (fixtures of another file)


def make_trainer(output_dir, model=None, optimizers=(None, None), **settings):
    of_trainer = {name: settings.pop(name) for name in list(settings) if name in inspect.signature(Trainer).parameters}
    arguments = SalmonnTrainingArguments(output_dir=str(output_dir), report_to=[], **settings)
    return SalmonnTrainer(
        model=model or tiny_model(tiny_config()), args=arguments, optimizers=optimizers, **of_trainer
    )


def test_six_methods_of_trainer_are_overridden_each_with_its_reason():
    overridden, unexplained = set(), []
    for kind in (SalmonnTrainer, DistillingTrainer):
        lines = inspect.getsource(kind).split("\n")
        for name, value in vars(kind).items():
            if callable(value) and name in vars(Trainer):
                overridden.add(name)
                (place,) = (number for number, line in enumerate(lines) if line.startswith(f"    def {name}("))
                if kind is SalmonnTrainer and not lines[place - 1].startswith("    # "):
                    unexplained.append(name)
    assert len(overridden) <= 6, overridden
    assert not unexplained


VALUES = {
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "do_predict": True,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "fp16_full_eval": True,
    "hub_revision": "next",
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "duration",
    "liger_kernel_config": {"rope": True},
    "parallelism_config": SimpleNamespace(),
    "prediction_loss_only": True,
    "remove_unused_columns": True,
    "use_liger_kernel": True,
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_training_arguments_without_effect_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}=.* would have no effect: .* Leave it out"):
        SalmonnTrainingArguments(output_dir=str(tmp_path), **{name: VALUES[name]})


@pytest.mark.parametrize("strategy", ["sequential", "batch_rebalance"])
def test_other_orders_of_clips_are_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match=f"train_sampling_strategy is '{strategy}'; choose 'group_by_length' or"):
        SalmonnTrainingArguments(output_dir=str(tmp_path), train_sampling_strategy=strategy)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"compute_loss_func": print}, "compute_loss_func would have no effect"),
        ({"preprocess_logits_for_metrics": print}, "preprocess_logits_for_metrics would have no effect"),
        ({"eval_dataset": {"a": []}}, "eval_dataset is a dict"),
    ],
)
def test_arguments_of_trainer_without_effect_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_a_model_cannot_be_made_by_the_trainer(tmp_path):
    arguments = SalmonnTrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="model_init would have no effect"):
        SalmonnTrainer(model_init=lambda: tiny_model(), args=arguments)


def test_other_training_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="args are TrainingArguments; give SalmonnTrainingArguments"):
        SalmonnTrainer(model=tiny_model(), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_data_parallel_is_refused(tmp_path):
    arguments = SalmonnTrainingArguments(output_dir=str(tmp_path), report_to=[])
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="One process sees 2 GPUs.*accelerate launch"):
        SalmonnTrainer(model=tiny_model(), args=arguments)


def test_ignore_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ignore_keys would have no effect"):
        make_trainer(tmp_path).evaluate(ignore_keys=["logits"])


def test_a_stream_refuses_what_counts_its_clips_otherwise(parts, tmp_path):
    sources = [{"path": str(parts / "train.parquet"), "task": "asr", "streaming": True}]
    data, processor, model = DataArguments(sources=sources, feature_cache=""), tiny_processor(), tiny_model()
    stream, _ = data.datasets(data.training_sources(), [], model, processor, Augmentation(), 0)
    for setting in ({"auto_find_batch_size": True}, {"accelerator_config": {"dispatch_batches": True}}):
        with pytest.raises(ValueError, match="auto_find_batch_size or dispatch_batches"):
            make_trainer(tmp_path, model, train_dataset=stream, max_steps=2, **setting)


def test_training_leaves_cudnns_attention_out(tmp_path):
    """Its backward pass gives NaN for masked sequences of 64 tokens where all scores of a row are low."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_trainer(tmp_path)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    if torch.cuda.is_available():
        query, key, value = torch.randn(3, 1, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
        query[..., 0], key[..., 0] = 1.0, -960.0
        mask = torch.ones(64, 64, dtype=torch.bool, device="cuda").tril()[None, None]
        output = torch.nn.functional.scaled_dot_product_attention(query.requires_grad_(), key, value, attn_mask=mask)
        output.sum().backward()
        assert query.grad.isfinite().all()


class Events(TrainerCallback):
    def __init__(self):
        self.logs, self.evaluations = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluations.append((state.global_step, metrics))


def test_callbacks_evaluation_on_start_and_metrics_of_ones_own(parts, stage1_model, tmp_path):
    """`compute_metrics` gets the answers' tokens, as from `Seq2SeqTrainer`; the best model is chosen by its result."""
    from salmonn_hf import SalmonnForConditionalGeneration, SalmonnProcessor
    from salmonn_hf.training.freezing import freeze_base_parts

    processor = SalmonnProcessor.from_pretrained(stage1_model)
    model = SalmonnForConditionalGeneration.from_pretrained(stage1_model, dtype=torch.float32)
    model.add_lora({"r": 2, "target_modules": ["q_proj"]})
    freeze_base_parts(model)
    data = DataArguments(train_files=[str(parts / "train.parquet")], eval_file=str(parts / "eval.parquet"))
    data.feature_cache = ""
    train, held_out = data.datasets(*data.load(), model, processor, Augmentation(), 0)
    calls, events = [], Events()

    def compute_metrics(prediction):
        texts = [
            processor.batch_decode([row[row != -100] for row in ids]) for ids in (prediction[0], prediction.label_ids)
        ]
        calls.append(texts)
        return {"found": float(len(calls))}

    trainer = make_trainer(
        tmp_path,
        model,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=ClipCollator(processor, []),
        compute_metrics=compute_metrics,
        callbacks=[events],
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
        load_best_model_at_end=True,
        metric_for_best_model="found",
        greater_is_better=False,
    )
    trainer.train()
    assert [step for step, _ in events.evaluations] == [0, 1, 2, 3]
    assert all({"eval_found", "eval_wer", "eval_runtime"} <= metrics.keys() for _, metrics in events.evaluations)
    assert trainer.state.best_global_step == 1  # the first that is compared
    references = [row for table in held_out.tables for row in table.transcripts()]
    answers = [answer.text for answer in trainer.answers(held_out)]
    metrics = trainer.evaluate(metric_key_prefix="test")
    assert calls[-1] == [answers, references] and any(answers)
    assert metrics["test_found"] == len(calls)
    losses = [logs for logs in events.logs if "loss" in logs]
    assert len(losses) == 3 and all(logs["tokens_per_second"] > 0 for logs in losses)
    assert trainer.state.num_input_tokens_seen > 0


def test_noise_on_embeddings_is_honoured(parts, stage1_model, tmp_path, monkeypatch):
    losses = {}
    for alpha in (None, 50.0):
        recipe = stage2_recipe(parts, tmp_path / str(alpha), stage1_model, eval_strategy="no", max_steps=1)
        recipe |= {"lora_dropout": 0.0, "ctc_loss_weight": 0.0, "save_steps": 1, "neftune_noise_alpha": alpha}
        run("run_stage2.py", recipe, tmp_path, monkeypatch)
        losses[alpha] = [entry["loss"] for entry in history(tmp_path / str(alpha)) if "loss" in entry]
    assert losses[None] != losses[50.0]


def test_a_clip_is_answered_in_the_precision_of_the_model(tmp_path):
    """Under autocast where it is mixed, as in training; as it is where it is one, as it is loaded later."""
    model, processor = tiny_model().to(torch.bfloat16), tiny_processor()
    trainer = make_trainer(tmp_path, model, bf16=True, data_collator=ClipCollator(processor, []))
    clips = write_parquet(tmp_path / "a.parquet", 1)
    data = DataArguments(train_files=[clips], eval_file=clips, feature_cache="")
    _, held_out = data.datasets(*data.load(), model, processor, Augmentation(), 0)
    seen, forward = [], type(model.projector.audio_norm).forward

    def watch(norm, frames):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(norm, frames)

    model.projector.audio_norm.forward = watch.__get__(model.projector.audio_norm)
    trainer.answers(held_out)
    model.projector.float()
    trainer.answers(held_out)
    assert seen == [False, True]


def test_of_what_a_checkpoint_lacks_base_parts_are_not_missed(tmp_path):
    model = tiny_model()
    model.config.base_parts = {"language_model": "somewhere"}
    trainer = make_trainer(tmp_path, model)
    found = {key: value for key, value in model.state_dict().items() if not key.startswith("language_model.")}
    assert trainer.model.load_state_dict(found, strict=False).missing_keys == []
    del found["projector.audio_norm.weight"]
    assert trainer.model.load_state_dict(found, strict=False).missing_keys == ["projector.audio_norm.weight"]


@pytest.mark.parametrize("merged", [False, True])
def test_logits_are_of_the_answers_alone(merged):
    """The loss is that of all logits, of which the others cost time."""
    config = tiny_config(**({"num_layers": 1, "merged_windows": 3} if merged else {}))
    model, processor = tiny_model(config), tiny_processor(config)
    inputs = processor(text=["<|audio|>abc", "<|audio|>abcdef"], audio=[noise(0.5), noise(1.0)])
    labels = inputs["input_ids"].clone()
    labels[0, :-3], labels[1, :-6] = -100, -100
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    count = {"num_items_in_batch": torch.tensor(9)}
    loss, outputs = SalmonnTrainer.answer_loss(None, model, {**inputs, "labels": labels}, **count)
    assert seen == [7] and outputs.logits.shape[1] == 7
    torch.testing.assert_close(loss, model(**inputs, labels=labels, **count).loss)
