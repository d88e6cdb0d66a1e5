"""
SALMONN: audio → encoders → projector → language model → text, in the order in which data flows. Tang et al., "SALMONN:
Towards Generic Hearing Abilities for Large Language Models", ICLR 2024 (https://arxiv.org/abs/2310.13289), 3.1.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .checkpoint import base_state_dict
from .configuration_salmonn import SalmonnConfig
from .generation_salmonn import SalmonnGenerationMixin
from .kept_cache import keep_prompt, mask_as_cut
from .lora import LORA_FIELDS, adapted_parts
from .modeling_beats import BeatsModel
from .placeholders import check_placeholders, drop_spare_placeholders, embed_prompt
from .pretrained_salmonn import BASE_PART_KWARGS, SalmonnPreTrainedModel
from .projector import ProjectorOutput
from .quantized_layers import quantize_parts
from .speech_encoder import SalmonnWhisperEncoder
from .vocabulary import VocabularyMixin
from .whisper_decoder_projector import WhisperDecoderProjector
from .whisper_projector import WhisperProjector
from .window_qformer import WindowQFormerProjector

PASSED_ON = ("past_key_values", "hidden_states", "attentions")  # of the language model's outputs


@dataclass
class SalmonnModelOutput(BaseModelOutputWithPast):
    r"""
    last_hidden_state, past_key_values, hidden_states, attentions: the language model's.
    audio_embeds (`torch.Tensor` of shape `(audio tokens of the batch, hidden size)`): what the projector gives.
    """

    audio_embeds: torch.Tensor | None = None


@dataclass
class SalmonnOutput(CausalLMOutputWithPast):
    r"""
    loss (`torch.Tensor`, *optional*): next-token loss; the alignment loss where the language model is not run.
    logits (`torch.Tensor` of shape `(batch, kept positions, vocabulary)`).
    alignment_loss (`torch.Tensor`, *optional*): with `ctc_labels`, nats per target token.
    past_key_values, hidden_states, attentions: the language model's.
    audio_embeds (`torch.Tensor` of shape `(audio tokens of the batch, hidden size)`): what the projector gives.
    """

    audio_embeds: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None


class SalmonnModel(VocabularyMixin, SalmonnPreTrainedModel):
    """Encoders, projector and language model, up to its last hidden state."""

    def __init__(self, config: SalmonnConfig):
        super().__init__(config)
        self.audio_tower = SalmonnWhisperEncoder._from_config(config.audio_config)
        if config.sound_config is not None:
            self.sound_tower = AutoModel.from_config(config.sound_config)
        self.projector = AutoModel.from_config(config.projector_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        for part in adapted_parts(config):
            self.add_lora(getattr(config, LORA_FIELDS[part]), part)
        self.post_init()

    def quantize_parts(self, parts: dict[str, dict]):
        """Round the weights of parts to few bits, in place, see [`quantize_parts`]; the config is left as it is."""
        # A method, since a process with the package and a checkpoint's own code has these layers' classes twice.
        quantize_parts(self, parts)
        self.refuse_to_merge_into_bits()

    def train(self, mode: bool = True):
        """As `nn.Module.train`, but an encoder without a trainable weight stays in evaluation mode."""
        super().train(mode)
        for tower in ("audio_tower", "sound_tower"):
            if hasattr(self, tower) and not any(p.requires_grad for p in getattr(self, tower).parameters()):
                getattr(self, tower).eval()
        return self

    def encode_audio(
        self, input_features, input_features_mask=None, input_values=None, input_values_mask=None, transcribe=True
    ):
        r"""
        The frozen half of the model. What it returns can be kept, and given to `forward` in place of its inputs.

        Args:
            input_features (`torch.Tensor` of shape `(clips, mel bins, mel frames)`).
            input_features_mask (`torch.Tensor` of shape `(clips, mel frames)`, *optional*): default: all frames.
            input_values, input_values_mask (`torch.Tensor` of shape `(clips, samples)`): for the sound encoder.
            transcribe (`bool`): with what the projector's own `transcribe` gives; without it, the frames alone.

        Raises:
            ValueError: if the two encoders are given different numbers of clips.

        Returns:
            `dict`: `audio_frames` `(clips, frames, d_model)` at 50 Hz and `audio_frames_mask` `(clips, frames)`, bool;
            with a sound encoder or `config.sound_layers` also `sound_frames` and `sound_frames_mask`; and what the
            projector's own `transcribe` gives.
        """
        encoded = self.encode_speech(input_features, input_features_mask)
        if self.config.sound_config is not None:
            encoded |= self.encode_sound(input_values, input_values_mask)
        if transcribe:
            encoded |= self.projector.transcribe(encoded["audio_frames"], encoded["audio_frames_mask"])
        return encoded

    def encode_speech(self, input_features, input_features_mask=None):
        return self.speech_frames(self.run_audio_tower(input_features, input_features_mask), input_features_mask)

    def run_audio_tower(self, input_features, input_features_mask=None, **kwargs):
        """The speech encoder's output, with all layers' where they are asked for or are sound frames."""
        if input_features_mask is None:
            input_features_mask = torch.ones_like(input_features[:, 0], dtype=torch.int32)
        if self.config.sound_layers is not None:
            kwargs["output_hidden_states"] = True
        input_features = input_features.to(self.audio_tower.dtype)
        return self.audio_tower(input_features, attention_mask=input_features_mask, return_dict=True, **kwargs)

    def speech_frames(self, encoded, input_features_mask=None) -> dict[str, torch.Tensor]:
        """What `encode_audio` returns, of the speech encoder's output."""
        frames = encoded.last_hidden_state
        mask = torch.ones_like(frames[..., 0]) if input_features_mask is None else input_features_mask[:, ::2]
        frames = {"audio_frames": frames, "audio_frames_mask": mask.bool()}
        if self.config.sound_layers is not None:
            sound_frames = torch.stack([encoded.hidden_states[layer] for layer in self.config.sound_layers]).mean(0)
            frames |= {"sound_frames": sound_frames, "sound_frames_mask": frames["audio_frames_mask"]}
        return frames

    def encode_sound(self, input_values, input_values_mask=None):
        if input_values is None:
            raise ValueError(
                "The sound encoder's input_values are missing beside the input_features; make both with a processor "
                "whose feature extractor has return_input_values."
            )
        if self.config.sound_config.model_type != "beats":  # which makes its spectrogram in float32
            input_values = input_values.to(self.sound_tower.dtype)
        if input_values_mask is None:
            input_values_mask = torch.ones_like(input_values, dtype=torch.int32)
        settings = {"attention_mask": input_values_mask, "return_dict": True}
        sound_frames = self.sound_tower(input_values, **settings).last_hidden_state
        lengths = self.sound_tower._get_feat_extract_output_lengths(input_values_mask.sum(-1))
        positions = torch.arange(sound_frames.shape[1], device=sound_frames.device)
        return {"sound_frames": sound_frames, "sound_frames_mask": positions < lengths[:, None]}

    def project_audio(
        self, input_features=None, input_features_mask=None, input_values=None, input_values_mask=None, **frames
    ) -> ProjectorOutput | None:
        """
        Clips, as `encode_audio` takes them, or the `frames` that it returned, to audio tokens, through the projector.
        `None` without clips.
        """
        if input_features is not None:
            frames = self.encode_audio(input_features, input_features_mask, input_values, input_values_mask)
        frames = {name: value for name, value in frames.items() if value is not None}
        if "audio_frames" not in frames:
            return None
        counts = {name: len(value) for name, value in frames.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"Both encoders must be given the same clips; there are {counts} of them.")
        return self.projector(token_embedding=self.get_input_embeddings(), **frames)

    @can_return_tuple
    def get_audio_features(
        self, input_features, input_features_mask=None, input_values=None, input_values_mask=None, **kwargs
    ):
        r"""
        Audio to embeddings in the language model's space.

        Args:
            kwargs: for the speech encoder, `output_hidden_states` and `output_attentions` among them; `return_dict`.

        Returns:
            `BaseModelOutputWithPooling`. `pooler_output`: `(audio tokens, hidden size)`, the clips in a row without
            padding; `last_hidden_state`, `hidden_states`, `attentions`: the speech encoder's.
        """
        encoded = self.run_audio_tower(input_features, input_features_mask, **kwargs)
        with_layers = kwargs.get("output_hidden_states", self.audio_tower.config.output_hidden_states)
        frames = self.speech_frames(encoded, input_features_mask)
        if self.config.sound_config is not None:
            frames |= self.encode_sound(input_values, input_values_mask)
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=self.project_audio(**frames).embeds,
            hidden_states=encoded.hidden_states if with_layers else None,
            attentions=encoded.attentions,
        )

    def embed_prompt(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        audio: ProjectorOutput | None = None,
        position_ids=None,
        inputs_embeds=None,
    ) -> dict:
        """
        `input_ids`, `inputs_embeds`, `attention_mask`, `position_ids` and `labels` for the language model. Where the
        projector gives fewer audio tokens than a clip has placeholders, these have fewer positions than what was
        given. With `inputs_embeds` alone, placeholders are where these are the audio token's embedding.
        """
        prompt = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        prompt |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds}
        embedding, audio_token_id = self.get_input_embeddings(), self.config.audio_token_id
        if inputs_embeds is not None and audio is None:
            return prompt
        if input_ids is not None:
            is_audio = input_ids == audio_token_id
        else:
            is_audio = inputs_embeds == embedding(torch.tensor([audio_token_id], device=inputs_embeds.device))
            is_audio = is_audio.all(-1)
        places = 0 if audio is None else int(audio.num_states.sum())
        check_placeholders(is_audio, places, audio_token_id)
        prompt["is_audio"] = is_audio
        if audio is not None and len(audio.embeds) < places:
            prompt = drop_spare_placeholders(prompt, audio.num_states, audio.num_tokens)
        embeds, is_audio = None if audio is None else audio.embeds, prompt.pop("is_audio")
        prompt["inputs_embeds"] = embed_prompt(
            prompt["input_ids"], is_audio, embeds, embedding, prompt["inputs_embeds"]
        )
        return prompt

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> SalmonnModelOutput:
        """The language model's last hidden state over text and audio; arguments as in the class below."""
        audio = self.project_audio(input_features, input_features_mask, input_values, input_values_mask)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        if input_ids is not None or inputs_embeds is not None:
            given = self.embed_prompt(input_ids, audio=audio, **given)
        prompt = {name: given[name] for name in ("inputs_embeds", "attention_mask", "position_ids")}
        prompt = {name: value for name, value in prompt.items() if value is not None}
        outputs = self.language_model.base_model(**prompt, return_dict=True, **kwargs)
        passed_on = {name: getattr(outputs, name) for name in ("last_hidden_state", *PASSED_ON)}
        return SalmonnModelOutput(**passed_on, audio_embeds=None if audio is None else audio.embeds)


