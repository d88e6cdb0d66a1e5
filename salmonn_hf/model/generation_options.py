"""The options of one call of `generate`, wherever they are given, and what of them goes with a prompt with audio."""

import copy
import inspect

import torch
from transformers.generation import BaseStreamer, GenerationMixin

# Of transformers' `generate`, behind `inputs` and `generation_config`.
POSITIONAL = tuple(inspect.signature(GenerationMixin.generate).parameters)[3:-1]
# They read, or draft, token ids, of which `inputs_embeds` alone have none.
DRAFTS = ("prompt_lookup_num_tokens", "assistant_model")
NEEDS_IDS = (*DRAFTS, "prefill_chunk_size", "speculation_type")
SPECULATION = (None, "ctc", "transcript", "dflash")  # the last is of transformers
OF_HUB_CODE = ("penalty_alpha", "dola_layers", "num_beam_groups", "constraints", "force_words_ids")


class GenerationOptions:
    """
    What a call of `generate` asks for, by name: in its arguments, else in its `generation_config`, else in the
    model's. A change is made where the call has the option, or may have it.

    Args:
        default (`GenerationConfig`): the model's.
        config (`GenerationConfig`, *optional*): the call's; it is copied.
        args, kwargs: the call's other arguments, those that stand behind `generation_config` and the named ones.
    """

    def __init__(self, default, config, args: tuple, kwargs: dict):
        if len(args) > len(POSITIONAL):
            raise TypeError(f"generate takes {len(POSITIONAL)} arguments behind generation_config, not {len(args)}.")
        by_place = dict(zip(POSITIONAL, args, strict=False))
        if twice := next((name for name in by_place if name in kwargs), None):
            raise TypeError(f"generate got {twice} twice, by its place and by its name.")
        kwargs |= by_place
        self.default, self.config, self.kwargs = default, copy.deepcopy(config), kwargs

    def __getitem__(self, name: str):
        if name in self.kwargs:
            return self.kwargs[name]
        found = (getattr(config, name, None) for config in (self.config, self.default))
        return next((value for value in found if value is not None), None)

    def __setitem__(self, name: str, value):
        if self.config is None or name in self.kwargs:
            self.kwargs[name] = value
        else:
            setattr(self.config, name, value)

    def check(self, given: dict, has_clips: bool, in_cache: bool):
        """
        Args:
            given (`dict`): `input_ids` and `inputs_embeds`, as far as there are any.
            in_cache (`bool`): whether a part of them is in `past_key_values`.

        Raises:
            ValueError: for options that do not go with such a prompt, naming the option.
        """
        if self["assistant_early_exit"] is not None:
            raise ValueError("assistant_early_exit needs a model that was trained to exit early; leave it out.")
        if self["use_mtp"]:
            raise ValueError("use_mtp needs a model with layers that predict several tokens; leave it out.")
        by_hub_code = self["trust_remote_code"] or self["custom_generate"] is not None
        if name := next((name for name in OF_HUB_CODE if self[name] and not by_hub_code), None):
            raise ValueError(f"{name} needs code of the hub: allow that by trust_remote_code=True, or leave it out.")
        drafting = next((name for name in DRAFTS if self[name] is not None), None)
        if drafting and (in_cache or self["cache_implementation"] not in (None, "dynamic")):
            which = "past_key_values" if in_cache else "cache_implementation"
            raise ValueError(f"{drafting} needs a cache that is empty at first and grows; leave out it or {which}.")
        if drafting and self["stop_strings"] is not None:
            raise ValueError(
                f"{drafting} takes several tokens at a time, and could pass over stop_strings; leave out one."
            )
        if self["speculation_type"] not in SPECULATION:
            raise ValueError(
                f'speculation_type={self["speculation_type"]!r} is not known: use "ctc", for drafts of the CTC head, '
                "or \"transcript\", for Whisper's decoder's; the projector's `speculation_type` says which it has."
            )
        if has_clips and self["cache_implementation"] == "paged":
            raise ValueError('cache_implementation="paged" takes token ids alone, no audio; leave it out.')
        if has_clips and self["token_healing"]:
            raise ValueError("token_healing writes the prompt anew, without its audio; leave it out.")
        if given["input_ids"] is None and given["inputs_embeds"] is not None:
            for name in NEEDS_IDS:
                if self[name] is not None:
                    raise ValueError(f"{name} needs input_ids beside the inputs_embeds; give both, or leave it out.")
        ids = given["input_ids"]
        if ids is not None and len(ids) > 1 and drafting:
            raise ValueError(f"{drafting} drafts for one prompt at a time; there are {len(ids)}. Leave it out.")

    def lengthen(self, tokens: int):
        """Have `max_length` and `min_length` count so many tokens more: those that the caller does not see."""
        for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if self[name] and self[instead] is None:
                self[name] = max(self[name] + tokens, 0)


class PromptStreamer(BaseStreamer):
    """A streamer that is shown the prompt as it was given, in place of the one that the language model gets."""

    def __init__(self, streamer: BaseStreamer, prompt: torch.LongTensor):
        self.streamer, self.prompt = streamer, prompt

    def put(self, value):
        if self.prompt is not None:
            value, self.prompt = self.prompt.cpu(), None
        self.streamer.put(value)

    def end(self):
        self.streamer.end()
