"""
Learning new tasks without forgetting transcripts: the next-token distributions of a model that transcribes take the
place of their text, as in Li and Hoiem, "Learning without Forgetting", ECCV 2016.
"""

import torch
from torch import nn

from ..data.task_prompts import is_transcript
from .trainer import SalmonnTrainer


class DistillingTrainer(SalmonnTrainer):
    """
    [`SalmonnTrainer`] whose model learns captions and answers from their text as ever, but transcripts from the
    next-token distributions of `teacher`, a [`SalmonnForConditionalGeneration`] with the same encoder and tokenizer,
    which is given the same frames. So any speech will do for transcripts, even what the teacher transcribes badly.
    """

    def __init__(self, *args, teacher: nn.Module, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)

    def encode(self, batch: dict) -> dict[str, torch.Tensor]:
        distilled = torch.tensor([is_transcript(task) for task in batch["tasks"]], device=self.args.device)
        return super().encode(batch) | {"distilled": distilled}

    def answer_loss(self, model, inputs: dict, num_items_in_batch):
        inputs = dict(inputs)
        labels, distilled = inputs.pop("labels"), inputs.pop("distilled")
        # Answers stand at the right end, whatever the model merges before them.
        answered = (labels != -100).any(0)
        targets = labels[:, int(answered.int().argmax()) if answered.any() else -1 :]
        length = targets.shape[1] + 1
        outputs = model(**inputs, logits_to_keep=length)
        logits = outputs.logits[:, :-1].float()
        from_text, from_teacher = (targets != -100) & ~distilled[:, None], (targets != -100) & distilled[:, None]
        loss = nn.functional.cross_entropy(logits[from_text], targets[from_text], reduction="sum")
        if from_teacher.any():
            wanted = self.teacher_log_probs(inputs, distilled, length)[from_teacher[distilled]]
            student = logits[from_teacher].log_softmax(-1)
            loss = loss + nn.functional.kl_div(student, wanted, log_target=True, reduction="sum")
        return loss / num_items_in_batch, outputs

    @torch.no_grad()
    def teacher_log_probs(self, inputs: dict, rows: torch.BoolTensor, length: int) -> torch.Tensor:
        """The teacher's log-probabilities behind all but the last of the last `length` tokens of these `rows`."""
        names = ["input_ids", "attention_mask", "audio_frames", "audio_frames_mask"]
        if self.teacher.config.sound_hidden_size:
            names += ["sound_frames", "sound_frames_mask"]
        names += [name for name in inputs if name.startswith("transcript_")]
        batch = {name: inputs[name][rows] for name in names}
        with self.accelerator.autocast():
            outputs = self.teacher(**batch, use_cache=False, logits_to_keep=length)
        return outputs.logits[:, :-1].float().log_softmax(-1)
