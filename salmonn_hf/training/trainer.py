"""What the training scripts share: collation, what is trained, the trainer, evaluation by what the model answers."""

import json
import logging
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import rotate_checkpoints

from ..data.clip_dataset import ClipDataset
from ..data.clip_parquet import parquet_rows
from ..data.encoder_features import encode_clips, num_frames, pad_clips, pad_features, trains_encoder
from ..data.mixture_sampler import MixtureSampler
from ..data.skipped_clips import SkippedClips
from ..data.streamed_clips import StreamedClips
from ..data.task_prompts import CAPTION_TASKS, is_transcript, training_metric
from ..data.text_choice import most_typical
from ..evaluation.answer_metrics import correct_answers
from ..evaluation.caption_metrics import CaptionMetricsError, cider_d, require_java
from ..evaluation.word_error_rate import word_error_rate
from ..hub.push import push_to_hub
from ..model.checkpoint import is_base_key
from ..model.ctc_draft import merge_repeats
from ..model.quantized_layers import widen_linears
from ..model.sound_summary import fit_sound_summary, frame_statistics
from .sharding import (
    choose_what_is_sharded,
    gathered_state_dict,
    hide_whole_parts,
    name_as_unsharded,
    shaped_as_unsharded,
    shard_on_cpus,
    whole_parameters,
)

logger = logging.getLogger(__name__)

# A summary's MLP is fitted before, by `start_sound_summary`: no gradient comes through the choice that it makes.
TRAINED_PARTS = ("audio_norm", "sound_norm", "sound_summary.marker", "connector", "ctc_head")
SPEECH_SHARE = 0.1  # of transcribed clips, among those that a sound summary is fitted to
ANSWER_TOKENS = 96  # of an answer that is no transcript, however short its clip


def ctc_text(text: str) -> str:
    """A transcript as the CTC head spells it: what is heard, so no case and no punctuation but the apostrophe."""
    return " " + " ".join(re.sub(r"[^\w' ]+", " ", text.lower().replace("’", "'")).split())


def load_speech(files: list[str], text_column: str = "text"):
    """Parquet files with an `audio` column as a `datasets.Dataset` of undecoded clips and their `text`."""
    from datasets import Value

    dataset = parquet_rows(files, text_column)
    dataset = dataset.rename_column(text_column, "text") if text_column != "text" else dataset
    return dataset.select_columns(["audio", "text"]).cast_column("text", Value("string"))


