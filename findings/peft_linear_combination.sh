#!/usr/bin/env bash
# peft 0.21.2: `add_weighted_adapter(..., combination_type="linear")` does not give the weighted sum of two LoRAs.
#
# The matrices A and B are summed up each by itself, times the root of the weight, so their product has cross terms:
# (B1 + B2)(A1 + A2), not B1 A1 + B2 A2. `combination_type="cat"` is exact. Seen, of two random LoRAs:
#
#   half of each, linear: 100 % off the mean of both updates
#   half of each, cat: 0 % off the mean of both updates
#
# Exits with 1 once "linear" is linear.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config, adapter_name="one")
model.add_adapter("two", config)
layer = model.base_model.model[0]
one, two = (layer.get_delta_weight(name).detach() for name in ("one", "two"))


def off(names, weights, kind, expected):
    name = f"{'_'.join(names)}_{kind}"
    model.add_weighted_adapter(names, weights, name, combination_type=kind)
    return float((layer.get_delta_weight(name) - expected).norm() / expected.norm())


linear = off(["one", "two"], [0.5, 0.5], "linear", (one + two) / 2)
cat = off(["one", "two"], [0.5, 0.5], "cat", (one + two) / 2)
print(f"half of each, linear: {linear:.0%} off the mean of both updates".replace("%", " %"))
print(f"half of each, cat: {cat:.0%} off the mean of both updates".replace("%", " %"))
sys.exit(not (linear > 0.5 and cat < 1e-5))
PY
