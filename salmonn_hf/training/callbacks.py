"""What [`SalmonnTrainer`] does beside its steps, as callbacks."""

import math
import time

import torch
from transformers import TrainerCallback


class EpochOfSampler(TrainerCallback):
    """Tells [`MixtureSampler`] its epoch, which accelerate does not in a resumed run of several processes."""

    def __init__(self, trainer):
        self.trainer, self.epoch = trainer, 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = max(math.ceil(len(train_dataloader) / args.gradient_accumulation_steps), 1)
        self.epoch = state.global_step // steps

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.train_sampler.set_epoch(self.epoch)
        self.epoch += 1


class Throughput(TrainerCallback):
    """
    Logs beside the loss `tokens_per_second` (of the language model's rows; of CTC targets where it is not run) and
    `audio_seconds_per_second`, over all processes, without the time of evaluation.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.amounts, self.counted_since = {"tokens": 0.0, "audio_seconds": 0.0}, None

    def start(self):
        if self.counted_since is None:
            self.counted_since = time.perf_counter()

    def count(self, batch: dict):
        rows = batch["attention_mask"] if "attention_mask" in batch else batch["ctc_labels"] != -100
        self.amounts["tokens"] += float(rows.sum())
        self.amounts["audio_seconds"] += batch["seconds"]

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.counted_since is not None:
            self.counted_since += sum(value for name, value in metrics.items() if name.endswith("_runtime"))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or self.counted_since is None:
            return
        amounts = torch.tensor(list(self.amounts.values()), dtype=torch.float64, device=self.accelerator.device)
        if args.world_size > 1:
            amounts = self.accelerator.reduce(amounts)
        rates = (amounts / (time.perf_counter() - self.counted_since)).tolist()
        rates = {f"{name}_per_second": round(rate, 1) for name, rate in zip(self.amounts, rates, strict=True)}
        logs.update(rates)
        state.log_history[-1].update(rates)
        self.amounts, self.counted_since = dict.fromkeys(self.amounts, 0.0), None


class FlushFeatureCache(TrainerCallback):
    """Writes the features that fill no shard yet, of all [`FeatureCache`]s given."""

    def __init__(self, *caches):
        self.caches = caches

    def flush(self, args, state, control, **kwargs):
        for cache in self.caches:
            cache.flush()

    on_save = on_evaluate = on_train_end = flush
