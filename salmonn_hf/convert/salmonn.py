"""Original SALMONN checkpoints to adapter checkpoints of this package.

The original (https://github.com/bytedance/SALMONN, `models/salmonn.py`, and the trainers built on it) saves every
tensor that is not a frozen parameter as `{"model": tensors, "config": settings, ...}`. Whisper, BEATs and the language
model are files of their own. So is it here: the output names its base parts, and holds BEATs' weights beside the
trained ones.
"""

import json
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from ..model.base_part_resolver import resolve_base_part
from ..model.checkpoint import is_base_key, part_keys, read_weights
from ..model.configuration_salmonn import SalmonnConfig
from ..model.feature_extraction_salmonn import SalmonnFeatureExtractor
from ..model.modeling_salmonn import SalmonnForConditionalGeneration
from ..model.processing_salmonn import CONTENT_PRELUDE, SalmonnProcessor
from .beats import encoder_tensors, read_beats_checkpoint
from .beats import from_original_key as from_original_beats_key
from .original_checkpoint import check_is_free, check_tensors, load_original_checkpoint, written_whole
from .salmonn_keys import from_original_key, to_original_key

# What the original leaves to its code: `WindowQformer` on BERT base, and the defaults of `SALMONN.__init__`.
BERT_BASE_HIDDEN, BERT_BASE_HEADS = 768, 12
ASSUMED_HEADS = 4  # of a Q-Former of another width, of which neither tensors nor settings tell them
DEFAULT_LORA_ALPHA = 32
DEFAULT_LORA_DROPOUT = 0.1
DEFAULT_SECONDS = 0.333333
DEFAULT_PROMPT_TEMPLATE = "USER: {}\nASSISTANT:"
TRANSCRIPTION_PROMPT = "Recognize the speech and give me the transcription."
ENCODER_FRAMES, ENCODER_SECONDS = 1500, 30.0

# Buffers that the model makes by itself.
DERIVED = re.compile(r"^speech_Qformer\.bert\.embeddings\.position_ids$|\.rotary_emb\.inv_freq$")
BEATS_BIAS_TABLE = re.compile(r"layers\.\d+(\.self_attn\.relative_attention_bias\.weight)$")

