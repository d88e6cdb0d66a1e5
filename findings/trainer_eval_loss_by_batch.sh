#!/usr/bin/env bash
# transformers 5.23.0: Trainer's `eval_loss` of one model on one set depends on `per_device_eval_batch_size`.
#
# The training loss is divided by the number of tokens of the whole step (`num_items_in_batch`); the evaluation loss is
# the mean of the batches' means, so a token in a short answer counts more, and how much more depends on its company.
# Seen, with a tiny random Llama and answers of 2, 40, 3 and 30 tokens:
#
#   batches of 1: eval_loss 3.8963
#   batches of 2: eval_loss 3.9166
#   batches of 4: eval_loss 3.9146
#
# Exits with 1 once they agree.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
answers = [torch.randint(0, 50, (length,)) for length in (2, 40, 3, 30)]


def collate(answers):
    padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100)
    return {"input_ids": padded.clamp(min=0), "attention_mask": (padded >= 0).long(), "labels": padded}


losses = []
for size in (1, 2, 4):
    settings = {"per_device_eval_batch_size": size, "remove_unused_columns": False}
    arguments = TrainingArguments("out", use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    trainer = Trainer(model, arguments, eval_dataset=answers, data_collator=collate)
    trainer.log = lambda *_: None
    losses.append(trainer.evaluate()["eval_loss"])
    print(f"batches of {size}: eval_loss {losses[-1]:.4f}")
sys.exit(max(losses) - min(losses) < 1e-3)
PY
