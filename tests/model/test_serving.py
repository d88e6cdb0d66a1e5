"""
A checkpoint in `transformers serve`, asked by OpenAI's own client, and in a page of gradio: the answers are those of
pipeline and model in this process. What a client sends is the audio itself; no address of a request is opened.
"""

import base64
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import soundfile
from conftest import ROOT, noise
from hub_server import Hub
from huggingface_hub.utils import httpx
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_multipart_available, is_serve_available

from salmonn_hf import AudioError
from salmonn_hf.model.serving import check_source

NANO = ROOT / "model_cards" / "salmonn-lite-nano"
CLIPS = [ROOT / "eval" / "recordings" / f"librivox-austen-{number}.flac" for number in (930, 880, 890)]
START_SECONDS = 120


def as_base64(clip) -> str:
    return base64.b64encode(clip.read_bytes()).decode()


def test_the_class_is_in_the_table_that_the_server_looks_in():
    """And nowhere else: `AutoModelForMultimodalLM.register` does not put it there."""
    assert MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["salmonn"] == "SalmonnForConditionalGeneration"


@pytest.mark.parametrize(
    "source", ["http://127.0.0.1/a.wav", "https://a.b/c.wav", str(CLIPS[0]), "file:///etc/passwd"]
)
def test_a_server_opens_no_address_and_no_path(source, monkeypatch):
    check_source(source)
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.server", object())
    with pytest.raises(AudioError, match="send the file as base64"):
        check_source(source)
    check_source(as_base64(CLIPS[0]))
    check_source("data:audio/flac;base64," + as_base64(CLIPS[0]))


# The server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The small model with LoRA merged, complete in its directory, with its own code."""
    directory = tmp_path_factory.mktemp("served") / "nano"
    AutoModel.from_pretrained(NANO).merge_lora().save_pretrained(directory)
    AutoProcessor.from_pretrained(NANO).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint):
    transcriber = pipeline("automatic-speech-recognition", model=str(checkpoint), device="cpu")
    return [transcriber(str(clip))["text"] for clip in CLIPS]


@pytest.fixture(scope="module")
def client(checkpoint, tmp_path_factory):
    """Of a server in a process of its own, which has not imported the package and reaches a hub of this machine."""
    openai = pytest.importorskip("openai", reason="the server needs the extra `serving`")
    if not (is_serve_available() and is_multipart_available()):
        pytest.skip("the server needs the extra `serving`")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with Hub({"hf_alice": "alice"}) as hub, open(root / "log", "w") as log:
        hub.add("alice/nano", checkpoint)
        environment |= hub.environment(None) | {"HF_HOME": str(root / "home")}
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
            while not answers(f"{url}/health"):
                started = process.poll() is None and time.monotonic() < deadline
                assert started, f"the server did not start: {(root / 'log').read_text()}"
                time.sleep(0.5)
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        finally:
            process.kill()
            process.wait(10)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


def ask(client, model, *parts, text="Transcribe the speech.", **settings):
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return client.chat.completions.create(model=str(model), messages=messages, **settings)


def answer(client, model, *parts, **settings) -> str:
    return ask(client, model, *parts, **settings).choices[0].message.content.strip()


def input_audio(clip):
    return {"type": "input_audio", "input_audio": {"data": as_base64(clip), "format": clip.suffix[1:]}}


def audio_url(url):
    return {"type": "audio_url", "audio_url": {"url": url}}


def transcript(client, model, clip) -> str:
    with open(clip, "rb") as file:
        return client.audio.transcriptions.create(model=str(model), file=file).text.strip()


@pytest.mark.slow
def test_transcriptions_of_a_directory_and_of_a_hub_name(client, checkpoint, expected):
    assert all(len(text.split()) > 4 for text in expected)
    assert [transcript(client, checkpoint, clip) for clip in CLIPS] == expected
    assert transcript(client, "alice/nano", CLIPS[0]) == expected[0]