class ClipCollator:
    """
    Examples of `ClipDataset` to a batch: `clips` (see `encode_clips`), and text, left-padded whatever the tokenizer's
    padding side, with the answer's end token at the right end and labels on the answer alone.

    Clips that could not be decoded are left out; `skipped` lists their paths and reasons. Should none be left, the
    batch is a moment of silence without any label, and adds nothing to the loss.

    Args:
        processor ([`SalmonnProcessor`]).
        ctc_token_ids (`list[int]`): the CTC head's tokens; empty for no `ctc_labels`.
        ctc_merges (`int`, *optional*): see `ctc_tokenizer`.
        alignment_only (`bool`): clips and `ctc_labels` alone, as the alignment stage needs them.
        clips ([`ClipDataset`], *optional*): which makes the examples of [`StreamedClips`].
        caption_bags (`bool`): `caption_labels` of captions beside the `ctc_labels`; of no use to a model with a
            [`SalmonnSoundSummary`].
    """

    def __init__(
        self,
        processor,
        ctc_token_ids: list[int],
        ctc_merges: int | None = None,
        alignment_only: bool = False,
        clips: ClipDataset | None = None,
        caption_bags: bool = True,
    ):
        self.processor, self.clips, self.caption_bags = processor, clips, caption_bags
        self.ctc_token_ids, self.ctc_merges, self.alignment_only = ctc_token_ids, ctc_merges, alignment_only

    @cached_property
    def ctc_tokenizer(self) -> Tokenizer:
        return ctc_tokenizer(self.processor.tokenizer, self.ctc_merges)

    @cached_property
    def ctc_index(self) -> dict[int, int]:
        return {token: index for index, token in enumerate(self.ctc_token_ids)}

    def silence(self) -> dict:
        features = self.processor.feature_extractor([np.zeros(1600, np.float32)], return_tensors="pt")
        clip = {name: features[name][0] for name in ("input_features", "input_values") if name in features}
        return {"clip": clip, "messages": None, "task": "asr", "text": None, "seconds": 0.0}

    def __call__(self, examples: list) -> dict:
        if examples[0] is None:  # which StreamedClips reads over
            return {}
        examples = [self.clips.example(*item) if isinstance(item, tuple) else item for item in examples]
        skipped = [(example["path"], example["skipped"]) for example in examples if "skipped" in example]
        examples = [example for example in examples if "skipped" not in example] or [self.silence()]
        batch = {
            "clips": [example["clip"] for example in examples],
            "tasks": [example["task"] for example in examples],
            "seconds": sum(example["seconds"] for example in examples),
            "skipped": skipped,
        }
        if self.ctc_token_ids:
            batch["ctc_labels"] = pad_sequence(
                [self.ctc_labels(example["text"] if is_transcript(example["task"]) else None) for example in examples],
                batch_first=True,
                padding_value=-100,
            )
            described = [self.caption_labels(example) for example in examples] if self.caption_bags else []
            if any(len(labels) for labels in described):
                batch["caption_labels"] = pad_sequence(described, batch_first=True, padding_value=-100)
        if self.alignment_only:
            return batch

        tokenizer = self.processor.tokenizer
        prompts = [self.prompt_ids(num_frames(example["clip"]), example["messages"]) for example in examples]
        answers = [self.answer_ids(example["text"]) for example in examples]
        rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [
            torch.tensor([-100] * len(prompt) + (answer if example["text"] is not None else [-100] * len(answer)))
            for prompt, answer, example in zip(prompts, answers, examples, strict=True)
        ]
        left = {"batch_first": True, "padding_side": "left"}
        batch["input_ids"] = pad_sequence(rows, padding_value=tokenizer.pad_token_id, **left)
        batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], **left)
        batch["labels"] = pad_sequence(labels, padding_value=-100, **left)
        return batch

    def prompt_ids(self, frames: int, messages: list[dict] | None = None) -> list[int]:
        """The tokens of a prompt about one clip of so many encoder frames; `None`: a request for a transcript."""
        prompt = self._prompt(json.dumps(messages or self.processor.transcription_messages()))
        audio_tokens = self.processor.audio_token * self.processor.num_audio_tokens(frames)
        text = prompt.replace(self.processor.audio_token, audio_tokens)
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _prompt(self):
        def render(messages: str) -> str:
            return self.processor.apply_chat_template(json.loads(messages), add_generation_prompt=True, tokenize=False)

        return lru_cache(4096)(render)

    def __getstate__(self):  # for worker processes
        return {name: value for name, value in self.__dict__.items() if name != "_prompt"}

    def answer_ids(self, text: str | None) -> list[int]:
        tokenizer = self.processor.tokenizer
        return tokenizer((text or "").strip(), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

    def ctc_labels(self, text: str | None) -> torch.Tensor:
        if text is None:
            return torch.zeros(0, dtype=torch.int64)
        tokens = self.ctc_tokenizer.encode(ctc_text(text), add_special_tokens=False).ids
        labels = [self.ctc_index[token] for token in tokens if token in self.ctc_index]
        return torch.tensor(labels, dtype=torch.int64)

    def caption_labels(self, example: dict) -> torch.Tensor:
        """The tokens of a caption, as it is spelt within a sentence; none of any other answer."""
        if example["task"] not in CAPTION_TASKS:
            return torch.zeros(0, dtype=torch.int64)
        return torch.tensor(self.caption_ids(example["text"]))

    def caption_ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(" " + text.strip().lower(), add_special_tokens=False)["input_ids"]


def ctc_tokenizer(tokenizer, merges: int | None = None) -> Tokenizer:
    """
    The language model's own tokenizer, stopped after its first `merges` byte-pair merges: it spells rare words with
    short pieces, which even a few hours of speech show often enough to learn. The token ids stay the language model's.
    `None`: all merges.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    if merges is not None:
        if settings["model"]["type"] != "BPE":
            raise ValueError(f"ctc_merges needs a byte-pair tokenizer; this is of type {settings['model']['type']}.")
        settings["model"]["merges"] = settings["model"]["merges"][:merges]
    return Tokenizer.from_str(json.dumps(settings))


def ctc_vocabulary(texts: Iterable[str], tokenizer: Tokenizer) -> list[int]:
    """The tokens that `ctc_tokenizer` spells the transcripts with, sorted."""
    found, texts = set(), iter(texts)
    while batch := list(islice(texts, 10_000)):
        rows = tokenizer.encode_batch([ctc_text(text) for text in batch], add_special_tokens=False)
        found.update(token for row in rows for token in row.ids)
    return sorted(found)


def encoded_examples(model, dataset: ClipDataset, clips: int, seed: int = 0) -> list[tuple[dict, dict]]:
    """The encoders' frames of random clips, see `encode_clips`, with their examples; of whole clips alone."""
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:clips].tolist()
    examples = [example for index in chosen if "clip" in (example := dataset[index])]
    return [(encode_clips(model, [example["clip"]], dataset.cache)[0], example) for example in examples]


