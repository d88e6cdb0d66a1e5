"""SALMONN as a model of lmms-eval 0.7; `run_lmms_eval.py` makes it known there."""

import logging
from itertools import groupby

import torch
from accelerate import PartialState
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model

from salmonn_hf import load_audio
from salmonn_hf.inference import Answerer, Transcriber
from salmonn_hf.model.audio import SAMPLING_RATE

logger = logging.getLogger(__name__)


@register_model("salmonn")
class Salmonn(lmms):
    r"""
    Answers a task's question about one clip, greedily; of several processes each takes its share on its own GPU.

    Args:
        pretrained (`str`): checkpoint directory or hub name.
        transcribe (`bool`): ask for a transcript as the checkpoint was trained to be asked, and not in the task's
            words; of clips of any length. For tasks of speech recognition.
        batch_size (`int`): clips at once.
        device (`str`, *optional*): default: the GPU, where there is one.
        dtype (`str`, *optional*): default: the checkpoint's own, where the device has it.
    """

    def __init__(
        self, pretrained: str, transcribe=False, batch_size=1, device=None, dtype: str | None = None, **kwargs
    ):
        super().__init__()
        unknown = sorted(name for name in kwargs if name != "max_batch_size")  # which lmms-eval always gives
        if unknown:
            raise ValueError(f"The model salmonn does not know the model_args {', '.join(unknown)}.")
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        if state.num_processes > 1:
            device = str(state.device)
        self.batch_size = int(batch_size)
        self.answerer = (Transcriber if transcribe else Answerer)(pretrained, dtype=dtype, device=device)
        self.device = torch.device(self.answerer.device)

    def generate_until(self, requests) -> list[str]:
        answers = []
        for _, group in groupby(requests, key=lambda request: repr(request.args[1])):
            group = list(group)
            for start in range(0, len(group), self.batch_size):
                answers += self.answer(group[start : start + self.batch_size])
        return answers

    def answer(self, requests) -> list[str]:
        """The answers to requests with the same settings."""
        settings = requests[0].args[1]
        if settings.get("do_sample") or (settings.get("temperature") or 0) > 0 or settings.get("num_beams", 1) > 1:
            raise ValueError(f"The model salmonn decodes greedily; the task asks for {settings}. Set --gen_kwargs.")
        if isinstance(self.answerer, Answerer):
            self.answerer.max_new_tokens = settings.get("max_new_tokens", self.answerer.max_new_tokens)
        ends = settings.get("until") or []
        ends = [ends] if isinstance(ends, str) else ends
        texts = self.answerer([self.clip(request) for request in requests], [request.args[0] for request in requests])
        return [min((text.split(end)[0] for end in ends if end), key=len, default=text) for text in texts]

    def clip(self, request):
        """Float32 at 16 kHz, `(samples,)`."""
        _, _, doc_to_visual, doc_id, task, split = request.args
        clips = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(clips) != 1:
            raise ValueError(f"Document {doc_id} of {task} has {len(clips)} clips; the model salmonn takes one.")
        waveform = load_audio(clips[0])
        samples = min(len(waveform), self.answerer.max_seconds * SAMPLING_RATE)
        if samples < len(waveform):
            logger.warning("Document %s of %s is cut to its first %d s.", doc_id, task, self.answerer.max_seconds)
        return waveform[: int(samples)]

    def loglikelihood(self, requests):
        raise NotImplementedError("The model salmonn answers freely; it does not score given answers.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("The model salmonn answers one question about a clip; it holds no conversation.")
