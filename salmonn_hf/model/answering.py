"""Generates the answers to prompts about audio, for pipeline, commands, evaluation and training alike."""

import torch

from .clip_tensors import FEATURES, FRAMES, with_masks
from .repetition import RepetitionGuard, cut_repetition, strip_end


def transcript_limit(seconds: float) -> int:
    """The most tokens that a transcript of so many seconds may have: nobody says more than 15 a second."""
    return 16 + int(round(15 * seconds, 6))


def generate_answers(
    model,
    processor,
    inputs: dict,
    max_new_tokens: int | list[int] | None,
    is_transcript: bool | list[bool] = False,
    **generate_kwargs,
) -> list[str]:
    r"""
    The answer to each prompt, whatever other prompts are in the batch: a phrase that is repeated without end stops the
    generation of its own row, and stands once in the answer. Greedy, unless `generate_kwargs` or the model's
    generation config say otherwise.

    Args:
        model ([`SalmonnForConditionalGeneration`]).
        processor ([`SalmonnProcessor`]): its tokenizer decodes the answers, and drafts of them are made with it.
        inputs (`dict`): what `processor.apply_chat_template` gives: left-padded `input_ids` and `attention_mask` of
            shape `(prompts, tokens)`, and the clips of all prompts as features; or their frames, as
            `model.encode_audio` gives them. On any device.
        max_new_tokens (`int` or `list[int]`): of every answer, or of each. `None`: what `generate_kwargs` or the
            model's generation config say.
        is_transcript (`bool` or `list[bool]`): whether every prompt, or each, asks for the transcript of its one clip.
            The transcript of a clip without a word, see [`SalmonnProjector.has_words`], is empty: the language model,
            which would make some up, is not asked.
        generate_kwargs: for `model.generate`.

    Returns:
        `list[str]`: an answer per prompt, without special tokens and without spaces at its ends.

    Raises:
        ValueError: if the model gives several answers per prompt.
    """
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    prompts = len(inputs["input_ids"])
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * prompts
    is_transcript = is_transcript if isinstance(is_transcript, list) else [is_transcript] * prompts
    asked = list(range(prompts))
    if any(is_transcript) and model.projector.tells_words:
        inputs, has_words = with_frames(model, inputs)
        asked = [row for row in asked if has_words[row] or not is_transcript[row]]
        if len(asked) < prompts:
            inputs = {name: value[asked] for name, value in inputs.items()}
    answers = [""] * prompts
    if asked:
        limits = None if max_new_tokens is None else [limits[row] for row in asked]
        for row, answer in zip(asked, generate(model, processor, inputs, limits, **generate_kwargs), strict=True):
            answers[row] = answer
    return answers


@torch.no_grad()
def with_frames(model, inputs: dict) -> tuple[dict, list[bool]]:
    """`inputs` with the clips' frames in place of their features, and whether each clip has words."""
    frames = {name: inputs[name] for name in with_masks(FRAMES) if name in inputs}
    if not frames:
        frames = model.encode_audio(**{name: inputs[name] for name in with_masks(FEATURES) if name in inputs})
    prompts = {name: value for name, value in inputs.items() if name not in with_masks(FEATURES + FRAMES)}
    projector = model.projector
    return prompts | frames, projector.has_words(model.get_input_embeddings(), **frames).tolist()


def generate(model, processor, inputs: dict, limits: list[int] | None, **generate_kwargs) -> list[str]:
    """See `generate_answers`; `limits` are the tokens of each answer."""
    prompts, prompt_tokens = inputs["input_ids"].shape
    settings = {"tokenizer": processor.tokenizer, **generate_kwargs}
    settings["stopping_criteria"] = [*generate_kwargs.get("stopping_criteria", ()), RepetitionGuard()]
    if limits is not None:
        settings["max_new_tokens"] = max(limits)
    output = model.generate(**inputs, **settings)
    sequences = getattr(output, "sequences", output)  # an object with return_dict_in_generate
    if len(sequences) != prompts:
        raise ValueError(
            f"generate gave {len(sequences)} texts for {prompts} prompts; leave num_return_sequences at 1."
        )
    ends = {processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id}
    answers = [
        cut_repetition(strip_end(tokens[:limit], ends))
        for tokens, limit in zip(sequences[:, prompt_tokens:].tolist(), limits or [None] * prompts, strict=True)
    ]
    return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]