# Tokens that tokenizers reserve and text never uses, in the order in which they are tried.
AUDIO_TOKENS = (
    "<|audio|>", "<|AUDIO|>", "<|reserved_special_token_0|>", "<unused0>", "<unused99>", "<|fim_pad|>", "<unk>",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def convert_salmonn(
    source: str | Path,
    out: str | Path,
    whisper: str,
    llm: str,
    beats: str | Path | None = None,
    qformer_heads: int | None = None,
    audio_token: str | None = None,
    audio_token_id: int | None = None,
) -> str:
    r"""
    Write an original SALMONN checkpoint as an adapter checkpoint that `AutoModel.from_pretrained` loads, in the
    original's geometry (`WindowQFormerConfig.pad_to_30_seconds`). Its tensors stay float32, LoRA is a PEFT adapter.

    Args:
        source: the `.pth` file.
        out: the directory to write; made if missing.
        whisper, llm: the Whisper and the language model that the checkpoint was trained with, as directories or hub
            names. The output names them as base parts, it does not hold them.
        beats: the BEATs `.pt` file, for a checkpoint trained with one. The output holds its weights.
        qformer_heads: the Q-Former's attention heads. Tensors do not tell them; BERT base, which the original always
            takes, has 12. For a Q-Former of another width 4 are assumed, and the report says so.
        audio_token: the token that stands for one audio embedding, for a language model with a tokenizer; one that
            text never uses. Default: the first of `AUDIO_TOKENS` that the tokenizer has.
        audio_token_id: the same for a language model without a tokenizer. Default: the highest id of its vocabulary
            that neither begins, ends nor pads a text.

    Returns:
        The report: sizes, and every key of the checkpoint that was not taken over, with the reason.

    Raises:
        OSError: for a file that is missing or truncated, or a base part that cannot be had.
        ValueError: if the checkpoint and its parts do not fit each other, naming the tensors; if `out` is not empty.
            Nothing is left half-written.
    """
    out = Path(out)
    check_is_free(out)
    checkpoint = load_original_checkpoint(source)
    if not isinstance(checkpoint.get("model"), dict):
        raise ValueError(
            f"{source} has no entry 'model', so is not a SALMONN checkpoint; it holds {sorted(map(str, checkpoint))}."
        )
    settings = (checkpoint.get("config") or {}).get("model") or {}
    report = [f"{source} -> {out}"]

    tensors, frozen = {}, {"audio_tower": {}, "sound_tower": {}, "language_model": {}}
    for key, tensor in checkpoint["model"].items():
        name = from_original_key(key)
        part = name.split(".")[0]
        if DERIVED.search(key):
            report.append(f"left out, made anew by the model: {key}")
        elif part in frozen and ".lora_" not in name:
            frozen[part][name.removeprefix(f"{part}.").replace(".base_layer.", ".")] = (key, tensor)
        else:
            tensors[name] = tensor.float().contiguous()

    base = {"audio_tower": whisper, "language_model": llm}
    directories = {part: resolve_base_part(name) for part, name in base.items()}
    audio_config, text_config = (AutoConfig.from_pretrained(directory) for directory in directories.values())
    if audio_config.model_type != "whisper":
        raise ValueError(f"The speech encoder {whisper} is a '{audio_config.model_type}' model, not a Whisper.")
    if text_config.is_encoder_decoder:
        raise ValueError(f"The language model {llm} is a '{text_config.model_type}' model, not a causal one.")

    sound_config, sound_tensors = None, {}
    if beats is None and "projector.sound_norm.weight" in tensors:
        raise ValueError(
            f"{source} was trained with BEATs (it has ln_audio); name the BEATs .pt file as well (--beats)."
        )
    if beats is not None:
        if "projector.sound_norm.weight" not in tensors:
            raise ValueError(f"{source} was trained without BEATs (it has no ln_audio); leave the BEATs file out.")
        sound_config, sound_tensors = read_beats_checkpoint(beats)
        sound_config.architectures, sound_tensors = ["BeatsModel"], encoder_tensors(sound_tensors)  # no classifier
        sound_tensors |= trained_beats(frozen["sound_tower"], beats, report)

    tokenizer = None
    if any((directories["language_model"] / file).is_file() for file in TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(directories["language_model"])
        audio_token, audio_token_id = choose_audio_token(tokenizer, audio_token, audio_token_id, llm)
    elif audio_token is not None:
        raise ValueError(
            f"{llm} has no tokenizer to look {audio_token!r} up in; give the token's id (--audio-token-id)."
        )
    elif audio_token_id is None:
        audio_token_id = highest_free_id(text_config)

    parts = {"audio_config": audio_config, "sound_config": sound_config, "text_config": text_config}
    config = salmonn_config(tensors, settings, parts, qformer_heads, report)
    config.audio_token_id = audio_token_id
    config.base_parts = {
        part: str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name
        for part, name in base.items()
    }
    with torch.device("meta"):
        model = SalmonnForConditionalGeneration(config).eval()

    tensors |= {f"sound_tower.{key}": tensor.float().contiguous() for key, tensor in sound_tensors.items()}
    tensors |= trained_whisper(frozen["audio_tower"], config, directories["audio_tower"], report)
    check_language_model(frozen["language_model"], model, directories["language_model"], report)
    expected = {key: tensor for key, tensor in model.state_dict().items() if not is_base_key(key, config)}
    check_tensors(tensors, expected, lambda key: to_original_key(key, text_config), source, f"{whisper} and {llm}")

    feature_extractor = SalmonnFeatureExtractor(
        feature_size=audio_config.num_mel_bins,
        tail_seconds=0.0,
        pad_to_30_seconds=True,
        return_input_values=sound_config is not None,
    )
    if tokenizer is None:
        front_end = feature_extractor
        report.append(f"no processor, only its feature extractor: {llm} has no tokenizer")
    else:
        front_end = original_processor(feature_extractor, tokenizer, audio_token, settings, config)
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(end_token(tokenizer, settings))
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    report.append(f"the audio token is id {audio_token_id}" + (f", {audio_token!r}" if tokenizer is not None else ""))

    with written_whole(out) as directory:
        model.save_pretrained(directory, state_dict=tensors)
        front_end.save_pretrained(directory)

    projector, qformer, lora = config.projector_config, config.projector_config.qformer_config, config.lora
    report.append(
        f"Q-Former: {qformer.num_hidden_layers} layers, hidden size {qformer.hidden_size}, "
        f"{qformer.num_attention_heads} heads; windows of {projector.window_frames} frames every "
        f"{projector.window_stride}, {projector.queries_per_window} queries each"
    )
    if lora:
        targets = ", ".join(lora["target_modules"])
        report.append(f"LoRA: r {lora['r']}, alpha {lora['lora_alpha']}, on {targets}")
    entries = sorted(set(map(str, checkpoint)) - {"model", "config"})
    if entries:
        report.append(f"left out, of use to the original's trainer alone: entries {', '.join(entries)}")
    report.append(f"written: {len(tensors)} tensors, of which {len(sound_tensors)} are BEATs'")
    return "\n".join(report)


def salmonn_config(tensors: dict, settings: dict, parts: dict, qformer_heads: int | None, report: list[str]):
    """The `SalmonnConfig` of an original checkpoint's tensors (under our names) and `config["model"]` settings."""

    def shape(key):
        if key not in tensors:
            raise ValueError(f"The checkpoint lacks the tensor {to_original_key(key, text_config)}.")
        return tensors[key].shape

    audio_config, sound_config, text_config = parts.values()
    widths = [
        ("projector.audio_norm.weight", "Whisper's d_model", audio_config.d_model),
        ("projector.proj.weight", "the language model's hidden size", text_config.hidden_size),
        ("projector.sound_norm.weight", "BEATs' width", sound_config and sound_config.hidden_size),
    ]
    for key, part, width in widths:
        if width is not None and shape(key)[0] != width:
            raise ValueError(
                f"{to_original_key(key, text_config)} is made for a width of {shape(key)[0]}, but {part} is {width}; "
                "name the part that the checkpoint was trained with."
            )

    _, queries, hidden_size = shape("projector.query_tokens")
    heads = qformer_heads or settings.get("qformer_heads")
    if heads is None and hidden_size == BERT_BASE_HIDDEN:
        heads = BERT_BASE_HEADS
    elif heads is None:
        heads = ASSUMED_HEADS
        report.append(
            f"ASSUMED: {heads} attention heads in the Q-Former, whose hidden size {hidden_size} is not BERT base's; "
            "tensors do not tell. If the original has another number, convert again with --qformer-heads."
        )
    layer = "projector.qformer.encoder.layer."
    layers = {int(key.removeprefix(layer).split(".")[0]) for key in tensors if key.startswith(layer)}
    crossing = sorted(n for n in layers if f"{layer}{n}.crossattention.attention.query.weight" in tensors)

    lora_a = [key for key in tensors if ".lora_A." in key]
    lora = None
    if lora_a:
        lora = {
            "r": tensors[lora_a[0]].shape[0],
            "lora_alpha": settings.get("lora_alpha", DEFAULT_LORA_ALPHA),
            "lora_dropout": settings.get("lora_dropout", DEFAULT_LORA_DROPOUT),
            "target_modules": sorted({key.split(".lora_A.")[0].split(".")[-1] for key in lora_a}),
        }
    for part in filter(None, parts.values()):
        part.dtype = torch.float32  # as the original stores and trains its adapter
    frames_per_second = ENCODER_FRAMES / ENCODER_SECONDS
    return SalmonnConfig(
        projector_config={
            "qformer_config": {
                "hidden_size": hidden_size,
                "num_hidden_layers": len(layers),
                "num_attention_heads": heads,
                "intermediate_size": shape(f"{layer}0.intermediate_query.dense.weight")[0],
                "encoder_hidden_size": shape(f"{layer}0.crossattention.attention.key.weight")[1],
                "cross_attention_frequency": crossing[1] if len(crossing) > 1 else len(layers),
            },
            "window_frames": round(settings.get("second_per_window", DEFAULT_SECONDS) * frames_per_second),
            "window_stride": round(settings.get("second_stride", DEFAULT_SECONDS) * frames_per_second),
            "queries_per_window": queries,
            "pad_to_30_seconds": True,
            "dtype": "float32",
        },
        lora=lora,
        dtype="float32",
        **parts,
    )


def is_same(carried: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether two copies of a frozen tensor are equal to 16-bit precision, in the rows (tokens) that both have."""
    if carried.ndim != base.ndim or carried.shape[1:] != base.shape[1:]:
        return False
    rows = min(len(carried), len(base)) if carried.ndim else None
    return torch.allclose(carried[:rows].float(), base[:rows].float(), rtol=2**-7, atol=1e-5)


def trained_beats(carried: dict, beats: str | Path, report: list[str]) -> dict:
    """
    BEATs' tensors, under our names, if the checkpoint holds trained ones. The bias tables of its later layers are the
    first layer's, by which a wrong BEATs file shows.
    """
    own, trained = load_original_checkpoint(beats)["model"], {}
    for name, (key, tensor) in carried.items():
        shared = BEATS_BIAS_TABLE.sub(r"layers.0\1", name)
        base = own.get(name, own.get(shared))
        if base is not None and is_same(tensor, base):
            report.append(f"left out, the same as in {beats}: {key}")
        elif name == shared and (ours := from_original_beats_key(name)) is not None:
            trained[ours] = tensor
            report.append(f"kept, trained and so other than in {beats}: {key}")
        else:
            raise ValueError(f"{key} is not {beats}'s; name the BEATs file that the checkpoint was trained with.")
    return trained


def trained_whisper(carried: dict, config: SalmonnConfig, directory: Path, report: list[str]) -> dict:
    """Whisper's tensors, if the checkpoint holds trained ones: then the output keeps them, and names no base part."""
    if not carried:
        return {}
    own = part_keys("audio_tower", read_weights(directory))
    carried = {f"audio_tower.{name}": pair for name, pair in carried.items()}
    if all(name in own and is_same(tensor, own[name]) for name, (_, tensor) in carried.items()):
        report += [f"left out, the same as in {directory}: {key}" for key, _ in carried.values()]
        return {}
    del config.base_parts["audio_tower"]
    report.append(f"kept, trained and so other than in {directory}: Whisper's encoder")
    tensors = own | {name: tensor for name, (_, tensor) in carried.items()}
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def check_language_model(carried: dict, model, directory: Path, report: list[str]):
    """
    Language-model tensors inside a SALMONN checkpoint are frozen, so must be those of the base part. A tied output
    matrix is the input embeddings; the original may have added a row for a padding token.
    """
    if not carried:
        return
    own = read_weights(directory)
    embeddings = model.get_input_embeddings().weight
    tied = next(name for name, p in model.language_model.named_parameters() if p is embeddings)
    for name, (key, tensor) in carried.items():
        base = own.get(name, own.get(tied) if name == "lm_head.weight" else None)
        if base is None or not is_same(tensor, base):
            raise ValueError(
                f"{key} is not {directory}'s; name the language model that the checkpoint was trained with."
            )
        report.append(f"left out, the same as in {directory}: {key}")


def highest_free_id(text_config) -> int:
    """The highest token id that neither begins, ends nor pads a text."""
    ends = (text_config.bos_token_id, text_config.eos_token_id, text_config.pad_token_id)
    used = {used for ids in ends for used in (ids if isinstance(ids, list) else [ids])}
    return max(set(range(text_config.vocab_size)) - used)


def choose_audio_token(tokenizer, audio_token: str | None, audio_token_id: int | None, llm: str) -> tuple[str, int]:
    """The audio token and its id: the given one, or the first of `AUDIO_TOKENS` that stays whole in a text."""
    if audio_token_id is not None:
        audio_token = tokenizer.convert_ids_to_tokens(audio_token_id)
    for token in AUDIO_TOKENS if audio_token is None else [audio_token]:
        token_id = tokenizer.convert_tokens_to_ids(token)
        whole = tokenizer(token * 2, add_special_tokens=False).input_ids == [token_id] * 2
        if whole and token not in (tokenizer.bos_token, tokenizer.eos_token):
            return token, token_id
    lacking = f"no {audio_token!r}" if audio_token is not None else f"none of {', '.join(AUDIO_TOKENS)}"
    remedy = "name one of its own that text never uses (--audio-token)"
    raise ValueError(f"{llm}'s tokenizer has {lacking} as one special token; {remedy}.")


def end_token(tokenizer, settings: dict) -> str:
    """The token that ends an answer."""
    token = settings.get("end_sym") or tokenizer.eos_token
    if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
        raise ValueError(f"The tokenizer has no token {token!r}, with which the checkpoint's training ended answers.")
    return token


def original_processor(feature_extractor, tokenizer, audio_token, settings, config) -> SalmonnProcessor:
    """A processor with the original's prompt (`SALMONN.prompt_wrap` with its `prompt_template`) as chat template."""
    if tokenizer.pad_token in (None, audio_token):
        tokenizer.pad_token = tokenizer.eos_token
    before, after = (settings.get("prompt_template") or DEFAULT_PROMPT_TEMPLATE).split("{}")
    chat_template = (
        CONTENT_PRELUDE.replace("AUDIO_TOKEN", f"<Speech>{audio_token}</Speech> ") + "{{ bos_token }}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{ {json.dumps(before)} + message['content'] + {json.dumps(after)} }}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ message['content'] + {json.dumps(end_token(tokenizer, settings))} }}}}"
        "{%- else -%}{{ message['content'] + '\\n' }}{%- endif -%}{%- endfor -%}"
    )
    return SalmonnProcessor(
        feature_extractor,
        tokenizer,
        chat_template=chat_template,
        audio_token=audio_token,
        window_frames=config.projector_config.window_frames,
        window_stride=config.projector_config.window_stride,
        queries_per_window=config.projector_config.queries_per_window,
        transcription_prompt=TRANSCRIPTION_PROMPT,
    )
