"""What the training scripts share: data with cached encoder features, collation, losses' labels, evaluation by WER."""

import io
import json
import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import soundfile
import torch
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from . import augmentation
from .audio import load_audio
from .checkpoint import is_base_key
from .feature_cache import FeatureCache, build_feature_cache
from .metrics import word_error_rate


def ctc_text(text: str) -> str:
    """A transcript as the CTC head spells it: what is heard, so no case and no punctuation but the apostrophe."""
    return " " + " ".join(re.sub(r"[^\w' ]+", " ", text.lower().replace("’", "'")).split())


def load_speech(files: list[str], text_column: str = "text"):
    """Parquet files with an `audio` column as a `datasets.Dataset` of undecoded clips and their `text`."""
    from datasets import Audio, Value, load_dataset

    dataset = load_dataset("parquet", data_files=list(files), split="train")
    for column in ("audio", text_column):
        if column not in dataset.column_names:
            raise ValueError(f"{files} has no column {column!r}; it has {dataset.column_names}.")
    dataset = dataset.rename_column(text_column, "text") if text_column != "text" else dataset
    return (
        dataset.select_columns(["audio", "text"])
        .cast_column("audio", Audio(decode=False))
        .cast_column("text", Value("string"))
    )


def speech_dataset(rows: list[tuple[np.ndarray, str, str]]):
    """Rows of waveform at 16 kHz, file name and text as a dataset like `load_speech`'s."""
    from datasets import Dataset, Features, Value

    # An undecoded Audio column is this struct; `datasets` itself encodes one only with torchcodec.
    features = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}, "text": Value("string")})
    examples = []
    for waveform, name, text in rows:
        file = io.BytesIO()
        soundfile.write(file, waveform, 16000, format="FLAC")
        examples.append({"audio": {"bytes": file.getvalue(), "path": name}, "text": text})
    return Dataset.from_list(examples, features=features)


