"""Transcripts of, and answers to requests about, a batch of clips, by any checkpoint: what evaluation and CLI use."""

from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoProcessor, pipeline

from .base_parts import REGISTRY_COPIES, resolve_base_part
from .model.answering import generate_answers
from .model.lora import adapted_parts

SINGLE_ROW_FEATURES = 1024  # up to which a single row's product equals that of several (measured on AVX-512)


def default_dtype(device=None) -> str:
    """The checkpoint's own precision, "auto"; but "float32" on a CPU without bfloat16, which emulates it slowly."""
    on_cpu = str(device) == "cpu" if device is not None else not torch.cuda.is_available()
    return "float32" if on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else "auto"


def merge_lora_if_exact(model):
    """Merge LoRA into the weights beside it where that rounds nothing, in float32: its products then cost nothing."""
    adapted = adapted_parts(model.config)
    if adapted and model.dtype == torch.float32 and not model.parts_in_bits():
        model.merge_lora()


def make_batch_invariant(model):
    """
    Have a CPU give a token of the language model the same numbers alone, in a batch and in a draft, in bfloat16 too:
    attention is eager, and a product with many features never has a single row, whose terms torch would sum in another
    order than those of two rows or more.
    """
    if model.config.model_type == "salmonn" and model.device.type == "cpu" and model.dtype == torch.bfloat16:
        model.language_model.set_attn_implementation("eager")
        for module in model.language_model.modules():
            if type(module) is nn.Linear and module.in_features > SINGLE_ROW_FEATURES:
                module.forward = partial(pad_single_row, module.forward)


def pad_single_row(product, rows: torch.Tensor) -> torch.Tensor:
    """`product(rows)`, a single row with one of zeros beside it."""
    is_single = rows.numel() == rows.shape[-1]
    return product(nn.functional.pad(rows, (0, 0, 0, 1)))[..., :1, :] if is_single else product(rows)


class Transcriber:
    """
    Any model of `pipeline("automatic-speech-recognition")` as a function of a batch: SALMONN, Whisper, CTC models.

    Args:
        model (`str`): directory or hub name.
        dtype (`str`, *optional*): "auto" for the checkpoint's own; default: see `default_dtype`.
        device (*optional*): as in any pipeline; default: the GPU, where there is one.
        speculation_type (`str`, *optional*): "ctc": SALMONN's drafted decoding, one clip at a time.
    """

    max_seconds = float("inf")

    def __init__(self, model: str, dtype: str | None = None, device=None, speculation_type: str | None = None):
        dtype = dtype or default_dtype(device)
        name = str(resolve_base_part(model)) if model in REGISTRY_COPIES else model
        self.pipeline = pipeline("automatic-speech-recognition", model=name, dtype=dtype, device=device)
        if self.pipeline.tokenizer.pad_token is None:  # transformers' own pipeline needs one to make batches
            self.pipeline.tokenizer.pad_token = self.pipeline.tokenizer.eos_token
        self.model = self.pipeline.model
        merge_lora_if_exact(self.model)
        make_batch_invariant(self.model)
        self.speculation_type = speculation_type
        self.device, self.dtype = str(self.model.device), str(self.model.dtype)

    def __call__(self, waveforms: list[np.ndarray], prompts: list[str] | None = None) -> list[str]:
        """Transcripts of clips at 16 kHz, of any length. A prompt other than the model's own cannot be given here."""
        # One beam: transformers' own pipeline takes five unless it is told otherwise.
        speculation = {"speculation_type": self.speculation_type} if self.speculation_type else {}
        settings = {"generate_kwargs": {"num_beams": 1, **speculation}} if self.model.can_generate() else {}
        if self.model.config.model_type == "whisper" and max(map(len, waveforms)) > 30 * 16000:
            settings["return_timestamps"] = True  # without them Whisper's pipeline refuses more than 30 s
        results = self.pipeline(list(waveforms), batch_size=len(waveforms), **settings)
        return [result["text"].strip() for result in results]


class Answerer:
    """
    A SALMONN checkpoint as a function of clips and what is asked of them: greedy, see [`generate_answers`]; model,
    dtype and device as above, and no answer longer than `max_new_tokens`.
    """

    max_seconds = 30.0  # the encoder's input

    def __init__(self, model: str, dtype: str | None = None, device=None, max_new_tokens: int = 96):
        self.model = AutoModel.from_pretrained(model, dtype=dtype or default_dtype(device)).eval()
        merge_lora_if_exact(self.model)
        self.processor = AutoProcessor.from_pretrained(model)
        self.max_new_tokens = max_new_tokens
        self.model.to(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        make_batch_invariant(self.model)
        self.device, self.dtype = str(self.model.device), str(self.model.dtype)

    def __call__(self, waveforms: list[np.ndarray], prompts: list[str], is_transcript: bool = False) -> list[str]:
        """The answer to each prompt about its clip, of 30 s at most; empty for a transcript of no words."""
        pairs = zip(waveforms, prompts, strict=True)
        conversations = [self.processor.transcription_messages(clip, prompt) for clip, prompt in pairs]
        settings = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        inputs = self.processor.apply_chat_template(conversations, **settings)
        greedy = {"do_sample": False, "num_beams": 1, "is_transcript": is_transcript}
        return generate_answers(self.model, self.processor, inputs, self.max_new_tokens, **greedy)