def standardise_frames(model, dataset: ClipDataset, clips: int = 2000, seed: int = 0):
    """
    Start the LayerNorms behind the encoders so that every feature has mean 0 and variance 1 over `clips` random
    clips: a few of Whisper's features are ten times the others, and would drown them in the Q-Former's first layer.
    """
    encoded = [frames for frames, _ in encoded_examples(model, dataset, clips, seed)]
    for kind in ("audio", "sound"):
        if hasattr(model, f"{kind}_norm"):
            frames = torch.cat([frames[f"{kind}_frames"].cpu() for frames in encoded]).float()
            normed = torch.nn.functional.layer_norm(frames, frames.shape[-1:])
            norm = getattr(model, f"{kind}_norm")
            with torch.no_grad():
                norm.weight.copy_(1 / normed.std(0))
                norm.bias.copy_(-normed.mean(0) / normed.std(0))


def start_sound_summary(model, dataset: ClipDataset, collator: ClipCollator, seed: int = 0):
    """
    Fit the summary of `model` to all captioned clips of a training set, and to some with a transcript, see
    `fit_sound_summary`.

    Raises:
        ValueError: if the training set is read as a stream, or has no caption.
    """
    tasks = [] if isinstance(dataset, StreamedClips) else dataset.task_of_each()
    heard = [index for index, task in enumerate(tasks) if task in CAPTION_TASKS]
    if not heard:
        raise ValueError(
            "To hear sounds, a model is first fitted to all captions of its training set, but none of its sources has "
            "a caption task without streaming; add one, or start from a checkpoint that hears sounds."
        )
    spoken = [index for index, task in enumerate(tasks) if is_transcript(task)]
    order = torch.randperm(len(spoken), generator=torch.Generator().manual_seed(seed))
    spoken = [spoken[place] for place in order[: int(SPEECH_SHARE * len(heard))]]

    statistics, captions = [], []
    for index in heard + spoken:
        example = dataset[index]
        if "clip" not in example:  # it cannot be decoded
            continue
        frames = pad_clips(encode_clips(model, [example["clip"]], dataset.cache))
        statistics.append(frame_statistics(frames["sound_frames"], frames["sound_frames_mask"]).cpu())
        texts = [] if is_transcript(example["task"]) else example["texts"]
        captions.append([collator.caption_ids(text) for text in texts])
    loss = fit_sound_summary(model, torch.cat(statistics), captions, most_typical, seed)
    logger.info("sound summary fitted to %d clips, %.2f nats per clip", len(captions), loss)