def join_clips(dataset, count: int, seconds: tuple[float, float], seed: int = 0):
    """
    `count` longer clips, made of random clips of `dataset` with 0.1 to 0.6 s of silence between them, until a length
    drawn from `seconds` is reached: real recordings are longer than the lines of a dialogue.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        target, parts, texts = rng.uniform(*seconds) * 16000, [], []
        while True:
            row = dataset[int(rng.integers(len(dataset)))]
            waveform = load_audio(row["audio"])
            silence = np.zeros(int(rng.uniform(0.1, 0.6) * 16000), np.float32)
            if sum(map(len, parts)) + len(silence) + len(waveform) > max(target, len(silence) + len(waveform)):
                break
            parts += [silence, waveform]
            texts.append(row["text"].strip())
        rows.append((np.concatenate(parts[1:]), f"joined-{seed}-{index}.flac", " ".join(texts)))
    return speech_dataset(rows)


def change_speed(dataset, speed: float):
    """Its clips played at `speed` times their own, see `augmentation.change_speed`."""
    rows = []
    for index, row in enumerate(dataset):
        waveform = load_audio(row["audio"])
        # Not beyond the 30 s that the encoder hears.
        if len(waveform) / speed < 30 * 16000:
            rows.append((augmentation.change_speed(waveform, speed), f"speed-{speed}-{index}.flac", row["text"]))
    return speech_dataset(rows)


@dataclass
class SpeechArguments:
    """Where the speech is: Parquet files with `audio` and `text` columns."""

    train_files: list[str] = field(metadata={"help": "Parquet files to train on."})
    eval_file: str = field(metadata={"help": "Held-out Parquet file, for the word error rate during training."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the transcript."})
    max_eval_clips: int | None = field(default=None, metadata={"help": "Evaluate on the first of them only."})
    joined_clips: int = field(default=0, metadata={"help": "Longer clips made of joined ones, per file."})
    joined_seconds: list[float] = field(default_factory=lambda: [6.0, 28.0], metadata={"help": "How long they are."})
    speeds: list[float] = field(default_factory=list, metadata={"help": "Add copies at these speeds, e.g. 0.9 1.1."})
    speed_files: list[str] | None = field(default=None, metadata={"help": "Only of these files; default: of all."})
    masked_frames: float = field(default=0.0, metadata={"help": "Share of encoder frames masked in training."})
    feature_cache: str = field(default="runs/feature_cache", metadata={"help": "Directory of encoder features."})

    def load(self):
        """The training parts, one a file, one for each other speed, one for joined clips, and the evaluation part."""
        files = {file: load_speech([file], self.text_column) for file in self.train_files}
        train = list(files.values())
        for file in self.speed_files or self.train_files:
            train += [change_speed(files[file], speed) for speed in self.speeds]
        if self.joined_clips:
            seconds = tuple(self.joined_seconds)
            train += [join_clips(part, self.joined_clips, seconds, seed) for seed, part in enumerate(files.values())]
        evaluation = load_speech([self.eval_file], self.text_column)
        if self.max_eval_clips:
            evaluation = evaluation.select(range(min(self.max_eval_clips, len(evaluation))))
        return train, evaluation


def mask_frames(frames: torch.Tensor, share: float, span: int = 6) -> torch.Tensor:
    """
    Frames `(frames, width)` with about `share` of them, in runs of `span` (120 ms), replaced by their common mean:
    SpecAugment's time masking (Park et al., 2019) on encoder features, as wav2vec 2.0 is fine-tuned with.
    """
    count = int(len(frames) * share / span + torch.rand(()))
    starts = torch.randint(max(len(frames) - span, 1), (count, 1))
    masked = torch.zeros(len(frames), dtype=torch.bool)
    masked[(starts + torch.arange(min(span, len(frames)))).flatten()] = True
    return torch.where(masked[:, None], frames.mean(0), frames)


class CachedSpeechDataset(torch.utils.data.Dataset):
    """
    Transcripts with the cached encoder frames of their clips: `{"audio_frames": (frames, width), "text"}`. For
    training, `masked_frames` is the share of frames to mask, see `mask_frames`.
    """

    def __init__(self, parts: list[tuple[FeatureCache, list[str]]], masked_frames: float = 0.0):
        self.parts = parts
        self.masked_frames = masked_frames
        self.index = [(part, row) for part, (cache, _) in enumerate(parts) for row in range(len(cache))]
        self.index = [(part, row) for part, row in self.index if parts[part][1][row].strip()]

    @classmethod
    def build(cls, datasets: list, model, feature_extractor, cache_dir: str, masked_frames: float = 0.0):
        parts = []
        for dataset in datasets:
            texts = [text or "" for text in dataset["text"]]
            parts.append((build_feature_cache(dataset["audio"], model, feature_extractor, cache_dir), texts))
        return cls(parts, masked_frames)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, item):
        part, row = self.index[item]
        cache, texts = self.parts[part]
        frames = mask_frames(cache[row], self.masked_frames) if self.masked_frames else cache[row]
        return {"audio_frames": frames, "text": texts[row]}

    @cached_property
    def lengths(self) -> list[int]:
        """Encoder frames of each example, the measure of its cost."""
        return [int(self.parts[part][0].lengths[row]) for part, row in self.index]

    @property
    def texts(self) -> list[str]:
        return [self.parts[part][1][row] for part, row in self.index]


@dataclass
class SpeechCollator:
    """
    Examples to a batch: frames right-padded, text left-padded with the answer's end token, labels on the answer only.

    Args:
        processor ([`SalmonnProcessor`]).
        ctc_token_ids (`list[int]`): the CTC head's tokens; empty for no `ctc_labels`.
        ctc_merges (`int`, *optional*): see `ctc_tokenizer`.
        alignment_only (`bool`): frames and `ctc_labels` alone, as the alignment stage needs them.
    """

    processor: object
    ctc_token_ids: list[int]
    ctc_merges: int | None = None
    alignment_only: bool = False

    @cached_property
    def ctc_tokenizer(self) -> Tokenizer:
        return ctc_tokenizer(self.processor.tokenizer, self.ctc_merges)

    @cached_property
    def ctc_index(self) -> dict[int, int]:
        return {token: index for index, token in enumerate(self.ctc_token_ids)}

    @cached_property
    def prompt(self) -> str:
        messages = self.processor.transcription_messages()
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        frames = [example["audio_frames"] for example in examples]
        batch = {
            "audio_frames": pad_sequence(frames, batch_first=True),
            "audio_frames_mask": pad_sequence(
                [torch.ones(len(f), dtype=torch.bool) for f in frames], batch_first=True
            ),
        }
        if self.ctc_token_ids:
            batch["ctc_labels"] = pad_sequence(
                [self.ctc_labels(example["text"]) for example in examples], batch_first=True, padding_value=-100
            )
        if self.alignment_only:
            return batch

        tokenizer = self.processor.tokenizer
        prompts = [self.prompt_ids(len(f)) for f in frames]
        answers = [
            tokenizer(example["text"].strip(), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for example in examples
        ]
        rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [torch.tensor([-100] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
        left = {"batch_first": True, "padding_side": "left"}
        batch["input_ids"] = pad_sequence(rows, padding_value=tokenizer.pad_token_id, **left)
        batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], **left)
        batch["labels"] = pad_sequence(labels, padding_value=-100, **left)
        return batch

    def prompt_ids(self, num_frames: int) -> list[int]:
        audio_tokens = self.processor.audio_token * self.processor.num_audio_tokens(num_frames)
        text = self.prompt.replace(self.processor.audio_token, audio_tokens)
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def ctc_labels(self, text: str) -> torch.Tensor:
        tokens = self.ctc_tokenizer.encode(ctc_text(text), add_special_tokens=False).ids
        return torch.tensor([self.ctc_index[token] for token in tokens if token in self.ctc_index])


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


def ctc_vocabulary(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    """The tokens that `ctc_tokenizer` spells the transcripts with, sorted."""
    rows = tokenizer.encode_batch([ctc_text(text) for text in texts], add_special_tokens=False)
    return sorted({token for row in rows for token in row.ids})


def standardise_frames(model, dataset: "CachedSpeechDataset", clips: int = 2000, seed: int = 0):
    """
    Start the LayerNorm behind the speech encoder so that every feature has mean 0 and variance 1 over `clips` random
    clips: a few of Whisper's features are ten times the others, and would drown them in the Q-Former's first layer.
    """
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:clips].tolist()
    frames = torch.cat([dataset[index]["audio_frames"] for index in chosen]).float()
    normed = torch.nn.functional.layer_norm(frames, frames.shape[-1:])
    with torch.no_grad():
        model.audio_norm.weight.copy_(1 / normed.std(0))
        model.audio_norm.bias.copy_(-normed.mean(0) / normed.std(0))


def freeze_base_parts(model, alignment_only: bool = False):
    """
    Leave only what SALMONN trains with gradients: LayerNorms, Q-Former, projection, CTC head and LoRA, in float32; the
    encoders and the language model keep their precision. `alignment_only`: LoRA stays frozen as well.
    """
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        is_lora = ".lora_" in name
        if name.startswith(("audio_norm", "sound_norm", "connector", "ctc_head")) or (is_lora and not alignment_only):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.train()  # puts the frozen encoders in evaluation mode


class SalmonnTrainer(Trainer):
    """
    `Trainer` with length-grouped batches, a learning rate of its own for LoRA, and word error rate on the evaluation
    set: of greedy transcripts, or of the CTC head's where only that is trained.
    """

    def __init__(self, *args, lora_learning_rate: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_learning_rate = lora_learning_rate
        if self.args.bf16 or self.args.fp16:
            # Autocast brings LoRA's inputs to its precision; PEFT would first make a float32 copy of each of them.
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.cast_input_dtype_enabled = False

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        generator = torch.Generator().manual_seed(args.data_seed if args.data_seed is not None else args.seed)
        return LengthGroupedSampler(
            args.train_batch_size * args.gradient_accumulation_steps,
            lengths=self.train_dataset.lengths,
            generator=generator,
        )

    def _issue_warnings_after_load(self, load_result):
        # A checkpoint leaves the frozen base parts out: only what else is missing is worth a warning.
        missing = [key for key in load_result.missing_keys if not is_base_key(key, self.model.config)]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            lora_rate = self.lora_learning_rate or self.args.learning_rate
            groups = []
            for is_lora, rate in ((False, self.args.learning_rate), (True, lora_rate)):
                for decays in (True, False):  # none on norms, biases and learned vectors
                    parameters = [p for n, p in named if (".lora_" in n) == is_lora and (p.ndim >= 2) == decays]
                    if parameters:
                        decay = self.args.weight_decay if decays else 0.0
                        groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.args.adam_epsilon)
        return self.optimizer

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        hypotheses = self.transcribe(dataset)
        result = word_error_rate(dataset.texts, hypotheses)
        metrics = {f"{metric_key_prefix}_wer": result.wer, "epoch": self.state.epoch}
        for reference, hypothesis in list(zip(dataset.texts, hypotheses, strict=True))[:3]:
            self.log_sample(reference, hypothesis)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log_sample(self, reference: str, hypothesis: str):
        from tqdm import tqdm

        tqdm.write(f"  reference  {reference}\n  transcript {hypothesis}")

    @torch.inference_mode()
    def transcribe(self, dataset) -> list[str]:
        """Greedy transcripts of a `CachedSpeechDataset`, in its order; batched by length."""
        model, collator = self.accelerator.unwrap_model(self.model), self.data_collator
        was_training = model.training
        model.eval()
        texts = [""] * len(dataset)
        order = np.argsort(dataset.lengths)[::-1]
        for start in range(0, len(order), self.args.eval_batch_size):
            items = order[start : start + self.args.eval_batch_size]
            batch = collator([dataset[int(item)] for item in items])
            batch = {key: value.to(model.device) for key, value in batch.items()}
            with self.accelerator.autocast():
                audio_embeds, num_tokens = model.connect_audio(batch["audio_frames"], batch["audio_frames_mask"])
                if collator.alignment_only:
                    decoded = ctc_transcripts(model, collator.processor, audio_embeds, num_tokens)
                else:
                    decoded = generate_transcripts(model, collator, batch["audio_frames_mask"], audio_embeds)
            for item, text in zip(items, decoded, strict=True):
                texts[item] = text
        model.train(was_training)
        return texts


def save_model(trainer: SalmonnTrainer, processor):
    """The final model in its output directory, in bfloat16, with its processor; pushed to the hub if asked for."""
    model = trainer.accelerator.unwrap_model(trainer.model).to(torch.bfloat16)
    model.config.use_cache = True  # Trainer switches it off for itself
    if trainer.is_world_process_zero():
        model.save_pretrained(trainer.args.output_dir)
        processor.save_pretrained(trainer.args.output_dir)
        if trainer.args.push_to_hub:
            model.push_to_hub(trainer.hub_model_id)
            processor.push_to_hub(trainer.hub_model_id)


def ctc_transcripts(model, processor, audio_embeds, num_tokens) -> list[str]:
    """Greedy CTC: the best token of each audio embedding, repeats merged, blanks dropped."""
    log_probs = model.ctc_head(audio_embeds, model.get_input_embeddings())
    rows = [row.argmax(-1).unique_consecutive() for row in log_probs.split(num_tokens.tolist())]
    token_ids = [model.ctc_head.token_ids[row[row > 0] - 1].tolist() for row in rows]
    return [text.strip() for text in processor.batch_decode(token_ids)]


def generate_transcripts(model, collator, frames_mask, audio_embeds) -> list[str]:
    """Greedy transcripts by the language model, from audio embeddings."""
    tokenizer = collator.processor.tokenizer
    prompts = [torch.tensor(collator.prompt_ids(int(n))) for n in frames_mask.sum(-1)]
    left = {"batch_first": True, "padding_side": "left"}
    input_ids = pad_sequence(prompts, padding_value=tokenizer.pad_token_id, **left).to(audio_embeds.device)
    attention_mask = pad_sequence([torch.ones_like(p) for p in prompts], **left).to(audio_embeds.device)
    # A runaway transcript shows after two tokens per audio token; speech has less than one.
    generated = model.generate(
        inputs_embeds=model.merge_audio(input_ids, audio_embeds),
        attention_mask=attention_mask,
        max_new_tokens=int(frames_mask.sum(-1).max()) // 4 + 8,
        do_sample=False,
    )
    return [text.strip() for text in collator.processor.batch_decode(generated, skip_special_tokens=True)]
