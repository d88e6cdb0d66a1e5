"""Answers to prompts about audio: one way to generate them, for the pipeline, the commands, evaluation and training."""

from .repetition import RepetitionGuard, cut_repetition, strip_end


def transcript_limit(seconds: float) -> int:
    """The most tokens that a transcript of so many seconds may have: nobody says more than 15 a second."""
    return 16 + int(round(15 * seconds, 6))


def generate_answers(
    model, processor, inputs: dict, max_new_tokens: int | list[int] | None, **generate_kwargs
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
        generate_kwargs: for `model.generate`.

    Returns:
        `list[str]`: an answer per prompt, without special tokens and without spaces at its ends.

    Raises:
        ValueError: if the model gives several answers per prompt.
    """
    prompts, prompt_tokens = inputs["input_ids"].shape
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * prompts
    settings = {"tokenizer": processor.tokenizer, **generate_kwargs}
    settings["stopping_criteria"] = [*generate_kwargs.get("stopping_criteria", ()), RepetitionGuard()]
    if max_new_tokens is not None:
        settings["max_new_tokens"] = max(limits)
    output = model.generate(**{name: value.to(model.device) for name, value in inputs.items()}, **settings)
    sequences = getattr(output, "sequences", output)  # an object with return_dict_in_generate
    if len(sequences) != prompts:
        raise ValueError(
            f"generate gave {len(sequences)} texts for {prompts} prompts; leave num_return_sequences at 1."
        )
    ends = {processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id}
    answers = [
        cut_repetition(strip_end(tokens[:limit], ends))
        for tokens, limit in zip(sequences[:, prompt_tokens:].tolist(), limits, strict=True)
    ]
    return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]
