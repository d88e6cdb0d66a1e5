#!/usr/bin/env bash
# transformers 5.23.0: the openai client cannot read a streamed transcription of `transformers serve`.
#
# The stream has each piece of text as it is behind `data: `, where the protocol, and the client, have events in JSON. The
# same request without `stream=True` works. Seen, of a tiny random Whisper and the client 3.57.0:
#
#   stream=False: a text of 8 characters
#   stream=True: JSONDecodeError('Expecting value: line 1 column 1 (char 0)')
#   first line of the stream: b'data: \xef\xbf\xbd\x0e'
#
# Exits with 1 once the client reads the stream.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 "transformers[serving]==5.23.0" openai==3.57.0 librosa==0.11.0 \
    python-multipart==0.0.34
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import wave

import openai
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
from transformers import WhisperProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

logging.disable_progress_bar()
torch.manual_seed(0)
os.mkdir("whisper")
with open("whisper/vocab.json", "w") as file:
    vocabulary = {token: index for index, token in enumerate([*bytes_to_unicode().values(), "<|endoftext|>"])}
    json.dump(vocabulary, file)
with open("whisper/merges.txt", "w") as file:
    file.write("#version: 0.2\n")
tokenizer = WhisperTokenizer.from_pretrained("whisper")
sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(vocabulary)}
special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), len(vocabulary) - 1)
model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **special, init_std=0.5))
model.generation_config.max_new_tokens = 8
model.save_pretrained("whisper")
WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained("whisper")

clip = io.BytesIO()
with wave.open(clip, "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(16000)
    file.writeframes(bytes(32000))
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{free.getsockname()[1]}"
command = ["-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
with open("log", "w") as log:
    server = subprocess.Popen([sys.executable, *command, "--device", "cpu"], stdout=log, stderr=log)
outcomes = {}
try:
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            time.sleep(0.5)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    request = {"model": os.path.abspath("whisper"), "file": ("clip.wav", clip.getvalue())}
    for stream in (False, True):
        try:
            answer = client.audio.transcriptions.create(**request, stream=stream)
            text = list(answer) if stream else answer.text
            outcomes[stream] = f"{len(text)} events" if stream else f"a text of {len(text)} characters"
        except json.JSONDecodeError as error:
            outcomes[stream] = repr(error)
        print(f"stream={stream}: {outcomes[stream]}")
    raw = client.audio.transcriptions.with_raw_response.create(**request, stream=True)
    print("first line of the stream:", raw.http_response.read().splitlines()[0])
finally:
    server.kill()
    server.wait()
sys.exit(not (outcomes[False].startswith("a text") and outcomes[True].startswith("JSONDecodeError")))
PY
