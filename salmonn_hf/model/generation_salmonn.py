"""`generate` of SALMONN: clips are encoded once, whatever the beams; then the language model generates."""

from functools import partial

import torch
from torch import nn
from transformers import GenerationMixin, StopStringCriteria

from .answering import transcript_limit
from .clip_tensors import FEATURES, FRAMES, with_masks
from .ctc_draft import CTCDraft, decode_with_drafts
from .generation_options import GenerationOptions, PromptStreamer
from .kept_cache import cached_length, check_rows, clips_behind_cache, keep_prompt, split_at_cache
from .placeholders import embed_prompt, expand_request
from .transcript_draft import TranscriptDraft

PROMPT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


class SalmonnGenerationMixin(GenerationMixin):
    """
    With `tokenizer=processor.tokenizer` and the projector's `speculation_type`, "ctc" or "transcript", one prompt is
    decoded with drafts, see [`ctc_draft`] and [`transcript_draft`].
    """

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """
        As in transformers. The sequences begin with the prompt as it was given, every audio token in its place, and
        `max_length` counts these. With `past_key_values` that hold the beginning of `input_ids`, its clips are not
        encoded again and need not be given.

        Of audio alone, without `input_ids`, a transcript is asked for, as `generation_config.transcription_ids` say
        (see [`SalmonnProcessor.transcription_ids`]). The sequences are then the answers alone; without a limit they
        may be as long as what can be said in the time.

        Raises:
            ValueError: for options that do not go with the prompt, by their names; if drafts are asked for without a
                CTC head or a tokenizer; if the clips do not fit the prompt.
        """
        if hasattr(kwargs.get("tokenizer"), "tokenizer"):  # a processor, which `transformers serve` hands on
            kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer
        options = GenerationOptions(self.generation_config, generation_config, args, kwargs)
        if "prompt_embeds" in kwargs or options["is_assistant"]:  # called by a way of decoding, not from without
            return super().generate(inputs, options.config, **kwargs)
        if inputs is not None:
            name = "input_features" if inputs.is_floating_point() and inputs.ndim == 3 else "input_ids"
            if kwargs.get(name) is not None:
                raise ValueError(f"inputs, which come first, and {name} are the same; give one of them.")
            kwargs[name] = inputs
        clips = {name: kwargs.pop(name, None) for name in with_masks(FEATURES + FRAMES)}
        given = {name: kwargs.pop(name, None) for name in PROMPT}
        has_clips = any(clip is not None for clip in clips.values())
        answers_alone = has_clips and given["input_ids"] is None and given["inputs_embeds"] is None
        # It stands for audio that was given, not made.
        options["suppress_tokens"] = sorted({*(options["suppress_tokens"] or ()), self.config.audio_token_id})
        cache, audio = kwargs.get("past_key_values"), None
        if answers_alone:
            if clips["input_features_mask"] is None:  # among Whisper's inputs it has the other name
                clips["input_features_mask"] = given["attention_mask"]
            audio = self.project_audio(**clips)
            given["input_ids"], given["attention_mask"] = self.transcription_request(audio, clips, options)
        input_ids = given["input_ids"]
        options.check(given, has_clips, in_cache := cached_length(cache) > 0)
        if input_ids is None or (given["inputs_embeds"] is not None and not has_clips):
            # Transformers' own way with embeddings: the first pass takes them whole, whatever the ids are.
            prompt = self.embed_prompt(audio=self.project_audio(**clips), **given) if has_clips else given
            prompt = {name: prompt[name] for name in PROMPT if prompt[name] is not None}
            return super().generate(None, options.config, **prompt, **kwargs)

        if in_cache:
            check_rows(cache, len(input_ids), max(options["num_beams"] or 1, options["num_return_sequences"] or 1))
            prompt, has_clips = self.prompt_behind_cache(cache, given, clips)
        else:
            audio = self.project_audio(**clips) if audio is None else audio
            prompt = self.embed_prompt(audio=audio, **given)
        embeds = prompt["inputs_embeds"]
        prompt = {name: prompt[name] for name in PROMPT if name != "inputs_embeds"}
        if has_clips:
            prompt["prompt_embeds"] = embeds
            if options["assistant_model"] is not None:
                prompt["assistant_embeds"] = self.embeds_for_assistant(options, prompt["input_ids"], clips)
        if options["speculation_type"] in ("ctc", "transcript"):
            self.decode_with_drafts(options, audio, one_prompt=len(input_ids) == 1 and not in_cache)

        seen, width = input_ids[:, :0] if answers_alone else input_ids, prompt["input_ids"].shape[1]
        if not (as_given := seen is prompt["input_ids"]):
            options.lengthen(width - seen.shape[1])
            if kwargs.get("streamer") is not None:
                kwargs["streamer"] = PromptStreamer(kwargs["streamer"], seen)
        output = super().generate(None, options.config, **prompt, **kwargs)
        if as_given:
            return output
        # Where windows are merged, the language model's prompt is shorter than the one given.
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if not answers_alone:
            cache = getattr(output, "past_key_values", cache)
            keep_prompt(cache, input_ids, prompt["input_ids"], prompt["attention_mask"])
        seen = seen.repeat_interleave(len(sequences) // len(seen), dim=0).to(sequences.device)
        sequences = torch.cat([seen, sequences[:, width:]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def transcription_request(self, audio, clips: dict, options: GenerationOptions):
        """`input_ids` and `attention_mask` of the request for a transcript of each clip; its limit goes to options."""
        pad = options["pad_token_id"] if isinstance(options["pad_token_id"], int) else 0
        request = expand_request(options["transcription_ids"], audio.num_states, self.config.audio_token_id, pad)
        if options["max_new_tokens"] is None and options["max_length"] is None:
            options["max_new_tokens"] = transcript_limit(0.02 * int(encoder_frames(clips).max()))
        return request

    def prompt_behind_cache(self, cache, given: dict, clips: dict) -> tuple[dict, bool]:
        """
        What `embed_prompt` returns, for a conversation of which `cache` holds the beginning: only clips behind that
        are encoded. And whether there are any; without them there are no `inputs_embeds`.
        """
        input_ids, token = given["input_ids"], self.config.audio_token_id
        if given["inputs_embeds"] is not None:
            raise ValueError("With past_key_values and audio, give input_ids alone, without inputs_embeds.")
        (head, head_mask), (tail, tail_mask) = split_at_cache(cache, input_ids, given["attention_mask"])
        if (frames := encoder_frames(clips)) is not None:
            counts = self.config.projector_config.num_audio_tokens(frames)
            clips = clips_behind_cache(clips, counts, input_ids == token, tail.shape[1])
        audio = self.project_audio(**clips)
        places, given_audio = int((tail == token).sum()), 0 if audio is None else len(audio.states)
        if places != given_audio:
            raise ValueError(
                f"Behind past_key_values input_ids hold {places} audio placeholders, but the clips give {given_audio} "
                "audio embeddings. Crop past_key_values to end before or behind a clip, where windows are merged "
                "behind the prompt, and give the clips behind them."
            )
        new = self.embed_prompt(tail, tail_mask, audio=audio)
        ids = new["input_ids"] if head is None else torch.cat([head, new["input_ids"]], dim=1)
        if torch.equal(ids, input_ids):
            ids = input_ids
        elif head is None or given["position_ids"] is not None:
            raise ValueError(
                "Windows are merged, so that past_key_values hold fewer positions than the prompt has; give the whole "
                "conversation's input_ids, and no position_ids."
            )
        prompt = {"input_ids": ids, "attention_mask": torch.cat([head_mask, new["attention_mask"]], dim=1)}
        embeds = nn.functional.pad(new["inputs_embeds"], (0, 0, cached_length(cache), 0))
        return prompt | {"position_ids": given["position_ids"], "inputs_embeds": embeds}, audio is not None

    def embeds_for_assistant(self, options: GenerationOptions, input_ids, clips: dict) -> torch.Tensor | None:
        """A SALMONN that drafts hears the clips itself: its embeddings of the prompt; `None` for a language model."""
        assistant = options["assistant_model"]
        if not hasattr(assistant, "project_audio"):
            return None
        if clips["input_features"] is None or cached_length(options["past_key_values"]):
            raise ValueError("An assistant_model that hears needs the clips' input_features, and no past_key_values.")
        own, other = ((c.text_config.vocab_size, c.audio_token_id) for c in (self.config, assistant.config))
        if own != other:
            raise ValueError(
                f"assistant_model has a vocabulary of {other[0]} tokens with {other[1]} for audio, and this model one "
                f"of {own[0]} with {own[1]}; choose one with the same tokenizer, or a language model alone."
            )
        on_device = {name: None if clip is None else clip.to(assistant.device) for name, clip in clips.items()}
        embeds = assistant.project_audio(**on_device).embeds
        is_audio = (input_ids == self.config.audio_token_id).to(assistant.device)
        if len(embeds) != is_audio.sum():
            raise ValueError(
                f"assistant_model makes {len(embeds)} audio tokens of the clips and this model {int(is_audio.sum())}; "
                "choose one with the same windows, or a language model alone."
            )
        return embed_prompt(input_ids.to(assistant.device), is_audio, embeds, assistant.get_input_embeddings())

    def decode_with_drafts(self, options: GenerationOptions, audio, one_prompt: bool):
        """Have a prompt decoded with the projector's drafts, where there can be any."""
        kind = options["speculation_type"]
        if kind != self.projector.speculation_type or options["tokenizer"] is None:
            needs = {
                "ctc": "a projector with a CTC head (its config's ctc_vocab_size)",
                "transcript": "a projector of Whisper's whole decoder",
            }
            raise ValueError(f'speculation_type="{kind}" needs {needs[kind]}, and tokenizer=processor.tokenizer.')
        # Drafts change the time alone. They are left out for several prompts, beams or samples, and where another
        # cache is asked for: from one of a fixed size no wrong draft can be taken back.
        one_path = one_prompt and options["num_beams"] in (1, None) and not options["do_sample"]
        if one_path and options["cache_implementation"] is None and options["use_cache"] is not False:
            embedding = self.get_input_embeddings()
            draft = {"draft_ids": [] if audio is None else self.projector.draft(audio, embedding)}
            draft["draft_class"] = CTCDraft if kind == "ctc" else TranscriptDraft
            tokenizer = draft["draft_tokenizer"] = options["tokenizer"]
            # Transformers gives a decoding function from without neither the tokenizer nor the streamer.
            if (stop_strings := options["stop_strings"]) is not None:
                stop = StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer)
                options.kwargs["stopping_criteria"] = [*(options["stopping_criteria"] or ()), stop]
                options.kwargs["stop_strings"] = None
            draft["streamer"] = options["streamer"]
            options.kwargs["custom_generate"] = partial(decode_with_drafts, **draft)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        inputs_embeds=None,
        prompt_embeds=None,
        assistant_embeds=None,
        **kwargs,
    ):
        """
        As in transformers. `prompt_embeds` `(batch, tokens, hidden size)` are the first tokens' embeddings, with audio
        in its places: of `input_ids` they take the place in every pass that has these tokens, as `inputs_embeds`,
        which transformers takes in the first pass in place of all tokens, drafted ones too, do not.
        """
        settings = {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, **kwargs}
        model_inputs = super().prepare_inputs_for_generation(input_ids, **settings)
        if prompt_embeds is None:
            return model_inputs
        ids = model_inputs["input_ids"]
        if (start := input_ids.shape[1] - ids.shape[1]) < prompt_embeds.shape[1]:
            if input_ids.shape[1] <= prompt_embeds.shape[1]:  # a part of the prompt, maybe
                start = cached_length(past_key_values)
            of_prompt = prompt_embeds[:, start : start + ids.shape[1]]
            behind = self.get_input_embeddings()(ids[:, of_prompt.shape[1] :])
            model_inputs |= {"input_ids": None, "inputs_embeds": torch.cat([of_prompt.to(behind), behind], dim=1)}
        return model_inputs

    # What drafts is called with the arguments of this model's own passes.
    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        model_kwargs = dict(model_kwargs)
        model_kwargs.pop("prompt_embeds", None)
        if (embeds := model_kwargs.pop("assistant_embeds", None)) is not None:
            model_kwargs["prompt_embeds"] = embeds
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)


def encoder_frames(clips: dict) -> torch.LongTensor | None:
    """How many frames of 20 ms each clip has, `(clips,)`; `None` without clips."""
    if (features := clips["input_features"]) is not None:
        mask = clips["input_features_mask"]
        return (torch.ones_like(features[:, 0]) if mask is None else mask)[:, ::2].sum(-1).long()
    return None if clips["audio_frames"] is None else clips["audio_frames_mask"].sum(-1)
