"""`TrainingArguments` with the defaults and the settings of [`SalmonnTrainer`]."""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import yaml
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

# What `TrainingArguments` has and this trainer could only ignore.
REFUSED = yaml.safe_load(Path(__file__).with_name("refused_arguments.yaml").read_text(encoding="utf-8"))


@dataclass
class SalmonnTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with what [`SalmonnTrainer`] needs as defaults. `metric_for_best_model`, by which it stops
    early and chooses the best checkpoint, is "wer" (the default), "cider" or "accuracy", or the same behind "eval_".

    Raises:
        ValueError: if it should stop early but never evaluates; for an argument that would have no effect.
    """

    optim: str = HfArg(default="adamw_torch", help="Any optimizer of transformers; its fused AdamW rounds otherwise.")
    remove_unused_columns: bool = False
    hub_strategy: str = HfArg(
        default="end", help="What --push_to_hub pushes: the final model; 'every_save': each checkpoint too."
    )
    train_sampling_strategy: str = HfArg(default="group_by_length", help="Or 'random': any lengths in a batch.")
    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after so many evaluations without a better metric_for_best_model."
    )
    frame_noise: float = HfArg(default=0.0, help="Noise on the encoder's frames, as a share of their deviation.")
    ctc_loss_weight: float = HfArg(default=0.1, help="Weight of the CTC loss beside that of the answers; 0: none.")
    lora_learning_rate: float | None = HfArg(default=None, help="Of the LLM's LoRA; default: learning_rate.")
    audio_lora_learning_rate: float | None = HfArg(
        default=None, help="Of LoRA in the speech encoder; default: that of LoRA in the language model."
    )
    pretrained_projector_learning_rate: float | None = HfArg(
        default=None, help="Of what a projector takes from a pretrained model; default: learning_rate."
    )

    @property
    def data_seed_or_seed(self) -> int:
        """By which clips are ordered and augmented: `data_seed`, else `seed`, by which new weights are drawn."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Precision of what is not trained."""
        return torch.bfloat16 if self.bf16 or self.fp16 else torch.float32

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True  # bf16 is refused on a machine without a GPU unless it is told
        if self.early_stopping_patience is not None:
            if self.eval_strategy == "no":
                raise ValueError("early_stopping_patience needs evaluations: set eval_strategy, or leave it out.")
            # A resumed run counts on where it was.
            self.restore_callback_states_from_checkpoint = True
            self.load_best_model_at_end = True
        uses_metric = self.save_strategy == "best" or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        if self.metric_for_best_model is None and (uses_metric or self.load_best_model_at_end):
            self.metric_for_best_model = "wer"
        if self.greater_is_better is None and self.metric_for_best_model in ("wer", "eval_wer"):
            self.greater_is_better = False
        super().__post_init__()
        # Models are put together from their base parts, which zero.Init cannot do: they are shared out afterwards.
        unset_hf_deepspeed_config()
        self.refuse_what_has_no_effect()

    def refuse_what_has_no_effect(self):
        for argument in fields(self):
            default = argument.default if argument.default_factory is MISSING else argument.default_factory()
            name, value = argument.name, getattr(self, argument.name)
            if name in REFUSED and value != default:
                raise ValueError(f"{name}={value!r} would have no effect: {REFUSED[name]}. Leave it out.")
        if (order := self.train_sampling_strategy) not in ("group_by_length", "random"):
            raise ValueError(f"train_sampling_strategy is {order!r}; choose 'group_by_length' or 'random'.")
