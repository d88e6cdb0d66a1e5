"""Convert a ggml Whisper file (fp32/fp16) into a directory that transformers loads.

File layout: magic, 11 int32 hyper-parameters, mel filters, vocabulary (token bytes in id order, special tokens
left out), then tensors under openai-whisper's names with their dimensions innermost first.
"""

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import transformers  # whose classes are imported when they are first named
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.whisper.configuration_whisper import NON_SPEECH_TOKENS, NON_SPEECH_TOKENS_MULTI
from transformers.models.whisper.tokenization_whisper import LANGUAGES

BYTE_ALPHABET = bytes_to_unicode()
GGML_MAGIC = 0x67676D6C
MULTILINGUAL_VOCAB_SIZE = 51865
TENSOR_DTYPES = {0: np.float32, 1: np.float16}
# "header": its fields; "tensors": openai-whisper name part -> transformers name part, applied in this order.
NAMES = json.loads(Path(__file__).with_name("ggml_names.json").read_text())


@dataclass
class GgmlWhisper:
    """Everything a ggml Whisper file holds.

    `header` maps the names of its fields to ints; `mel_filters` is (n_mels, n_fft // 2 + 1); `vocabulary` is
    token bytes in id order; `tensors` maps openai-whisper names to arrays in their usual (outermost first) shape.
    """

    header: dict[str, int]
    mel_filters: np.ndarray
    vocabulary: list[bytes]
    tensors: dict[str, np.ndarray]


def convert_whisper_ggml(source: str | Path, destination: str | Path) -> Path:
    """Write `source`, a ggml Whisper file, as a transformers directory at `destination` (made if missing).

    Weights are stored in float16 where that is exact, as in the official checkpoints, and in float32 otherwise;
    config.json asks for float32, which is how the hub's copies of these models load.

    Raises:
        ValueError: the file is truncated, quantised, not ggml, or not a Whisper model of a known vocabulary.
    """
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    ggml = read_ggml_whisper(source)
    tokens = SpecialTokens(ggml.header["n_vocab"])

    config = whisper_config(ggml.header, tokens)
    state_dict = whisper_state_dict(ggml, config)
    feature_extractor = whisper_feature_extractor(ggml)
    # The multilingual file names id 50256 with an empty string; the English one puts <|endoftext|> there.
    vocabulary = ggml.vocabulary[: tokens.end]
    vocab = {byte_level(token): index for index, token in enumerate(vocabulary)}
    tokenizer = whisper_tokenizer(vocab, bpe_merges(vocabulary), tokens)

    save_file(state_dict, destination / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(destination)
    whisper_generation_config(config, tokens).save_pretrained(destination)
    feature_extractor.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    return destination


def read_ggml_whisper(source: str | Path) -> GgmlWhisper:
    """Read a ggml Whisper file; raises ValueError where it is not one, is quantised, or ends early."""
    with open(source, "rb") as file:
        magic = _ints(file, 1)[0]
        if magic != GGML_MAGIC:
            raise ValueError(f"{source} is not a ggml file: it starts with {magic:#x}, not {GGML_MAGIC:#x}")
        header = dict(zip(NAMES["header"], _ints(file, len(NAMES["header"])), strict=True))
        mel_shape = _ints(file, 2)
        mel_filters = np.frombuffer(_exactly(file, 4 * mel_shape[0] * mel_shape[1]), np.float32).reshape(mel_shape)
        vocabulary = [_exactly(file, _ints(file, 1)[0]) for _ in range(_ints(file, 1)[0])]
        tensors = {}
        while head := file.read(4):
            n_dims = struct.unpack("<i", head)[0]
            name_length, ftype = _ints(file, 2)
            shape = _ints(file, n_dims)[::-1]
            name = _exactly(file, name_length).decode()
            if ftype not in TENSOR_DTYPES:
                raise ValueError(f"{source}: tensor {name} has ggml type {ftype}; only fp32 (0) and fp16 (1) convert")
            dtype = np.dtype(TENSOR_DTYPES[ftype])
            count = int(np.prod(shape))
            tensors[name] = np.frombuffer(_exactly(file, count * dtype.itemsize), dtype).reshape(shape)
    return GgmlWhisper(header, mel_filters, vocabulary, tensors)


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{file.name} ends early: {size} bytes wanted at offset {file.tell() - len(data)}")
    return data


def _ints(file: BinaryIO, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}i", _exactly(file, 4 * count))


class SpecialTokens:
    """Ids of Whisper's special tokens, which follow the vocabulary in a fixed order (99-language generation)."""

    def __init__(self, vocab_size: int):
        if vocab_size not in (MULTILINGUAL_VOCAB_SIZE - 1, MULTILINGUAL_VOCAB_SIZE):
            raise ValueError(f"no special token table for a Whisper vocabulary of {vocab_size} (large-v3?)")
        self.multilingual = vocab_size == MULTILINGUAL_VOCAB_SIZE
        languages = list(LANGUAGES)[:99]
        names = ["endoftext", "startoftranscript", *languages, "translate", "transcribe", "startoflm", "startofprev"]
        names += ["nocaptions", "notimestamps"]
        first = 50257 if self.multilingual else 50256
        self.ids = {f"<|{name}|>": index for index, name in enumerate(names, start=first)}
        self.tasks = {task: self.ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
        self.languages = {f"<|{language}|>": self.ids[f"<|{language}|>"] for language in languages}
        self.timestamps = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
        self.end = self.ids["<|endoftext|>"]
        self.start = self.ids["<|startoftranscript|>"]


def whisper_config(header: dict[str, int], tokens: SpecialTokens):
    """The WhisperConfig for a ggml header."""
    return transformers.WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        dtype="float32",
        vocab_size=header["n_vocab"],
        num_mel_bins=header["n_mels"],
        d_model=header["n_audio_state"],
        encoder_layers=header["n_audio_layer"],
        encoder_attention_heads=header["n_audio_head"],
        encoder_ffn_dim=4 * header["n_audio_state"],
        decoder_layers=header["n_text_layer"],
        decoder_attention_heads=header["n_text_head"],
        decoder_ffn_dim=4 * header["n_text_state"],
        max_source_positions=header["n_audio_ctx"],
        max_target_positions=header["n_text_ctx"],
        bos_token_id=tokens.end if tokens.multilingual else tokens.start,
        eos_token_id=tokens.end,
        pad_token_id=tokens.end,
        decoder_start_token_id=tokens.start,
        begin_suppress_tokens=[220, tokens.end],
    )


def whisper_generation_config(config, tokens: SpecialTokens):
    """What `generate` needs: start, end and time tokens, and the tokens Whisper never emits as speech."""
    multilingual = {"lang_to_id": tokens.languages, "task_to_id": tokens.tasks} if tokens.multilingual else {}
    return transformers.GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        begin_suppress_tokens=config.begin_suppress_tokens,
        suppress_tokens=NON_SPEECH_TOKENS_MULTI if tokens.multilingual else NON_SPEECH_TOKENS,
        is_multilingual=tokens.multilingual,
        no_timestamps_token_id=tokens.ids["<|notimestamps|>"],
        prev_sot_token_id=tokens.ids["<|startofprev|>"],
        max_initial_timestamp_index=50,
        return_timestamps=False,
        **multilingual,
    )


