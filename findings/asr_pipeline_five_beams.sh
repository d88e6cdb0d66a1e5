#!/usr/bin/env bash
# transformers 5.23.0: `pipeline("automatic-speech-recognition")` searches with five beams, whatever model it is given;
# `model.generate` of the same model is greedy.
#
# So the two write different texts, and the pipeline takes the time and memory of five beams, without any setting in
# the checkpoint that says so. Seen, of a tiny random Whisper:
#
#   model.generation_config.num_beams before: None; model.generate runs the decoder with 1 row
#   pipeline: runs the decoder with 5 rows
#
# Exits with 1 once the pipeline is greedy as well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import json
import sys

import numpy as np
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer, pipeline
from transformers.convert_slow_tokenizer import bytes_to_unicode

with open("vocab.json", "w") as file:
    vocabulary = {token: index for index, token in enumerate([*bytes_to_unicode().values(), "<|endoftext|>"])}
    json.dump(vocabulary, file)
with open("merges.txt", "w") as file:
    file.write("#version: 0.2\n")
tokenizer, extractor = WhisperTokenizer.from_pretrained("."), WhisperFeatureExtractor()
sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(vocabulary)}
special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), len(vocabulary) - 1)
model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **special)).eval()

rows = []
model.model.decoder.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
silence = np.zeros(16000, np.float32)
before = model.generation_config.num_beams
model.generate(extractor(silence, sampling_rate=16000, return_tensors="pt").input_features, max_new_tokens=3)
alone = rows[-1]
print(f"model.generation_config.num_beams before: {before}; model.generate runs the decoder with {alone} row")
transcriber = pipeline("automatic-speech-recognition", model=model, tokenizer=tokenizer, feature_extractor=extractor)
transcriber(silence, generate_kwargs={"max_new_tokens": 3})
print(f"pipeline: runs the decoder with {rows[-1]} rows")
sys.exit((alone, rows[-1]) != (1, 5))
PY
