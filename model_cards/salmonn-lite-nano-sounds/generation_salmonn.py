"""`generate` of SALMONN: the audio is heard once, whatever the beams; then the language model writes."""

import torch
from transformers import GenerationMixin

from .ctc_draft import CTCDraft, best_tokens

AUDIO_INPUTS = (
    "input_features",
    "input_features_mask",
    "input_values",
    "input_values_mask",
    "audio_frames",
    "audio_frames_mask",
    "sound_frames",
    "sound_frames_mask",
)


class SalmonnGenerationMixin(GenerationMixin):
    """`speculation_type="ctc", tokenizer=processor.tokenizer` decodes one prompt with drafts, see [`CTCDraft`]."""

    @torch.no_grad()
    def generate(self, inputs=None, *args, **kwargs):
        """As in transformers. The sequences begin with the prompt as it was given, every audio token in its place."""
        audio = {name: kwargs.pop(name, None) for name in AUDIO_INPUTS}
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            return super().generate(inputs, *args, **kwargs)

        heard = self.hear(**audio)
        prompt = self.embed_prompt(input_ids, kwargs.pop("attention_mask", None), **heard)
        del prompt["labels"]
        output = super().generate(None, *args, **prompt, audio_states=heard.get("audio_embeds"), **kwargs)
        # Where windows are merged, the language model's prompt is shorter than the one given.
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        given = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
        sequences = torch.cat([given, sequences[:, prompt["input_ids"].shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _prepare_generation_config(self, generation_config, **kwargs):
        states = kwargs.pop("audio_states", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if generation_config.speculation_type == "ctc":
            generation_config.prompt_lookup_num_tokens = 1  # generate then asks for a candidate generator
            if self.ctc_head is not None and states is not None:
                generation_config.ctc_draft = best_tokens(self.ctc_head, states, self.ctc_embedding())
        return generation_config, model_kwargs

    def _get_candidate_generator(self, generation_config, target_tokenizer=None, **kwargs):
        if generation_config.speculation_type != "ctc":
            return super()._get_candidate_generator(
                generation_config=generation_config, target_tokenizer=target_tokenizer, **kwargs
            )
        if self.ctc_head is None or target_tokenizer is None:
            raise ValueError(
                'speculation_type="ctc" needs a model with a CTC head (ctc_vocab_size in its config), and '
                "tokenizer=processor.tokenizer beside it."
            )
        return CTCDraft(
            getattr(generation_config, "ctc_draft", []),
            self.get_input_embeddings(),
            target_tokenizer,
            int(generation_config._eos_token_tensor[0]),
        )
