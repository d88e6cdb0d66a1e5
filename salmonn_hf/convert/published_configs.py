"""The published SALMONN systems at full size: to convert their checkpoints into, or to measure with random weights."""

import json
from pathlib import Path

from ..model.configuration_salmonn import SalmonnConfig

# "parts": each from the config.json of the repository named, on https://huggingface.co. "systems": their parts, and an
# audio token that the tokenizer has and text does not use. "common": what all have; the window Q-Former is that of
# https://arxiv.org/abs/2310.13289, section 4.1.
PUBLISHED = Path(__file__).with_suffix(".json")
PUBLISHED_SYSTEMS = json.loads(PUBLISHED.read_text())["systems"]


def published_config(name: str, **kwargs) -> SalmonnConfig:
    """
    The config of a published SALMONN system at full size. Nothing is fetched; `SalmonnForConditionalGeneration` makes
    the system of it, with random weights.

    All have SALMONN's Q-Former (two layers, one query per window of 17 frames or 0.34 s) over the features of Whisper
    and BEATs, pad every clip to 30 s, and have LoRA of rank 8 and α 32 in the language model's query and value
    projections.

    Args:
        name (`str`): `"salmonn-7b"` (Vicuna-7B v1.5, Whisper large-v2), `"nota"` (Llama-3.2-3B-Instruct, Whisper
            large-v2), `"seed"` (Gemma-2-2B-it, Whisper large-v3-turbo; its language model was quantised to 4 bits,
            here it is not) or `"nlp-07"` (Qwen2.5-0.5B-Instruct, Whisper large-v3-turbo; its sound encoder was
            CED-small, here it is BEATs, and its adapter's sizes are taken to be those of the others).
        kwargs: fields of [`SalmonnConfig`] to change; those of `projector_config` one by one, e.g.
            `projector_config={"pad_to_30_seconds": False}`.

    Raises:
        ValueError: if there is no system of this name; the message lists those there are.
    """
    if name not in PUBLISHED_SYSTEMS:
        raise ValueError(f"There is no published system '{name}'; choose one of {', '.join(PUBLISHED_SYSTEMS)}.")
    published, system = json.loads(PUBLISHED.read_text()), PUBLISHED_SYSTEMS[name]
    fields = published["common"] | {part: published["parts"][system[part]] for part in ("audio_config", "text_config")}
    fields["audio_token_id"] = system["audio_token_id"]
    fields["projector_config"] |= kwargs.pop("projector_config", {})
    return SalmonnConfig(**fields | kwargs)
