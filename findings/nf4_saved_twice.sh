#!/usr/bin/env bash
# transformers 5.23.0 with bitsandbytes 0.50.2: a saved 4-bit checkpoint, loaded, cannot be saved again; `save_pretrained`
# raises a bare NotImplementedError.
#
# Saving undoes what loading did to the keys, and the step that puts 4-bit weights together has no opposite.
# `save_original_format=False` leaves that out and writes a right checkpoint. Seen, of a tiny random Llama:
#
#   quantised: saved
#   loaded again: NotImplementedError()
#   loaded again, save_original_format=False: saved, and the same model
#
# Exits with 1 once it is saved.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
torch.manual_seed(0)
torch.set_grad_enabled(False)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained("base")


def load(name, **settings):
    return LlamaForCausalLM.from_pretrained(name, device_map="cpu", **settings)


def saved(model, name, **settings):
    try:
        model.save_pretrained(name, **settings)
    except NotImplementedError as error:
        return repr(error)
    return "saved"


quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
first = saved(load("base", quantization_config=quantised), "once")
again = saved(load("once"), "twice")
other = saved(load("once"), "other", save_original_format=False)
ids = torch.arange(10)[None]
same = torch.equal(load("once")(ids).logits, load("other")(ids).logits)
print(f"quantised: {first}")
print(f"loaded again: {again}")
print(f"loaded again, save_original_format=False: {other}, and {'the same' if same else 'another'} model")
sys.exit((first, again, other, same) != ("saved", "NotImplementedError()", "saved", True))
PY
