#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: a model whose last adapter was deleted by `delete_adapter` is right in memory, but
# `save_pretrained` writes a checkpoint that `from_pretrained` cannot use: it gives random weights, with only a report.
#
# Deleting leaves the adapter's wrappers in place, so the keys keep its `base_layer`; and where the adapter was loaded, all
# keys get the prefix of an adapter's file. Seen, of a tiny random Llama with a LoRA on `q_proj`:
#
#   load_adapter: logits off by 0.86, deleted 0.00, saved and loaded 1.47
#     saved: base_model.model.model.layers.0.self_attn.k_proj.weight,
#            base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight
#   add_adapter: logits off by 0.92, deleted 0.00, saved and loaded 1.00
#     saved: model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.q_proj.base_layer.weight
#
# Exits with 1 once the model comes back as it was.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
torch.manual_seed(0)
torch.set_grad_enabled(False)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, initializer_range=0.3)).save_pretrained("base")
ids = torch.arange(10)[None]
config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
get_peft_model(LlamaForCausalLM.from_pretrained("base"), config).save_pretrained("adapter")
expected = LlamaForCausalLM.from_pretrained("base").eval()(ids).logits


def off(model):
    return float((model.eval()(ids).logits - expected).norm() / expected.norm())


errors = []
for how in ("load_adapter", "add_adapter"):
    model = LlamaForCausalLM.from_pretrained("base")
    if how == "load_adapter":
        model.load_adapter("adapter")
    else:
        model.add_adapter(config)
    loaded = off(model)
    model.delete_adapter("default")
    deleted = off(model)
    model.save_pretrained(how)
    errors.append((loaded, deleted, off(LlamaForCausalLM.from_pretrained(how))))
    with safe_open(f"{how}/model.safetensors", "pt") as file:
        keys = [key for key in file.keys() if "q_proj" in key or "k_proj" in key]
    print("{}: logits off by {:.2f}, deleted {:.2f}, saved and loaded {:.2f}".format(how, *errors[-1]))
    print("  saved:", ", ".join(keys))
sys.exit(not all(loaded > 0.01 and deleted < 1e-5 and again > 0.01 for loaded, deleted, again in errors))
PY