def freeze_base_parts(model, alignment_only: bool = False, keep_words: bool = False, keep_encoder: bool = False):
    """
    Leave only what SALMONN trains with gradients: LayerNorms, Q-Former, projection, CTC head and LoRA, in float32; the
    encoders and the language model keep their precision. `alignment_only`: the language model's LoRA stays frozen as
    well. `keep_words`: so does what reads words from the frames, the speech encoder's LoRA included; the language
    model's LoRA and the marker of sounds' names alone are trained. A connector that was quantised is widened: its
    8 bits could not be trained. `keep_encoder`: of all this the speech encoder's LoRA alone stays frozen.
    """
    trained = ("sound_summary.marker",) if keep_words else TRAINED_PARTS
    adapters = ("language_model.",) * (not alignment_only) + ("audio_tower.",) * (not (keep_words or keep_encoder))
    if "connector" in (model.config.quantization or {}):
        widen_linears(model.connector)
        model.config.quantization = {k: v for k, v in model.config.quantization.items() if k != "connector"}
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.startswith(trained) or (".lora_" in name and name.startswith(adapters)):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.train()  # puts the frozen encoders in evaluation mode


@dataclass
class SalmonnTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with what [`SalmonnTrainer`] needs as defaults. `metric_for_best_model`, by which it stops
    early and chooses the best checkpoint, is "wer" (the default), "cider" or "accuracy", or the same behind "eval_".

    Raises:
        ValueError: if it should stop early but never evaluates.
    """

    remove_unused_columns: bool = False
    hub_strategy: str = field(
        default="end",
        metadata={"help": "What --push_to_hub pushes: the final model; 'every_save': each checkpoint too."},
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Or 'random': clips of any length in a batch."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    frame_noise: float = field(
        default=0.0, metadata={"help": "Noise on the speech encoder's frames, as a share of their deviation."}
    )
    audio_lora_learning_rate: float | None = field(
        default=None, metadata={"help": "Of LoRA in the speech encoder; default: that of LoRA in the language model."}
    )
    speech_decoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the layers taken from Whisper's decoder; default: learning_rate."}
    )

    @property
    def drawing_seed(self) -> int:
        """By which clips are ordered and augmented: `data_seed`, else `seed`, by which new weights are drawn."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Precision of what is not trained. Processors without bfloat16 take several times as long in it."""
        return torch.bfloat16 if self.bf16 or self.fp16 else torch.float32

    def __post_init__(self):
        if self.early_stopping_patience is not None:
            if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
                raise ValueError("early_stopping_patience needs evaluations: set eval_strategy, or leave it out.")
            # A resumed run counts on where it was.
            self.restore_callback_states_from_checkpoint = True
            self.load_best_model_at_end = True
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.early_stopping_patience):
            self.metric_for_best_model = "wer"
        if self.greater_is_better is None and self.metric_for_best_model in ("wer", "eval_wer"):
            self.greater_is_better = False
        super().__post_init__()
        # Models are put together from their base parts, which zero.Init cannot do: they are shared out afterwards.
        unset_hf_deepspeed_config()