def whisper_state_dict(ggml: GgmlWhisper, config) -> dict[str, torch.Tensor]:
    """The tensors of `ggml` under WhisperForConditionalGeneration's names and shapes; the output head is tied."""
    state_dict = {}
    for name, array in ggml.tensors.items():
        tensor = torch.from_numpy(array.copy())
        if name.endswith(("conv1.bias", "conv2.bias")):
            tensor = tensor.reshape(-1)  # ggml stores them as [n, 1], so that they broadcast over time
        for old, new in NAMES["tensors"].items():
            name = name.replace(old, new)
        half = tensor.to(torch.float16)
        state_dict[name] = half if torch.equal(half.to(tensor.dtype), tensor) else tensor
    with torch.device("meta"):
        model = transformers.WhisperModel(config)
    try:
        model.load_state_dict(state_dict, assign=True)
    except RuntimeError as error:
        raise ValueError(f"not a whole Whisper model: {error}") from error
    return {f"model.{name}": tensor for name, tensor in state_dict.items()}


def whisper_feature_extractor(ggml: GgmlWhisper):
    """The WhisperFeatureExtractor for the file; ValueError if the file was made for other mel filters."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=ggml.header["n_mels"])
    filters = np.asarray(extractor.mel_filters).T
    if filters.shape != ggml.mel_filters.shape or not np.allclose(filters, ggml.mel_filters, atol=1e-6):
        raise ValueError("the file's mel filters are not those of WhisperFeatureExtractor")
    return extractor


def whisper_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], tokens: SpecialTokens):
    """A WhisperTokenizer from a byte-level vocabulary; special tokens and timestamps are added here."""
    tokenizer = transformers.WhisperTokenizer(vocab=vocab | tokens.ids, merges=merges)
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens.ids)})
    tokenizer.add_tokens(
        [transformers.AddedToken(time, normalized=False, special=False) for time in tokens.timestamps]
    )
    if tokenizer.convert_tokens_to_ids("<|0.00|>") != tokens.ids["<|notimestamps|>"] + 1:
        raise ValueError(f"a vocabulary of {len(vocab)} tokens does not end where Whisper's does")
    return tokenizer


def byte_level(token: bytes) -> str:
    """Token bytes in GPT-2's printable alphabet, where every byte is one visible character."""
    return "".join(BYTE_ALPHABET[byte] for byte in token)


def bpe_merges(vocabulary: list[bytes]) -> list[tuple[str, str]]:
    """Merge rules, in order, for a byte-pair vocabulary whose ids are its ranks.

    The pair that makes a token is what remains of its bytes after every merge of a lower rank.
    """
    ranks = {token: rank for rank, token in enumerate(vocabulary)}
    merges = []
    for rank, token in enumerate(vocabulary):
        if len(token) < 2:
            continue
        parts = [token[index : index + 1] for index in range(len(token))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(pair_ranks)
            if best >= rank:
                raise ValueError(f"token {rank} ({token!r}) is not made of two earlier tokens")
            at = pair_ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append((byte_level(parts[0]), byte_level(parts[1])))
    return merges