@pytest.mark.slow
def test_a_streamed_transcription(client, checkpoint, expected):
    """Its events are plain text and not OpenAI's JSON, so they are read as lines."""
    settings = {"model": str(checkpoint), "extra_body": {"stream": "true"}}
    with open(CLIPS[0], "rb") as file:
        with client.audio.transcriptions.with_streaming_response.create(file=file, **settings) as response:
            pieces = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert len(pieces) > 4
    assert "".join(pieces).strip() == expected[0]


@pytest.mark.slow
def test_chat_with_audio_as_base64_and_as_data_uri(client, checkpoint, expected):
    without_format = {"type": "input_audio", "input_audio": {"data": as_base64(CLIPS[0])}}
    uri = audio_url(f"data:audio/flac;base64,{as_base64(CLIPS[0])}")
    for part in (input_audio(CLIPS[0]), without_format, uri):
        assert answer(client, checkpoint, part) == expected[0]
    stream = ask(client, checkpoint, input_audio(CLIPS[0]), stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces).strip() == expected[0]


@pytest.mark.slow
def test_settings_of_a_chat(client, checkpoint, expected):
    stop = expected[0].split()[2]
    stopped = answer(client, checkpoint, input_audio(CLIPS[0]), stop=[stop])
    assert stopped == expected[0][: len(stopped)] and stopped.endswith(stop)
    short = ask(client, checkpoint, input_audio(CLIPS[0]), max_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    assert expected[0].startswith(short.choices[0].message.content.strip())


@pytest.mark.slow
def test_several_requests_at_once(client, checkpoint, expected):
    by_chat = [lambda clip=clip: answer(client, checkpoint, input_audio(clip)) for clip in CLIPS]
    by_file = [lambda clip=clip: transcript(client, checkpoint, clip) for clip in CLIPS]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda request: request(), by_chat + by_file))
    assert found == expected + expected


@pytest.mark.slow
def test_what_is_wrong_with_a_request_is_said_to_its_client(client, checkpoint, expected, tmp_path):
    opened = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            opened.append(self.path)
            self.send_error(404)

    listener = HTTPServer(("127.0.0.1", 0), Listener)
    Thread(target=listener.serve_forever, daemon=True).start()
    soundfile.write(tmp_path / "long.flac", noise(31.0), 16000)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    wrong = {
        "The server does not open http": audio_url(f"http://127.0.0.1:{listener.server_port}/a.wav"),
        "The server does not open /": audio_url(str(CLIPS[0])),
        "is not an audio file": audio_url("data:audio/wav;base64,AAAA"),
        "is not followed by base64": audio_url("data:audio/wav;base64,?"),
        "lasts 31.0 s": input_audio(tmp_path / "long.flac"),
        "part of type 'image'": image,
    }
    for message, part in wrong.items():
        assert message in refusal(lambda part=part: answer(client, checkpoint, part))
    assert "lasts 31.0 s" in refusal(lambda: transcript(client, checkpoint, tmp_path / "long.flac"))
    listener.shutdown()
    listener.server_close()
    assert opened == []
    assert transcript(client, checkpoint, CLIPS[0]) == expected[0]


def refusal(request) -> str:
    """What the client is told with status 400."""
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        request()
    return caught.value.response.json()["detail"]


# A page


@pytest.mark.slow
def test_a_page_of_gradio_transcribes(checkpoint, expected, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="the page needs the extra `serving`")
    from gradio_client import Client, handle_file

    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    transcriber = pipeline("automatic-speech-recognition", model=str(checkpoint), device="cpu")
    page = gradio.Interface(lambda path: transcriber(path)["text"], gradio.Audio(type="filepath"), "text")
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", show_error=True)
    try:
        visitor = Client(url, verbose=False)
        assert visitor.predict(handle_file(CLIPS[0]), fn_index=0) == expected[0]
    finally:
        page.close()
