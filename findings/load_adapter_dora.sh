#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: `load_adapter`, and `from_pretrained` of an adapter's directory, leave the
# magnitudes of a DoRA adapter that peft saved unloaded, with only a report.
#
# The file names them `lora_magnitude_vector`, the model `lora_magnitude_vector.default.weight`; peft maps the one to the
# other, transformers does not. So they stay as of a new adapter. Seen, of a tiny random Llama:
#
#   LoRA: logits off by 0.00 by peft, 0.00 by load_adapter, 0.00 by from_pretrained
#   DoRA: logits off by 0.00 by peft, 0.42 by load_adapter, 0.31 by from_pretrained
#     magnitudes saved: [1.08, 1.59, 1.05, 1.16]
#     magnitudes load_adapter: [1.14, 1.55, 1.09, 1.37]
#     magnitudes from_pretrained: [1.5, 1.24, 2.0, 1.48]
#
# Exits with 1 once the adapter is loaded whole.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
torch.manual_seed(0)
torch.set_grad_enabled(False)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, initializer_range=0.3)).save_pretrained("base")
ids = torch.arange(10)[None]


def base():
    return LlamaForCausalLM.from_pretrained("base")


def magnitudes(model):
    return torch.cat([weight for name, weight in model.named_parameters() if "magnitude" in name])


def off(model, expected):
    return float((model.eval()(ids).logits - expected).norm() / expected.norm())


shown = []
for dora in (False, True):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, use_dora=dora)
    saved = get_peft_model(base(), config).eval()
    saved.save_pretrained(f"adapter_{dora}")
    expected = saved(ids).logits
    by_load = base()
    by_load.load_adapter(f"adapter_{dora}")
    by_from = LlamaForCausalLM.from_pretrained(f"adapter_{dora}")
    by_peft = PeftModel.from_pretrained(base(), f"adapter_{dora}")
    errors = [off(model, expected) for model in (by_peft, by_load, by_from)]
    name = "DoRA" if dora else "LoRA"
    print("{}: logits off by {:.2f} by peft, {:.2f} by load_adapter, {:.2f} by from_pretrained".format(name, *errors))
    if dora:
        for how, model in (("saved", saved), ("load_adapter", by_load), ("from_pretrained", by_from)):
            print(f"  magnitudes {how}:", [round(value, 2) for value in magnitudes(model)[:4].tolist()])
    shown.append([error > 0.01 for error in errors])
sys.exit(shown != [[False, False, False], [False, True, True]])
PY