class SalmonnTrainer(Trainer):
    """
    `Trainer` with the mixture of sources, frozen encoders that run once per clip, a learning rate of its own for LoRA,
    checkpoints that are whole or not there, and evaluation by greedy answers to the evaluation set, some of which are
    printed: `eval_wer` of transcripts, `eval_cider` (CIDEr-D) of captions and `eval_accuracy` of short answers,
    whichever tasks it has (see `training_metric`). Where only the alignment is trained, `eval_wer` of the CTC
    head's transcripts.

    Logged beside the loss: `tokens_per_second` (of the language model's rows; of targets where it is not run) and
    `audio_seconds_per_second`, over all processes, without evaluation.

    Raises:
        ValueError: if the evaluation set does not give `metric_for_best_model`; if frames that are to be masked, or
            noised, come from an encoder that is trained.
        CaptionMetricsError: if it has captions, and what scores them, Java among it, is not installed.
    """

    def __init__(self, *args, lora_learning_rate: float | None = None, skipped: SkippedClips | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        # Its backward pass gives NaN for masked sequences of 64, 192, ... tokens (pytorch/pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.lora_learning_rate = lora_learning_rate
        self.skipped = skipped or SkippedClips()
        self.amounts = {"tokens": 0.0, "audio_seconds": 0.0}
        self.counted_since = None
        self.staging = None
        if self.eval_dataset is not None:
            self.check_metrics()
        masks_frames = getattr(getattr(self.train_dataset, "clips", self.train_dataset), "masked_frames", 0)
        if trains_encoder(self.model) and (masks_frames or getattr(self.args, "frame_noise", 0)):
            raise ValueError(
                "masked_frames and frame_noise change what a frozen speech encoder gave; with LoRA inside the encoder "
                "leave them out, and set time_masks, frequency_masks or snr_db instead."
            )
        patience = getattr(self.args, "early_stopping_patience", None)
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))
        if isinstance(self.train_dataset, StreamedClips):
            # Each process reads the stream and takes its share, instead of being sent it by the first.
            self.accelerator.dataloader_config.dispatch_batches = False
        if self.args.bf16 or self.args.fp16:
            # Autocast brings LoRA's inputs to its precision; PEFT would first make a float32 copy of each of them.
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.cast_input_dtype_enabled = False
        if self.is_fsdp_enabled:
            choose_what_is_sharded(self.accelerator, self.model)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self.accelerator, self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    # Data

    @property
    def cache(self):
        dataset = self.train_dataset or self.eval_dataset
        return getattr(dataset, "clips", dataset).cache

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        self.train_sampler = MixtureSampler(
            self.train_dataset,
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.drawing_seed,
            args.train_sampling_strategy == "group_by_length",
        )
        return self.train_sampler

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.flush_cache()
        return result

    def _run_epoch(self, **kwargs):
        if isinstance(self.train_dataset, StreamedClips):
            # Of a resumed run `Trainer` asks for the batches that it was trained on, and throws them away. A worker
            # process makes at least its share of them.
            batches = kwargs["steps_trained_in_current_epoch"] // max(self.args.dataloader_num_workers, 1)
            self.train_dataset.skip_first = batches * self.args.train_batch_size * self.args.world_size
        else:
            # accelerate does not reach the sampler of a loader that skips batches, when several processes share it.
            self.train_sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def set_initial_training_values(self, args, dataloader):
        epochs, *values = super().set_initial_training_values(args, dataloader)
        # A stream has no end: its one epoch is the whole run.
        return 1 if isinstance(self.train_dataset, StreamedClips) else epochs, *values

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.counted_since is None:
            self.counted_since = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            for path, reason in batch["skipped"]:
                self.skipped.add(path, reason)
                logger.warning("skipped %s: %s", path, reason)
            rows = batch["attention_mask"] if "attention_mask" in batch else batch["ctc_labels"] != -100
            self.amounts["tokens"] += float(rows.sum())
            self.amounts["audio_seconds"] += batch["seconds"]
        if batches and "ctc_labels" in batches[0]:
            targets = [batch[name] for batch in batches for name in ("ctc_labels", "caption_labels") if name in batch]
            count = sum((labels != -100).sum() for labels in targets).to(device)
            if self.args.world_size > 1:
                count = self.accelerator.gather(count).sum()
            count = count.clamp(min=1)
            for batch in batches:
                batch["num_ctc_labels"] = count
            if num_items is None:
                num_items = count
        return batches, num_items if num_items is None else num_items.clamp(min=1)

    def _prepare_inputs(self, inputs):
        return self.encode(super()._prepare_inputs(inputs))

    def encode(self, batch: dict) -> dict[str, torch.Tensor]:
        """A collated batch with its clips as encoder frames; those that are new go to the cache."""
        batch = {name: value for name, value in batch.items() if name not in ("tasks", "seconds", "skipped")}
        clips = batch.pop("clips")
        model = self.accelerator.unwrap_model(self.model)
        if trains_encoder(model):  # with gradients, so in its own forward pass
            return batch | pad_features(clips, model.audio_tower.device)
        frames = encode_clips(model, clips, self.cache)
        # A summary is made of means and deviations, which noise would change as no audio does.
        of_windows = model.config.sound_layers is not None and not model.config.sound_summary_size
        augmented = ["audio_frames"] + ["sound_frames"] * of_windows
        for clip, encoded in zip(clips, frames, strict=True):
            for name in augmented:
                if "masked_frames" in clip:
                    masked = clip["masked_frames"][:, None].to(encoded[name].device)
                    encoded[name] = torch.where(masked, encoded[name].mean(0), encoded[name])
                if self.args.frame_noise:
                    clean = encoded[name]
                    encoded[name] = clean + self.args.frame_noise * clean.std() * torch.randn_like(clean)
        return batch | pad_clips(frames)

    def flush_cache(self):
        """Write the features that fill no shard yet."""
        if self.cache is not None:
            self.cache.flush()

    # Optimization

    def _prepare_for_training(self, *args):
        if self.is_deepspeed_enabled:
            hide_whole_parts(self.accelerator, self.model)
        prepared = super()._prepare_for_training(*args)
        if self.is_fsdp_enabled:
            name_as_unsharded(self.model)
        return prepared

    def autocast_smart_context_manager(self, cache_enabled=True):
        # Of a model that FSDP2 shards, accelerate leaves `forward` as it is; others it wraps in autocast itself.
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    def _issue_warnings_after_load(self, load_result):
        # A checkpoint leaves the frozen base parts out: only what else is missing is worth a warning.
        missing = [key for key in load_result.missing_keys if not is_base_key(key, self.model.config)]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            lora = self.lora_learning_rate or self.args.learning_rate
            rates = {
                "lora": lora,
                "audio lora": self.args.audio_lora_learning_rate or lora,
                "speech decoder": self.args.speech_decoder_learning_rate or self.args.learning_rate,
                "other": self.args.learning_rate,
            }
            groups = []
            for kind, rate in rates.items():
                for decays in (True, False):  # none on norms, biases and learned vectors
                    parameters = [p for n, p in named if parameter_kind(n) == kind and (p.ndim >= 2) == decays]
                    if parameters:
                        decay = self.args.weight_decay if decays else 0.0
                        groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.args.adam_epsilon)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs and self.counted_since is not None:
            amounts = torch.tensor(list(self.amounts.values()), dtype=torch.float64, device=self.args.device)
            if self.args.world_size > 1:
                amounts = self.accelerator.reduce(amounts)
            elapsed = time.perf_counter() - self.counted_since
            for name, amount in zip(self.amounts, amounts.tolist(), strict=True):
                logs[f"{name}_per_second"] = round(amount / elapsed, 1)
            self.amounts, self.counted_since = dict.fromkeys(self.amounts, 0.0), None
        super().log(logs, start_time)

    # Checkpoints

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.is_deepspeed_enabled:
            return super().save_model(output_dir, _internal_call)
        # DeepSpeed itself gathers what it has shared out alone, and in the precision of its forward pass.
        state_dict = gathered_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict and shaped_as_unsharded(state_dict))

    def _get_output_dir(self, trial):
        return self.staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """As `Trainer`'s, but written beside its place and moved there when it is whole."""
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.staging = str(output_dir / ".partial")
        try:
            if self.is_world_process_zero():
                shutil.rmtree(self.staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(output_dir / name)
            if self.is_world_process_zero():
                partial = Path(self.staging) / name
                self.state.save_to_json(str(partial / "trainer_state.json"))
                if (output_dir / name).exists():
                    shutil.rmtree(output_dir / name)
                os.replace(partial, output_dir / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self.staging, ignore_errors=True)
            last = last_checkpoint(output_dir)
            raise OSError(
                f"Cannot write {name} to {output_dir} ({error}). Free space there or make it writable; the same "
                f"command then goes on from {Path(last).name + ', which is whole' if last else 'the start'}."
            ) from error
        finally:
            self.staging = None
        if self.is_world_process_zero():
            rotate_checkpoints(
                str(output_dir), self.args.save_total_limit, best_model_checkpoint=self.state.best_model_checkpoint
            )
        self.accelerator.wait_for_everyone()
        self.flush_cache()

    # Evaluation

    def metric_of(self, task: str) -> str | None:
        metric = training_metric(task)
        # The CTC head only transcribes.
        return None if self.data_collator.alignment_only and metric != "wer" else metric

    def check_metrics(self):
        """What would otherwise be found out at the first evaluation only."""
        metrics = {self.metric_of(task) for task in self.eval_dataset.tasks()} - {None}
        best = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if best and best not in metrics:
            raise ValueError(
                f"metric_for_best_model is {best!r}, but the evaluation set, of the tasks "
                f"{', '.join(sorted(self.eval_dataset.tasks()))}, gives {', '.join(sorted(metrics)) or 'no metric'}."
            )
        if "cider" in metrics:
            try:
                require_java()
            except CaptionMetricsError as error:
                raise CaptionMetricsError(f"The evaluation set has captions. {error}") from error

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        started = time.perf_counter()
        with whole_parameters(self.accelerator, self.model):
            examples = self.answers(eval_dataset if eval_dataset is not None else self.eval_dataset)
        answers = defaultdict(list)
        for task, references, answer in examples:
            answers[self.metric_of(task)].append((references, answer))
        metrics = {"epoch": self.state.epoch}
        for metric, pairs in answers.items():
            references, texts = zip(*pairs, strict=True)
            for several, text in pairs[:3]:
                self.log_sample(several[0], text)
            if metric == "wer":
                value = word_error_rate([several[0] for several in references], texts).wer
            elif metric == "cider":
                value = cider_d(references, texts)
            elif metric == "accuracy":
                value = float(correct_answers(references, texts).mean())
            if metric is not None:
                metrics[f"{metric_key_prefix}_{metric}"] = value
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.counted_since is not None:
            self.counted_since += time.perf_counter() - started
        return metrics

    def log_sample(self, reference: str, hypothesis: str):
        from tqdm import tqdm

        tqdm.write(f"  reference  {reference}\n  answer     {hypothesis}")

    @torch.no_grad()
    def answers(self, dataset: ClipDataset) -> list[tuple[str, list[str], str]]:
        """Task, references and greedy answer of each clip, in the dataset's order; batched by length."""
        model, collator = self.accelerator.unwrap_model(self.model), self.data_collator
        was_training = model.training
        model.eval()
        results = [None] * len(dataset)
        order = np.argsort(-dataset.lengths, kind="stable")
        for start in range(0, len(order), self.args.eval_batch_size):
            items = [int(item) for item in order[start : start + self.args.eval_batch_size]]
            examples = [(item, dataset[item]) for item in items]
            examples = [(item, example) for item, example in examples if "skipped" not in example]
            if not examples:
                continue
            frames = encode_clips(model, [example["clip"] for _, example in examples], dataset.cache)
            batch = {key: value.to(model.device) for key, value in pad_clips(frames).items()}
            with self.accelerator.autocast():
                if collator.alignment_only:
                    decoded = ctc_transcripts(model, collator.processor, *model.connect_audio(**batch))
                else:
                    prompts = [
                        collator.prompt_ids(num_frames(clip), example["messages"])
                        for clip, (_, example) in zip(frames, examples, strict=True)
                    ]
                    # A runaway transcript shows after two tokens per audio token; speech has less than one.
                    limit = int(batch["audio_frames_mask"].sum(-1).max()) // 4 + 8
                    if any(training_metric(example["task"]) != "wer" for _, example in examples):
                        limit = max(limit, ANSWER_TOKENS)
                    decoded = generate_answers(model, collator.processor, prompts, batch, limit)
            for (item, example), text in zip(examples, decoded, strict=True):
                results[item] = (example["task"], example["texts"], text)
        model.train(was_training)
        self.flush_cache()
        return [result for result in results if result is not None]


def parameter_kind(name: str) -> str:
    """Which learning rate a trained parameter has."""
    if ".lora_" in name:
        return "audio lora" if name.startswith("audio_tower.") else "lora"
    # The connector's own names for what `start_from_whisper` fills.
    from_whisper = name == "connector.query" or name.startswith(("connector.layers.", "connector.layer_norm."))
    return "speech decoder" if from_whisper else "other"


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint in a directory: one of which the last file, the trainer's state, can be read."""
    found = []
    for state in Path(output_dir).glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((json.loads(state.read_text())["global_step"], str(state.parent)))
        except (ValueError, KeyError):
            continue
    return max(found, default=(0, None))[1]


def save_model(trainer: SalmonnTrainer, processor):
    """The final model in its output directory, in bfloat16, with its processor; pushed to the hub if asked for."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    state_dict, on_float32 = None, model.audio_tower.dtype == torch.float32
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # each process has a part, in its first precision
        if trainer.is_deepspeed_enabled:
            state_dict = gathered_state_dict(model)
        else:
            state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        state_dict = shaped_as_unsharded(state_dict)
        state_dict = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in state_dict.items()}
    else:
        for parameter in model.parameters():  # not model.to: it rounds the frequencies of the position embeddings, too
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.use_cache = True  # Trainer switches it off for itself
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        partial = output_dir / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, state_dict=state_dict)
        if state_dict is not None:  # it noted the precision of the model itself
            model.config.dtype = "bfloat16"
            model.config.save_pretrained(partial)
        processor.save_pretrained(partial)
        for file in sorted(partial.iterdir()):
            os.replace(file, output_dir / file.name)
        partial.rmdir()
        if trainer.args.push_to_hub:
            args = trainer.args
            push_to_hub(output_dir, trainer.hub_model_id, private=args.hub_private_repo, token=args.hub_token)
    if state_dict is None and on_float32:  # as are the features on which it is evaluated next
        for parameter in model.parameters():
            parameter.data = parameter.data.float()


def ctc_transcripts(model, processor, audio_embeds, num_tokens) -> list[str]:
    """Greedy CTC: the best token of each audio embedding, repeats merged, blanks dropped."""
    log_probs = model.ctc_head(audio_embeds, model.ctc_embedding())
    paths = log_probs.argmax(-1).split(num_tokens.tolist())
    token_ids = [merge_repeats(model.ctc_head, path) for path in paths]
    return [text.strip() for text in processor.batch_decode(token_ids)]


def generate_answers(model, processor, prompts: list[list[int]], frames: dict, max_new_tokens: int) -> list[str]:
    """Greedy answers by the language model to prompts about clips, whose `frames` `pad_clips` gave."""
    tokenizer = processor.tokenizer
    rows = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    left = {"batch_first": True, "padding_side": "left"}
    input_ids = pad_sequence(rows, padding_value=tokenizer.pad_token_id, **left)
    generated = model.generate(
        input_ids,
        attention_mask=pad_sequence([torch.ones_like(row) for row in rows], **left),
        **frames,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return [
        text.strip() for text in processor.batch_decode(generated[:, input_ids.shape[1] :], skip_special_tokens=True)
    ]
