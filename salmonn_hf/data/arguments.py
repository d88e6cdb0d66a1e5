"""The data half of a recipe."""

from dataclasses import dataclass

import jinja2
from transformers.hf_argparser import HfArg

from .augmentation import Augmentation
from .clip_dataset import ClipDataset
from .clip_table import ClipTable
from .encoder_features import trains_encoder
from .feature_cache import FeatureCache, encoder_identity
from .joined_clips import join_clips
from .skipped_clips import SkippedClips
from .sources import Source
from .streamed_clips import StreamedClips
from .task_prompts import SYSTEM_PROMPT

SHORT_FORM = ("joined_clips", "speeds", "speed_files")


@dataclass
class DataArguments:
    """
    `sources` and `eval_sources`, see [`Source`]; or beside them, as a short form for transcription, `train_files` and
    `eval_file`: Parquet files with `audio` and `text` columns.

    Raises:
        ValueError: for keys that contradict each other, and without any data.
    """

    sources: list[str] = HfArg(default_factory=list, help="Sources to train on; as JSON: '{\"path\": …}'.")
    eval_sources: list[str] = HfArg(default_factory=list, help="Held-out sources, evaluated on.")
    train_files: list[str] = HfArg(default_factory=list, help="Parquet files to train on.")
    eval_file: str | None = HfArg(default=None, help="Held-out Parquet file.")
    text_column: str = HfArg(default="text", help="Column of these files that holds the transcript.")
    max_eval_clips: int | None = HfArg(default=None, help="Evaluate on the first of each source only.")
    joined_clips: int = HfArg(default=0, help="Longer clips made of joined ones, per training file.")
    joined_seconds: list[float] = HfArg(default_factory=lambda: [6.0, 28.0], help="How long they are.")
    speeds: list[float] = HfArg(default_factory=list, help="Add copies at these speeds, e.g. 0.9 1.1.")
    speed_files: list[str] | None = HfArg(default=None, help="Only of these files; default: of all.")
    min_seconds: float = HfArg(default=0.0, help="Shorter clips are skipped.")
    max_seconds: float = HfArg(default=30.0, help="Longer clips are skipped.")
    masked_frames: float = HfArg(default=0.0, help="Share of encoder frames masked in training.")
    system_prompt: bool = HfArg(default=False, help="Begin prompts of tasks with the system text.")
    shuffle_buffer: int = HfArg(default=1000, help="Clips that streams are shuffled among.")
    feature_cache: str = HfArg(default="runs/feature_cache", help="Directory of encoder features; '': no.")
    feature_cache_gigabytes: float = HfArg(default=50.0, help="Beyond it the oldest are removed.")

    def __post_init__(self):
        given = [key for key in SHORT_FORM if getattr(self, key)]
        if given and not self.train_files:
            raise ValueError(f"{', '.join(given)}: of train_files alone, of which the recipe has none; name some.")
        if not self.sources and not self.train_files:
            raise ValueError("The recipe has neither sources nor train_files; name what is to be trained on.")
        if not 0 <= self.min_seconds < self.max_seconds <= 30:
            limits = f"min_seconds {self.min_seconds} and max_seconds {self.max_seconds}"
            raise ValueError(f"{limits} must be in order, from 0 to the 30 s that the encoder takes.")
        if not 0 <= self.masked_frames < 1:
            raise ValueError(f"masked_frames is {self.masked_frames}; give a share from 0 to below 1.")

    def training_sources(self) -> list[Source]:
        """A source for each training file, and one for each of its other speeds; then `sources`."""
        columns = {"text": self.text_column}
        copies = [(file, speed) for file in self.speed_files or self.train_files for speed in self.speeds]
        files = [(file, 1.0) for file in self.train_files]
        short = [Source(path=file, columns=columns, speed=speed) for file, speed in files + copies]
        return short + [Source.parse(settings) for settings in self.sources]

    def evaluation_sources(self) -> list[Source]:
        short = [Source(path=self.eval_file, columns={"text": self.text_column})] if self.eval_file else []
        return short + [Source.parse(settings) for settings in self.eval_sources]

    def load(self, skipped: SkippedClips | None = None) -> tuple[list[ClipTable] | list[Source], list[ClipTable]]:
        """
        Tables of each training source (and each file's joined clips), and of each evaluation source. If one training
        source is a stream, all are: then the sources themselves come in place of their tables.
        """
        skipped = skipped or SkippedClips()
        limits = {"min_seconds": self.min_seconds, "max_seconds": self.max_seconds, "skipped": skipped}
        train, held_out = self.training_sources(), self.evaluation_sources()
        if not any(source.streaming for source in train):
            train = [ClipTable(source, **limits) for source in train]
            for seed, table in enumerate(train[: len(self.train_files)] if self.joined_clips else []):
                joined = join_clips(table, self.joined_clips, tuple(self.joined_seconds), seed)
                train.append(ClipTable(Source(path=f"joined clips of {table.source.path}"), joined, **limits))
        evaluation = [ClipTable(source, **limits, max_clips=self.max_eval_clips) for source in held_out]
        skipped.report()
        return train, evaluation

    def datasets(self, train: list, evaluation: list, model, processor, augmentation: Augmentation, seed: int):
        """The training and the evaluation set of what `load` gave; `None` for no evaluation."""
        if not model.projector.transcribing_parameters and any(source.is_text for source in self.training_sources()):
            raise ValueError("The projector does not transcribe: its language model learns from no text (.txt) alone.")
        extractor, cache = processor.feature_extractor, None
        if self.feature_cache and not trains_encoder(model):
            cache = FeatureCache(self.feature_cache, encoder_identity(model, extractor), self.feature_cache_gigabytes)
        system = SYSTEM_PROMPT if self.system_prompt else None
        shared = {"system": system, "system_turn": takes_system_turn(processor), "cache": cache}
        random = {"augmentation": augmentation, "masked_frames": self.masked_frames, "seed": seed}
        streams = isinstance(train[0], Source)
        training_set = ClipDataset([] if streams else train, extractor, **shared, **random)
        if streams:
            limits = (self.min_seconds, self.max_seconds)
            training_set = StreamedClips(training_set, train, self.shuffle_buffer, *limits)
        return training_set, ClipDataset(evaluation, extractor, **shared) if evaluation else None


def takes_system_turn(processor) -> bool:
    """Whether the chat template takes a system turn; Gemma 2's, for one, raises an error."""
    try:
        processor.apply_chat_template([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    except jinja2.TemplateError:
        return False
    return True
