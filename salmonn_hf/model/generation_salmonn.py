"""`generate` of SALMONN: clips are encoded once, whatever the beams; then the language model generates."""

from functools import partial

import torch
from transformers import GenerationMixin

from .ctc_draft import decode_with_drafts

CLIPS = ("input_features", "input_values", "audio_frames", "sound_frames")
DECODING = ("speculation_type", "num_beams", "do_sample", "cache_implementation")


class SalmonnGenerationMixin(GenerationMixin):
    """`speculation_type="ctc", tokenizer=processor.tokenizer` decodes one prompt with drafts, see [`ctc_draft`]."""

    @torch.no_grad()
    def generate(self, inputs=None, *args, **kwargs):
        """
        As in transformers. The sequences begin with the prompt as it was given, every audio token in its place.

        Raises:
            ValueError: if drafts are asked for without a CTC head or a tokenizer.
        """
        audio_inputs = {name: kwargs.pop(name, None) for clip in CLIPS for name in (clip, f"{clip}_mask")}
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            return super().generate(inputs, *args, **kwargs)

        config = kwargs.get("generation_config") or self.generation_config
        asked = {name: kwargs.get(name, getattr(config, name)) for name in DECODING}
        audio = self.project_audio(**audio_inputs)
        prompt = self.embed_prompt(input_ids, kwargs.pop("attention_mask", None), audio=audio)
        del prompt["labels"]
        if asked["speculation_type"] == "ctc":
            if not self.projector.has_ctc_head or kwargs.get("tokenizer") is None:
                needs = "a model with a CTC head (ctc_vocab_size of its projector), and tokenizer=processor.tokenizer"
                raise ValueError(f'speculation_type="ctc" needs {needs}.')
            # Drafts change the time alone. They are left out for several prompts, beams or samples, and where
            # another cache is asked for: from one of a fixed size no wrong draft can be taken back.
            one_path = len(input_ids) == 1 and asked["num_beams"] in (1, None) and not asked["do_sample"]
            if one_path and asked["cache_implementation"] is None:
                embedding = self.get_input_embeddings()
                draft = {"draft_ids": [] if audio is None else self.projector.ctc_draft(audio.states, embedding)}
                kwargs["custom_generate"] = partial(decode_with_drafts, draft_tokenizer=kwargs["tokenizer"], **draft)
        output = super().generate(None, *args, **prompt, **kwargs)
        # Where windows are merged, the language model's prompt is shorter than the one given.
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        given = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
        sequences = torch.cat([given, sequences[:, prompt["input_ids"].shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output