class SalmonnForConditionalGeneration(SalmonnModel, SalmonnGenerationMixin):
    """SALMONN with its language-model head: transcribes, captions, answers."""

    def __init__(self, config: SalmonnConfig):
        super().__init__(config)
        # It stands for audio that was given, not made.
        self.generation_config.suppress_tokens = [config.audio_token_id]

    @classmethod
    def from_base_parts(cls, config: SalmonnConfig, **kwargs):
        """A model of `config` with the weights of its `base_parts`, everything else freshly initialised."""
        with torch.device("meta"):
            skeleton = cls(config)
            skeleton.quantize_parts(config.quantized_parts)
        base_kwargs = {name: kwargs[name] for name in BASE_PART_KWARGS if name in kwargs}
        state_dict = base_state_dict(skeleton, **base_kwargs)
        return cls.from_pretrained(None, config=config, state_dict=state_dict, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        audio_frames: torch.Tensor | None = None,
        audio_frames_mask: torch.Tensor | None = None,
        sound_frames: torch.Tensor | None = None,
        sound_frames_mask: torch.Tensor | None = None,
        transcript_ids: torch.LongTensor | None = None,
        transcript_ids_mask: torch.Tensor | None = None,
        transcript_states: torch.Tensor | None = None,
        transcript_states_mask: torch.Tensor | None = None,
        ctc_labels: torch.LongTensor | None = None,
        caption_labels: torch.LongTensor | None = None,
        num_alignment_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SalmonnOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`): text with one `audio_token_id` per audio
                embedding. `None` with `ctc_labels`: the alignment loss alone, the language model is not run.
            input_features (`torch.Tensor` of shape `(clips, mel bins, mel frames)`): the clips of the whole batch in
                the order of their placeholders; a prompt may hold any number of them.
            input_features_mask (`torch.Tensor` of shape `(clips, mel frames)`).
            input_values, input_values_mask (`torch.Tensor` of shape `(clips, samples)`): with a sound encoder.
            attention_mask (`torch.Tensor` of shape `(batch, tokens)`).
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`): by default 0, 1, 2, ... on padding too;
                `generate`, which looks for this argument, leaves padding out. They are of the prompt as it is given;
                where windows are merged, they close up.
            inputs_embeds (`torch.Tensor` of shape `(batch, tokens, hidden size)`): in place of `input_ids`. Audio
                goes where these hold the embedding of the audio token.
            labels (`torch.LongTensor` of shape `(batch, tokens)`): -100 where there is no loss.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(kept,)`): of the last so many positions alone,
                0: of all, in training, too; or of these positions. With `labels`, as in transformers each position's
                logits predict the next label, so that of the last so many positions the first has no loss.
            audio_frames, sound_frames, transcript_ids, transcript_states and their masks: what `encode_audio`
                returned, in place of the features; they need not be encoded again.
            ctc_labels, caption_labels, num_alignment_labels: see `alignment_loss`, which is then given as well.
        """
        frames = {"audio_frames": audio_frames, "audio_frames_mask": audio_frames_mask}
        frames |= {"sound_frames": sound_frames, "sound_frames_mask": sound_frames_mask}
        frames |= {"transcript_ids": transcript_ids, "transcript_ids_mask": transcript_ids_mask}
        frames |= {"transcript_states": transcript_states, "transcript_states_mask": transcript_states_mask}
        frames = {name: value for name, value in frames.items() if value is not None}
        if input_features is not None:
            frames = self.encode_audio(input_features, input_features_mask, input_values, input_values_mask)
        if input_ids is None and inputs_embeds is None and ctc_labels is not None:
            loss = self.alignment_loss(frames, ctc_labels, caption_labels, num_alignment_labels)
            return SalmonnOutput(loss=loss, alignment_loss=loss)

        audio = self.project_audio(**frames)
        alignment_loss = None
        if ctc_labels is not None:
            alignment_loss = self.alignment_loss(frames, ctc_labels, caption_labels, num_alignment_labels, audio)
        if input_ids is not None:
            attention_mask = mask_as_cut(kwargs.get("past_key_values"), attention_mask, input_ids.shape[1])
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        given |= {"labels": labels, "inputs_embeds": inputs_embeds}
        prompt = given
        if input_ids is not None or inputs_embeds is not None:
            prompt = self.embed_prompt(input_ids, audio=audio, **given)
        labels, positions, kwargs_of_loss = prompt["labels"], {}, dict(kwargs)
        if prompt["position_ids"] is not None:
            positions = {"position_ids": prompt["position_ids"]}
        if isinstance(logits_to_keep, int) and logits_to_keep > 0:
            logits_to_keep = min(logits_to_keep, prompt["inputs_embeds"].shape[1])
            labels = labels if labels is None else last_labels(labels, logits_to_keep)
            # By indices, the selected states are one block of memory; of a slice, torch copies the head for each row.
            logits_to_keep = torch.arange(-logits_to_keep, 0, device=prompt["inputs_embeds"].device)
        elif isinstance(logits_to_keep, torch.Tensor) and labels is not None:
            kwargs_of_loss["shift_labels"] = next_labels(labels, logits_to_keep)
        outputs = self.language_model(
            inputs_embeds=prompt["inputs_embeds"],
            attention_mask=prompt["attention_mask"],
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **positions,
            **kwargs,
        )
        if input_ids is not None and prompt["input_ids"] is not input_ids:
            keep_prompt(outputs.past_key_values, input_ids, prompt["input_ids"], prompt["attention_mask"])
        loss, vocab_size = None, self.config.text_config.vocab_size
        if labels is not None:
            loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocab_size, **kwargs_of_loss)
        passed_on = {name: getattr(outputs, name) for name in ("logits", *PASSED_ON)}
        embeds = None if audio is None else audio.embeds
        return SalmonnOutput(loss, **passed_on, audio_embeds=embeds, alignment_loss=alignment_loss)

    def alignment_loss(
        self,
        frames: dict[str, torch.Tensor],
        ctc_labels: torch.LongTensor,
        caption_labels: torch.LongTensor | None = None,
        num_alignment_labels: torch.Tensor | None = None,
        audio: ProjectorOutput | None = None,
    ) -> torch.Tensor:
        r"""
        How well audio lies where its text lies in the language model's embeddings; the language model is not run.

        Args:
            frames (`dict`): what `encode_audio` returned.
            ctc_labels (`torch.LongTensor` of shape `(clips, tokens)`): indices into the CTC head's `token_ids`, -100
                padded; see [`alignment_loss.ctc_loss`].
            caption_labels (`torch.LongTensor` of shape `(clips, tokens)`, *optional*): token ids of the captions of
                clips without a transcript, in any order, -100 padded; see [`alignment_loss.caption_loss`].
            num_alignment_labels (`torch.Tensor`, *optional*): how many of both there are in all batches of an
                optimizer step, as `num_items_in_batch` is for `labels`.
            audio ([`ProjectorOutput`], *optional*): of the same frames, where there is one already.

        Returns:
            Scalar, nats per label.
        """
        projector, embedding = self.projector, self.get_input_embeddings()
        states, num_states = projector.window_states(**frames) if audio is None else (audio.states, audio.num_states)
        loss = projector.ctc_loss(states, num_states, ctc_labels, embedding)
        if caption_labels is not None:
            sounds = (frames.get("sound_frames"), frames.get("sound_frames_mask"))
            embeds, _ = projector.embed(states, num_states, embedding, *sounds)
            loss = loss + projector.caption_loss(embeds, num_states, caption_labels, embedding)
        if num_alignment_labels is None:
            given = [labels for labels in (ctc_labels, caption_labels) if labels is not None]
            num_alignment_labels = sum((labels != -100).sum() for labels in given).clamp(min=1)
        return loss / num_alignment_labels


def last_labels(labels: torch.LongTensor, count: int) -> torch.LongTensor:
    """
    The labels of the last `count` positions.

    Raises:
        ValueError: if others have a loss, which then has no logits.
    """
    if (labels[:, 1 : labels.shape[1] - count + 1] != -100).any():
        raise ValueError(f"logits_to_keep={count} leaves out positions that have labels; keep one more than these.")
    return labels[:, -count:]


def next_labels(labels: torch.LongTensor, positions: torch.LongTensor) -> torch.LongTensor:
    """
    The label behind each of the `positions`, which their logits predict; -100 behind the last.

    Raises:
        ValueError: if others have a loss, which then has no logits.
    """
    behind = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    positions = (positions.nonzero()[:, 0] if positions.dtype == torch.bool else positions).to(labels.device)
    if (behind.index_fill(1, positions % labels.shape[1], -100) != -100).any():
        raise ValueError("logits_to_keep leaves out positions that have labels; keep those before them, too.")
    return behind[:, positions].contiguous()


SalmonnForConditionalGeneration.register_for_auto_class("AutoModel")
# Here and not in the package's __init__, so that the code in a checkpoint knows its parts, too.
for part in (BeatsModel, WindowQFormerProjector, WhisperProjector, WhisperDecoderProjector):
    AutoModel.register(part.config_class, part, exist_ok=True)

__all__ = ["SalmonnForConditionalGeneration", "SalmonnModel", "SalmonnPreTrainedModel"]
