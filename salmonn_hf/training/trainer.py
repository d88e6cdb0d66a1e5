"""The trainer of all stages."""

import contextlib
import logging
import math
import time

import torch
from accelerate.utils import gather_object
from peft.tuners.lora import LoraLayer
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import speed_metrics

from ..data.clip_dataset import ClipDataset
from ..data.encoder_features import encode_clips, pad_features, trains_encoder
from ..data.mixture_sampler import MixtureSampler
from ..data.skipped_clips import SkippedClips
from ..data.streamed_clips import StreamedClips
from ..model.checkpoint import is_base_key
from ..model.clip_tensors import pad_clips
from . import evaluation, sharding
from .arguments import SalmonnTrainingArguments
from .callbacks import EpochOfSampler, FlushFeatureCache, Throughput
from .checkpoints import save_checkpoint
from .parameter_groups import optimizer_of
from .streamed_run import SkipTrainedClips, StreamedRun

logger = logging.getLogger(__name__)


class SalmonnTrainer(Trainer):
    """
    `Trainer` with the mixture of sources, frozen encoders that run once per clip, learning rates by kind of parameter,
    checkpoints that are complete or not there, and evaluation by greedy answers to the evaluation set, some of which
    are printed: `eval_wer` of transcripts, `eval_cider` (CIDEr-D) of captions and `eval_accuracy` of short answers,
    whichever tasks it has. Where only the alignment is trained, `eval_wer` of the CTC head's transcripts.
    `compute_metrics` gets these answers as from `Seq2SeqTrainer`, and adds to the metrics.

    Args:
        args, kwargs: as for `Trainer`; `args` are [`SalmonnTrainingArguments`], `data_collator` is a [`ClipCollator`].
        skipped ([`SkippedClips`], *optional*): where clips that cannot be decoded are listed.

    Raises:
        ValueError: for an argument that would have no effect; if the evaluation set does not give
            `metric_for_best_model`; if frames that are to be masked, or noised, come from an encoder that is trained.
        CaptionMetricsError: if it has captions, and what scores them, Java among it, is not installed.
    """

    # Its set-up needs the trainer's own model and accelerator, which callbacks are not given at this time.
    def __init__(self, *args, skipped: SkippedClips | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.refuse_what_has_no_effect()
        # Its backward pass gives NaN for masked sequences of 64, 192, ... tokens (pytorch/pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.skipped = skipped or SkippedClips()
        self.model.register_load_state_dict_post_hook(expect_no_base_parts)
        if self.args.bf16 or self.args.fp16:
            # Autocast brings LoRA's inputs to its precision; PEFT would first make a float32 copy of each of them.
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.cast_input_dtype_enabled = False
        sharding.shard_on_cpus(self.accelerator, self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        if self.is_fsdp_enabled:
            sharding.choose_what_is_sharded(self.accelerator, self.model)
            self.add_callback(sharding.NameAsUnsharded)
        if self.is_deepspeed_enabled:
            sharding.hide_unsharded_parts(self.accelerator, self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            sharding.gather_as_unsharded(self.accelerator, self.model)
        self.optimizer_cls_and_kwargs = optimizer_of(self)

        self.throughput = Throughput(self.accelerator)
        self.callback_handler.callbacks.insert(0, self.throughput)  # before those that report its numbers
        caches = [of_clips(dataset, "cache") for dataset in (self.train_dataset, self.eval_dataset)]
        self.add_callback(FlushFeatureCache(*(cache for cache in caches if cache is not None)))
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        if isinstance(self.train_dataset, StreamedClips):
            self.train_on_stream()
        else:
            self.add_callback(EpochOfSampler(self))

    def refuse_what_has_no_effect(self):
        if not isinstance(self.args, SalmonnTrainingArguments):
            raise ValueError(f"args are {type(self.args).__name__}; give SalmonnTrainingArguments.")
        for name, reason in {
            "model_init": "the model is prepared for training once; give it as model",
            "compute_loss_func": "the model computes its losses itself; override compute_loss",
            "preprocess_logits_for_metrics": "evaluation generates answers; compute_metrics gets these",
        }.items():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} would have no effect: {reason}.")
        if isinstance(self.eval_dataset, dict):
            raise ValueError("eval_dataset is a dict; give one ClipDataset: each of its tasks has its own metric.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs, and DataParallel cannot split clips between them. Start a "
                "process for each with accelerate launch or torchrun, or show one by CUDA_VISIBLE_DEVICES."
            )
        if self.eval_dataset is not None:
            # What compute_metrics gives beside, is found out at the first evaluation.
            best = None if self.compute_metrics is not None else self.args.metric_for_best_model
            evaluation.check_metrics(self.eval_dataset, self.data_collator.alignment_only, best)
        changes_frames = of_clips(self.train_dataset, "masked_frames") or self.args.frame_noise
        if trains_encoder(self.model) and changes_frames:
            raise ValueError(
                "masked_frames and frame_noise change what a frozen speech encoder gave; with LoRA inside the encoder "
                "leave them out, and set time_masks, frequency_masks or snr_db instead."
            )

    # Data

    def train_on_stream(self):
        if self.args.auto_find_batch_size or self.accelerator.dataloader_config.dispatch_batches:
            raise ValueError(
                "A stream cannot be read with auto_find_batch_size or dispatch_batches: its clips are counted by the "
                "batch, and each process reads it and takes its share. Leave them out, or streaming."
            )
        self.accelerator.dataloader_config.dispatch_batches = False
        stream, clips = self.train_dataset, self.get_total_train_batch_size(self.args)
        self.train_dataset = StreamedRun(stream, self.args.max_steps * clips)
        self.add_callback(SkipTrainedClips(stream, self._train_batch_size * self.args.world_size))

    # `Trainer` takes no sampler as an argument, and neither a callback nor the collator chooses the clips.
    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        self.train_sampler = MixtureSampler(
            self.train_dataset,
            self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.data_seed_or_seed,
            args.train_sampling_strategy == "group_by_length",
        )
        return self.train_sampler

    # Here alone all batches of an optimizer step are at hand: the CTC loss is a mean over the targets of all of them.
    # The collator sees one batch, and callbacks see none.
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.throughput.start()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.throughput.count(batch)
            for path, reason in batch["skipped"]:
                self.skipped.add(path, reason)
                logger.warning("skipped %s: %s", path, reason)
        if batches and "ctc_labels" in batches[0]:
            targets = [batch[name] for batch in batches for name in ("ctc_labels", "caption_labels") if name in batch]
            count = sum((labels != -100).sum() for labels in targets).to(device)
            if self.args.world_size > 1 and self.args.average_tokens_across_devices:
                count = self.accelerator.gather(count).sum()
            for batch in batches:
                batch["num_alignment_labels"] = count.clamp(min=1)
            num_items = count if num_items is None else num_items
        return batches, num_items if num_items is None else num_items.clamp(min=1)

    # Losses

    # The encoders run on the trainer's device, which the collator's workers do not have, and two losses are added.
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self.encode(inputs)
        # Of a model that FSDP2 shards, accelerate leaves `forward` as it is; others it wraps in autocast itself.
        with self.accelerator.autocast() if self.is_fsdp_enabled else contextlib.nullcontext():
            if "labels" in inputs:
                loss, outputs = self.answer_loss(model, inputs, num_items_in_batch)
                if outputs.alignment_loss is not None:  # as the other, this batch's share of the mean over all targets
                    loss = loss + self.args.ctc_loss_weight * outputs.alignment_loss
            else:
                outputs = model(**inputs)
                loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, outputs) if return_outputs else loss

    def answer_loss(self, model, inputs: dict, num_items_in_batch):
        """The next-token loss of the answers, this batch's share of the step's mean; and the model's outputs."""
        count = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        # Answers stand at the end of left-padded rows: no logits for the positions before the first of them.
        labels = inputs["labels"]
        first = int((labels != -100).any(0).int().argmax())
        outputs = model(**inputs, **count, logits_to_keep=min(labels.shape[1] - first + 1, labels.shape[1]))
        return outputs.loss, outputs

    def encode(self, batch: dict) -> dict[str, torch.Tensor]:
        """A collated batch with its clips as encoder frames; those that are new go to the cache."""
        batch = {name: value for name, value in batch.items() if name not in ("tasks", "seconds", "skipped")}
        clips = batch.pop("clips")
        model = self.accelerator.unwrap_model(self.model)
        if trains_encoder(model):  # with gradients, so in its own forward pass
            return batch | pad_features(clips, model.audio_tower.device)
        dataset = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        frames = encode_clips(model, clips, of_clips(dataset, "cache"))
        # What names a sound takes means and deviations of its frames, which noise would change as no audio does.
        of_windows = model.config.sound_layers is not None and not model.config.projector_config.names_sounds
        for clip, encoded in zip(clips, frames, strict=True):
            for name in ["audio_frames"] + ["sound_frames"] * of_windows:
                clean = encoded[name]
                if "masked_frames" in clip:
                    clean = torch.where(clip["masked_frames"][:, None].to(clean.device), clean.mean(0), clean)
                if self.args.frame_noise:
                    clean = clean + self.args.frame_noise * clean.std() * torch.randn_like(clean)
                encoded[name] = clean
        return batch | pad_clips(frames)

    # Checkpoints

    # Callbacks run behind it, when an incomplete checkpoint would be in its place already.
    def _save_checkpoint(self, model, trial):
        save_checkpoint(self, lambda: super(SalmonnTrainer, self)._save_checkpoint(model, trial))

    # Evaluation

    # `Trainer` evaluates by the logits of one forward pass; here answers are generated, of batches by length.
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if ignore_keys is not None:
            raise ValueError("ignore_keys would have no effect: evaluation generates answers. Leave it out.")
        self._memory_tracker.start()
        started = time.time()
        alignment_only = self.data_collator.alignment_only
        answers = self.answers(eval_dataset if eval_dataset is not None else self.eval_dataset)
        if self.is_world_process_zero():
            evaluation.print_samples(answers, alignment_only)
        scores = evaluation.score_answers(answers, alignment_only)
        if self.compute_metrics is not None:
            prediction = evaluation.as_prediction(answers, self.data_collator.processor.tokenizer)
            scores |= self.compute_metrics(prediction)
        metrics = {f"{metric_key_prefix}_{name.removeprefix('eval_')}": value for name, value in scores.items()}
        steps = math.ceil(len(answers) / (self.args.eval_batch_size * self.args.world_size))
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(answers), num_steps=steps)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def answers(self, dataset: ClipDataset) -> list[evaluation.Answer]:
        """The model's answers to all clips, in the dataset's order, on every process; each is made by one of them."""
        model, collator = self.accelerator.unwrap_model(self.model), self.data_collator
        size, processes = self.args.eval_batch_size, self.args.world_size
        segments, clips = evaluation.plan_segments(dataset, collator.alignment_only)
        batches = [range(start, min(start + size, len(segments))) for start in range(0, len(segments), size)]
        was_training = model.training
        model.eval()
        if hasattr(self.optimizer, "eval"):  # of some, the weights to evaluate are others than those to train on
            self.optimizer.eval()
        dtypes = {parameter.dtype for parameter in model.parameters()} | {model.audio_tower.dtype}
        autocast = self.accelerator.autocast if len(dtypes) > 1 else contextlib.nullcontext
        texts = []
        with sharding.unsharded_parameters(self.accelerator, self.model):
            for turn in range(0, len(batches), processes):
                number = turn + self.args.process_index
                if number >= len(batches) and not self.is_deepspeed_enabled:
                    break
                # DeepSpeed gathers a layer on all processes at once: one without a batch repeats another's.
                places = batches[min(number, len(batches) - 1)]
                batch = [segments[place] for place in places]
                synced = {"synced_gpus": self.is_deepspeed_enabled}
                found = evaluation.answer_segments(model, collator, dataset, batch, autocast, **synced)
                if number < len(batches):
                    texts += zip(places, found, strict=True)
        model.train(was_training)
        if processes > 1:
            texts = gather_object(texts)
        return evaluation.join_segments(segments, dict(texts), clips)


def of_clips(dataset, attribute: str):
    """Of a [`ClipDataset`], or the one behind a stream; `None` where there is none."""
    return getattr(getattr(dataset, "clips", dataset), attribute, None)


def expect_no_base_parts(model, keys):
    """A checkpoint leaves the frozen base parts out: `Trainer` is to warn of what else is missing alone."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if not is_base_key(key, model.config)]
