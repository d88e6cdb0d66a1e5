"""
Learning new tasks without unlearning transcripts: what a model that transcribes already foretells takes the place of
their text, as in Li and Hoiem, "Learning without Forgetting", ECCV 2016.
"""

import torch
from torch import nn

from ..data.task_prompts import is_transcript
from ..quantization.scale_tuning import log_probs
from .trainer import SalmonnTrainer


class DistillingTrainer(SalmonnTrainer):
    """
    [`SalmonnTrainer`] whose model learns captions and answers as ever, but of transcripts the next-token distributions
    of `teacher`, a [`SalmonnForConditionalGeneration`] with the same encoder and tokenizer, which hears the same
    frames. So any speech will do for transcripts, with such that the teacher hears badly or that is read by a machine.
    """

    def __init__(self, *args, teacher: nn.Module, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)

    def encode(self, batch: dict) -> dict[str, torch.Tensor]:
        distilled = torch.tensor([is_transcript(task) for task in batch["tasks"]], device=self.args.device)
        return super().encode(batch) | {"distilled": distilled}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels, distilled = inputs.pop("labels"), inputs.pop("distilled")
        # Answers stand at the right end, whatever the model merges before them.
        answered = (labels != -100).any(0)
        targets = labels[:, int(answered.int().argmax()) if answered.any() else -1 :]
        kept = targets.shape[1] + 1
        outputs = model(**inputs, logits_to_keep=kept)
        logits = outputs.logits[:, :-1].float()
        learnt, told = (targets != -100) & ~distilled[:, None], (targets != -100) & distilled[:, None]
        loss = nn.functional.cross_entropy(logits[learnt], targets[learnt], reduction="sum")
        if told.any():
            wanted = self.foretold(inputs, distilled, kept)[told[distilled]]
            loss = loss + nn.functional.kl_div(logits[told].log_softmax(-1), wanted, log_target=True, reduction="sum")
        loss = loss / num_items_in_batch
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def foretold(self, inputs: dict, rows: torch.BoolTensor, kept: int) -> torch.Tensor:
        """The teacher's log-probabilities behind all but the last of the last `kept` tokens of these `rows`."""
        names = ["input_ids", "attention_mask", "audio_frames", "audio_frames_mask"]
        if self.teacher.config.sound_width:
            names += ["sound_frames", "sound_frames_mask"]
        with self.accelerator.autocast():
            return log_probs(self.teacher, {name: inputs[name][rows] for name in names}, kept)
