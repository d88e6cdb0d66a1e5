"""What the scripts of all stages do: read the recipe, open the data, train, save, evaluate."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

from ..data.arguments import DataArguments
from ..data.augmentation import Augmentation
from ..data.collator import ClipCollator
from ..data.skipped_clips import SkippedClips
from .arguments import SalmonnTrainingArguments
from .checkpoints import last_checkpoint, save_model
from .recipe import parse_recipe
from .trainer import SalmonnTrainer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CheckpointArguments:
    model_name_or_path: str = HfArg(help="SALMONN checkpoint to start from: directory or hub name.")


@dataclass(kw_only=True)
class SpeechEncoderArguments:
    audio_lora_r: int | None = HfArg(default=None, help="Rank of new LoRA in all layers of the speech encoder.")
    sound_layers: list[int] | None = HfArg(default=None, help="Layers of the speech encoder that give sound frames.")
    projector_config: str = HfArg(default="{}", help="Fields of the projector's config: a mapping, or JSON.")


class TrainingStage:
    """
    A script's arguments, those of the dataclass `model_arguments` and of data, augmentation and training, and its
    data, see `DataArguments.load`. `checkpoint` is where the run goes on from: `resume_from_checkpoint`, else the last
    one in `output_dir`. The seed is set, so that what a script makes next is the same in each run.
    """

    def __init__(self, model_arguments: type):
        self.model_args, self.data_args, self.augmentation, self.training_args = parse_recipe(
            (model_arguments, DataArguments, Augmentation, SalmonnTrainingArguments)
        )
        args = self.training_args
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        logger.info("world size %d", args.world_size)
        torch.manual_seed(args.seed)
        self.skipped = SkippedClips(Path(args.output_dir, "skipped.tsv") if args.should_save else None)
        self.train_tables, self.eval_tables = self.data_args.load(self.skipped)
        self.checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)

    def datasets(self, model, processor, train_tables: list | None = None):
        """The training set, of these tables or the recipe's own, and the evaluation set, or `None`."""
        tables = self.train_tables if train_tables is None else train_tables
        seed = self.training_args.data_seed_or_seed
        return self.data_args.datasets(tables, self.eval_tables, model, processor, self.augmentation, seed)

    def train(self, model, processor, collator: ClipCollator, datasets, trainer_class=SalmonnTrainer, **kwargs):
        """Train `model`, from the last checkpoint if there is one, save it, and evaluate what was saved."""
        train_dataset, eval_dataset = datasets
        kwargs |= {"data_collator": collator, "processing_class": processor, "skipped": self.skipped}
        trainer = trainer_class(
            model, self.training_args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs
        )
        trainer.train(resume_from_checkpoint=self.checkpoint)
        save_model(trainer, processor)
        if eval_dataset is not None:
            trainer.evaluate()
