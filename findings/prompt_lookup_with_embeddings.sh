#!/usr/bin/env bash
# transformers 5.23.0: prompt lookup, which must never change greedy text, does where `inputs_embeds` are given beside
# `input_ids`, as audio and image models give them.
#
# Drafts are verified by the model, so the text is that of plain greedy decoding by construction. With embeddings the
# model is given the prompt alone in the first step, and the scores at the prompt's last positions are taken for those of
# the drafted tokens. Seen, of a tiny random Llama:
#
#   token ids alone:       plain and looked up give the same 20 tokens
#   embeddings and ids:    plain [16, 19, 16, 0, 0, 0, ...], looked up [8, 14, 11, 2, 8, 14, ...]
#
# Exits with 1 once the text is the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(3)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
tokens = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.4)).eval()
ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 3, 4, 5] * 3])
prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
same = []
for name, embeds in (("token ids alone", {}), ("embeddings and ids", {"inputs_embeds": model.get_input_embeddings()(ids)})):
    plain, looked_up = (
        model.generate(**prompt, **embeds, max_new_tokens=20, do_sample=False, **drafts)[0, ids.shape[1] :].tolist()
        for drafts in ({}, {"prompt_lookup_num_tokens": 5})
    )
    same.append(plain == looked_up)
    print(f"{name}: plain {plain}, looked up {looked_up}")
sys.exit(same != [True, False])
PY
