#!/usr/bin/env bash
# transformers 5.23.0: prompt lookup, which must never change greedy text, does where `past_key_values` already hold the
# start of the prompt, as for several questions about one text.
#
# Plain `generate` gives the model only what the cache lacks. With drafts, the first step gives it the whole prompt behind
# the cached one, so the start is there twice. Seen, of a tiny random Llama and a prompt of 30 tokens:
#
#   20 tokens cached, plain:     first step of 10 tokens, text [16, 19, 16, 0, 0, 0, ...], as without a cache
#   20 tokens cached, looked up: first step of 32 tokens, text [16, 19, 19, 19, 16, 19, ...]
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
torch.set_grad_enabled(False)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
tokens = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.4)).eval()
ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 3, 4, 5] * 3])
given = []
model.model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["input_ids"].shape[1]), with_kwargs=True)


def continued(cached, drafts):
    cache = model(input_ids=ids[:, :cached], use_cache=True).past_key_values if cached else None
    given.clear()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, **drafts}
    return model.generate(ids, past_key_values=cache, **settings)[0, ids.shape[1] :].tolist()


same = []
for cached in (0, 20):
    texts = []
    for name, drafts in (("plain", {}), ("looked up", {"prompt_lookup_num_tokens": 2})):
        texts.append(continued(cached, drafts))
        print(f"{cached} tokens cached, {name}: first step of {given[0]} tokens, text {texts[-1]}")
    same.append(texts[0] == texts[1])
sys.exit(same != [True, False])
PY
