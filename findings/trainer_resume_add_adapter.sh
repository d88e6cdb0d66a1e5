#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: Trainer trains and saves a model with `model.add_adapter(...)`, but cannot resume
# from what it saved. The same adapter by `get_peft_model` resumes.
#
# Both save adapter_model.safetensors; on resuming, only a PeftModel's is looked for. Seen, of a tiny random Llama:
#
#   get_peft_model: saved adapter_model.safetensors; resumed
#   add_adapter: saved adapter_model.safetensors; Can't find a checkpoint index (pytorch_model.bin.index.json or
#   model.safetensors.index.json) in add_adapter/checkpoint-1.
#
# Exits with 1 once both resume.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
data = [{"input_ids": torch.arange(10), "labels": torch.arange(10)}] * 4


def trainer(how, steps):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    config = LoraConfig(r=2, target_modules=["q_proj"])
    if how == "add_adapter":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    settings = {"max_steps": steps, "save_steps": 1, "per_device_train_batch_size": 2}
    arguments = TrainingArguments(how, use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    made = Trainer(model, arguments, train_dataset=data)
    made.log = lambda *_: None
    return made


outcomes = []
for how in ("get_peft_model", "add_adapter"):
    trainer(how, steps=1).train()
    weights = [name for name in os.listdir(f"{how}/checkpoint-1") if name.endswith(".safetensors")]
    try:
        trainer(how, steps=2).train(resume_from_checkpoint=f"{how}/checkpoint-1")
        outcomes.append("resumed")
    except ValueError as error:
        outcomes.append(str(error))
    print(f"{how}: saved {', '.join(weights)}; {outcomes[-1]}")
sys.exit(not (outcomes[0] == "resumed" and outcomes[1].startswith("Can't find a checkpoint index")))
PY
