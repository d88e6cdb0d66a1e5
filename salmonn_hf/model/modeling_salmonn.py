"""SALMONN: audio → encoders → window Q-Former → projection → language model → text.

Architecture: Tang et al., "SALMONN: Towards Generic Hearing Abilities for Large Language Models", ICLR 2024
(https://arxiv.org/abs/2310.13289), figure 1 and section 3.1. This file reads in the order in which data flows.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Blip2QFormerModel, GenerationConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_beats import BeatsConfig
from .configuration_salmonn import SalmonnConfig
from .ctc_compression import leave_out, merge_wordless
from .ctc_head import SalmonnCTCHead, caption_loss, ctc_loss, token_directions
from .generation_salmonn import SalmonnGenerationMixin
from .lora import LORA_FIELDS, adapted_parts, add_lora, merge_lora
from .modeling_beats import BeatsModel
from .quantized_layers import quantize_parts
from .remote_code import save_code
from .sound_summary import SalmonnSoundSummary
from .speech_decoder import SalmonnSpeechDecoder, SalmonnSpeechTokenHead
from .windows import frame_mlp, num_windows


@dataclass
class SalmonnOutput(ModelOutput):
    r"""
    loss (`torch.Tensor`, *optional*): next-token loss, plus the weighted CTC loss where `ctc_labels` are given.
    logits (`torch.Tensor` of shape `(batch, kept positions, vocabulary)`).
    ctc_loss (`torch.Tensor`, *optional*): the unweighted CTC loss, nats per target token.
    last_hidden_state, past_key_values, hidden_states, attentions: the language model's.
    audio_embeds (`torch.Tensor` of shape `(audio tokens of the batch, hidden size)`): what `connect_audio` gives.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    audio_embeds: torch.Tensor | None = None
    ctc_loss: torch.Tensor | None = None


class SalmonnWhisperEncoder(WhisperEncoder):
    """Whisper's encoder over a clip's own length: transformers' version takes 30 s exactly and no mask."""

    main_input_name = "input_features"

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_features: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> BaseModelOutput:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(batch, mel bins, mel frames)`), at most 3000 frames.
            attention_mask (`torch.Tensor` of shape `(batch, mel frames)`): 1 on a clip's own frames.

        Returns:
            `last_hidden_state` of shape `(batch, ceil(mel frames / 2), d_model)`.
        """
        # The convolutions look one frame ahead: padding is zeroed before each, as if the clip ended there.
        mel_mask = attention_mask[:, None].to(input_features.dtype)
        hidden_states = nn.functional.gelu(self.conv1(input_features * mel_mask)) * mel_mask
        hidden_states = nn.functional.gelu(self.conv2(hidden_states)).transpose(1, 2)
        hidden_states = hidden_states + self.embed_positions.weight[: hidden_states.shape[1]]

        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask[:, ::2]
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


class SalmonnWindowQFormer(nn.Module):
    """
    Window-level Q-Former (SALMONN, section 3.1): each window of encoder frames is summarised by a few learned queries,
    and each query's output is projected to one embedding of the language model.
    """

    def __init__(self, config: SalmonnConfig):
        super().__init__()
        self.window_frames = config.window_frames
        self.window_stride = config.window_stride
        self.keep_tail = not config.pad_to_30_seconds
        width, hidden_size = config.qformer_config.encoder_hidden_size, config.qformer_config.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, config.queries_per_window, hidden_size))
        if config.window_position_embeddings:
            self.window_positions = nn.Parameter(torch.zeros(config.window_frames, width))
        else:
            self.window_positions = None
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.proj = nn.Linear(hidden_size, config.text_config.hidden_size)
        if config.frame_mlp_size:
            # Of a window's own frames, those before the next window's start, each query has its equal share.
            share = config.window_stride // config.queries_per_window
            self.frame_mlp = frame_mlp(config, share, config.text_config.hidden_size)
        else:
            self.frame_mlp = None
        self.proj_norm = nn.LayerNorm(config.text_config.hidden_size) if config.projector_norm else nn.Identity()

    def num_windows(self, num_frames: torch.Tensor) -> torch.Tensor:
        """Windows of each clip, see [`windows.num_windows`]; with `pad_to_30_seconds` the whole ones alone."""
        return num_windows(num_frames, self.window_frames, self.window_stride, self.keep_tail)

    def forward(self, frames: torch.Tensor, frame_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            frames (`torch.Tensor` of shape `(clips, frames, width)`).
            frame_mask (`torch.BoolTensor` of shape `(clips, frames)`).

        Returns:
            `audio_embeds` of shape `(audio tokens of all clips, language model's hidden size)`, in order, without
            padding, and the number of audio tokens of each clip, of shape `(clips,)`.
        """
        windows_of_clips = self.num_windows(frame_mask.sum(-1))
        length = (int(windows_of_clips.max()) - 1) * self.window_stride + self.window_frames
        frames = nn.functional.pad(frames, (0, 0, 0, length - frames.shape[1]))
        frame_mask = nn.functional.pad(frame_mask, (0, length - frame_mask.shape[1]))

        windows = frames.unfold(1, self.window_frames, self.window_stride).transpose(2, 3)
        window_mask = frame_mask.unfold(1, self.window_frames, self.window_stride)
        own = torch.arange(windows.shape[1], device=frames.device) < windows_of_clips[:, None]
        windows, window_mask = windows[own], window_mask[own]  # the windows of all clips in a row, padding left out

        positions = 0 if self.window_positions is None else self.window_positions.to(windows.dtype)
        queries = self.qformer(
            query_embeds=self.query_tokens.expand(len(windows), -1, -1),
            encoder_hidden_states=windows + positions,
            encoder_attention_mask=window_mask,
        ).last_hidden_state
        audio_embeds = self.proj(queries)
        if self.frame_mlp is not None:
            own_frames = (windows * window_mask[..., None])[:, : self.window_stride].to(audio_embeds.dtype)
            audio_embeds = audio_embeds + self.frame_mlp(own_frames.reshape(*audio_embeds.shape[:2], -1))
        audio_embeds = self.proj_norm(audio_embeds).flatten(0, 1)
        return audio_embeds, windows_of_clips * self.query_tokens.shape[1]


class SalmonnPreTrainedModel(PreTrainedModel):
    config: SalmonnConfig
    config_class = SalmonnConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Loading an adapter checkpoint must not ask for what its base parts bring, nor a saved one for derived buffers.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SalmonnWindowQFormer):
            nn.init.normal_(module.query_tokens, std=0.02)
            if module.window_positions is not None:
                nn.init.normal_(module.window_positions)  # as strong as the frames that they are added to
        elif isinstance(module, SalmonnCTCHead):
            nn.init.normal_(module.blank)
            nn.init.constant_(module.log_scale, 3.0)  # cosines times e³ = 20
        elif isinstance(module, SalmonnSpeechDecoder):
            module.reset_parameters()
        elif isinstance(module, SalmonnSpeechTokenHead):
            nn.init.zeros_(module.log_scale)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`. A checkpoint whose config names `base_parts` holds only what was trained;
        the frozen parts are then found by [`resolve_base_part`] and put together with it.

        Raises:
            OSError: if the checkpoint or one of its base parts cannot be had, or a file was cut off; the message says
                what was tried, or which tensors are not whole.
            ValueError: if the files lack tensors, naming them.
        """
        hub_kwargs = {k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only") if k in kwargs}
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        if not isinstance(config, SalmonnConfig):
            config = SalmonnConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        from .checkpoint import adapter_state_dict, base_state_dict, check_loaded, check_weight_files

        check_weight_files(pretrained_model_name_or_path)
        if not config.base_parts:
            with_report = kwargs.pop("output_loading_info", False)
            model, report = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
            )
            check_loaded(pretrained_model_name_or_path, report)
            return (model, report) if with_report else model

        state_dict = base_state_dict(config) | adapter_state_dict(pretrained_model_name_or_path, config, **hub_kwargs)
        for used in hub_kwargs:
            kwargs.pop(used)
        model = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        if model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        return model

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        """As `PreTrainedModel.save_pretrained`, but a model with `config.base_parts` leaves those frozen parts out."""
        from .checkpoint import without_base_parts

        state_dict = self.state_dict() if state_dict is None else state_dict
        super().save_pretrained(
            save_directory, *args, state_dict=without_base_parts(state_dict, self.config), **kwargs
        )
        if kwargs.get("is_main_process", True):
            save_code(save_directory)


class SalmonnModel(SalmonnPreTrainedModel):
    """Encoders, window Q-Former and language model, up to its last hidden state."""

    def __init__(self, config: SalmonnConfig):
        super().__init__(config)
        self.audio_tower = SalmonnWhisperEncoder._from_config(config.audio_config)
        self.audio_norm = nn.LayerNorm(config.audio_config.d_model)
        if config.sound_config is not None:
            self.sound_tower = AutoModel.from_config(config.sound_config)
        if config.sound_summary_size:
            self.sound_summary = SalmonnSoundSummary(config)
        elif config.sound_width:
            self.sound_norm = nn.LayerNorm(config.sound_width)
        if config.speech_decoder_layers:
            self.connector = SalmonnSpeechDecoder(config)
            self.speech_tokens = nn.Embedding(config.audio_config.vocab_size, config.audio_config.d_model)
            self.ctc_head = SalmonnSpeechTokenHead(config)
        else:
            self.connector = SalmonnWindowQFormer(config)
            self.ctc_head = SalmonnCTCHead(config) if config.ctc_vocab_size else None
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if config.quantization is not None:
            quantize_parts(self, config.quantization)
        for part in adapted_parts(config):
            self.add_lora(getattr(config, LORA_FIELDS[part]), part)
        self.post_init()

    def add_lora(self, lora: dict, part: str = "language_model"):
        """Put a LoRA adapter (`peft.LoraConfig` arguments) into a part, this or the "audio_tower", in place."""
        add_lora(self, lora, part)

    def add_sound_summary(self, sound_layers: list[int], size: int, kinds: int):
        """Let a model whose speech decoder hears words alone hear sounds as well, see [`SalmonnSoundSummary`]."""
        self.config.sound_layers = sound_layers
        self.config.sound_summary_size, self.config.sound_kinds = size, kinds
        self.config.check_sound_layers()
        self.sound_summary = SalmonnSoundSummary(self.config)

    def merge_lora(self):
        """
        Fold the LoRA adapters into the weights of their parts and drop them: the model is then a full one.

        Raises:
            ValueError: if such a part is quantised.
        """
        merge_lora(self)
        self.config.base_parts = None
        return self

    @torch.no_grad()
    def match_projection_to_embeddings(self):
        """Start the projection at the mean and spread of the token embeddings, so that audio enters at their scale."""
        embedding = self.get_input_embeddings().weight.float()
        self.connector.proj_norm.bias.copy_(embedding.mean(0))
        self.connector.proj_norm.weight.fill_(embedding.std(0).mean())

    def train(self, mode: bool = True):
        """As `nn.Module.train`, but an encoder without a trainable weight stays in evaluation mode."""
        super().train(mode)
        for tower in ("audio_tower", "sound_tower"):
            if hasattr(self, tower) and not any(p.requires_grad for p in getattr(self, tower).parameters()):
                getattr(self, tower).eval()
        return self

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def encode_audio(self, input_features, input_features_mask, input_values=None, input_values_mask=None):
        r"""
        The frozen half of the model. What it returns can be kept, and given to `forward` in place of its inputs.

        Args:
            input_features (`torch.Tensor` of shape `(clips, mel bins, mel frames)`).
            input_features_mask (`torch.Tensor` of shape `(clips, mel frames)`).
            input_values, input_values_mask (`torch.Tensor` of shape `(clips, samples)`): for the sound encoder.

        Returns:
            `dict`: `audio_frames` `(clips, frames, d_model)` at 50 Hz and `audio_frames_mask` `(clips, frames)`, bool;
            with a sound encoder or `config.sound_layers` also `sound_frames` and `sound_frames_mask`.
        """
        encoded = self.encode_speech(input_features, input_features_mask)
        if self.config.sound_config is not None:
            encoded |= self.encode_sound(input_values, input_values_mask)
        return encoded

    def encode_speech(self, input_features, input_features_mask):
        layers = self.config.sound_layers
        encoded = self.audio_tower(
            input_features.to(self.audio_tower.dtype),
            attention_mask=input_features_mask,
            output_hidden_states=layers is not None,
        )
        mask = input_features_mask[:, ::2].bool()
        frames = {"audio_frames": encoded.last_hidden_state, "audio_frames_mask": mask}
        if layers is not None:
            sound_frames = torch.stack([encoded.hidden_states[layer] for layer in layers]).mean(0)
            frames |= {"sound_frames": sound_frames, "sound_frames_mask": mask}
        return frames

    def encode_sound(self, input_values, input_values_mask):
        if self.config.sound_config.model_type != "beats":  # which makes its spectrogram in float32
            input_values = input_values.to(self.sound_tower.dtype)
        sound_frames = self.sound_tower(input_values, attention_mask=input_values_mask).last_hidden_state
        lengths = self.sound_tower._get_feat_extract_output_lengths(input_values_mask.sum(-1))
        positions = torch.arange(sound_frames.shape[1], device=sound_frames.device)
        return {"sound_frames": sound_frames, "sound_frames_mask": positions < lengths[:, None]}

    def connect_audio(self, audio_frames, audio_frames_mask, sound_frames=None, sound_frames_mask=None):
        """Encoder frames (see `encode_audio`) to audio embeddings, and their number per clip."""
        frames = self.audio_norm(audio_frames)
        if self.config.speech_decoder_layers:
            states, num_tokens = self.connector(frames, audio_frames_mask, audio_frames)
            if sound_frames is not None:
                embedding = self.get_input_embeddings()
                summary = self.sound_summary(sound_frames, sound_frames_mask, num_tokens, embedding)
                states = torch.cat([states, summary.to(states.dtype)], dim=-1)
            return states, num_tokens
        if sound_frames is not None:
            # The shorter stream is zero-padded, after its LayerNorm, to the length of the longer. Where a clip costs
            # what it lasts, that is the speech encoder's: pad also cuts where `missing` is negative.
            sound_frames = self.sound_norm(sound_frames) * sound_frames_mask[..., None]
            missing = frames.shape[1] - sound_frames.shape[1]
            if self.config.pad_to_30_seconds and missing < 0:
                frames = nn.functional.pad(frames, (0, 0, 0, -missing))
                audio_frames_mask = nn.functional.pad(audio_frames_mask, (0, -missing), value=True)
                missing = 0
            frames = torch.cat([frames, nn.functional.pad(sound_frames, (0, 0, 0, missing))], dim=-1)
        return self.connector(frames, audio_frames_mask)

    def ctc_embedding(self) -> nn.Module:
        """The token embeddings that the CTC head scores audio embeddings against."""
        return self.speech_tokens if self.config.speech_decoder_layers else self.get_input_embeddings()

    def embed_audio(self, audio_embeds: torch.Tensor, num_tokens: torch.LongTensor):
        """
        What `connect_audio` gives, in the language model's space (behind a Q-Former it is there already), and which of
        the audio tokens it reads, see `merge_wordless`: of shapes `(audio tokens, hidden size)`, `(audio tokens,)`.
        """
        if not self.config.speech_decoder_layers:
            return audio_embeds, torch.ones_like(audio_embeds[:, 0], dtype=torch.bool)
        embeds, wordless = self.ctc_head.embed(audio_embeds, self.speech_tokens, self.get_input_embeddings())
        return merge_wordless(embeds, wordless, num_tokens, self.config.merged_windows)

    def get_audio_features(self, input_features, input_features_mask, input_values=None, input_values_mask=None):
        r"""
        Audio to embeddings in the language model's space.

        Returns:
            `pooler_output`: `(audio tokens, hidden size)`, the clips in a row without padding, those alone that the
            language model reads; `last_hidden_state`: the speech encoder's frames.
        """
        encoded = self.encode_audio(input_features, input_features_mask, input_values, input_values_mask)
        embeds, kept = self.embed_audio(*self.connect_audio(**encoded))
        return BaseModelOutputWithPooling(last_hidden_state=encoded["audio_frames"], pooler_output=embeds[kept])

    def caption_loss(self, audio_embeds, num_tokens, caption_labels):
        """See [`caption_loss`]: of the mean of a clip's audio embeddings."""
        named = (caption_labels != -100).any(-1)
        clips = self.embed_audio(audio_embeds, num_tokens)[0].split(num_tokens.tolist())
        center, _ = token_directions(self.get_input_embeddings())
        clips = torch.stack([clips[clip].float().mean(0) for clip in named.nonzero()[:, 0]]) - center
        return caption_loss(clips, caption_labels[named], self.get_input_embeddings())

    def merge_audio(self, input_ids: torch.LongTensor, audio_embeds: torch.Tensor | None) -> torch.Tensor:
        r"""
        Token embeddings with the audio embeddings, in the language model's space, in the places of `audio_token_id`.

        Raises:
            ValueError: if there are not as many placeholders as audio embeddings.
        """
        embedding = self.get_input_embeddings()
        inputs_embeds = embedding(input_ids)
        is_audio = input_ids == self.config.audio_token_id
        num_embeds = 0 if audio_embeds is None else len(audio_embeds)
        if is_audio.sum() != num_embeds:
            raise ValueError(
                f"input_ids hold {int(is_audio.sum())} audio placeholders (token {self.config.audio_token_id}), but "
                f"the clips give {num_embeds} audio embeddings. Make the prompt with SalmonnProcessor, whose window "
                "settings must be those of the model, and pass its input_features along."
            )
        if audio_embeds is None:
            return inputs_embeds
        # Gemma scales embeddings by √hidden where it looks them up; audio must come in at the same scale.
        audio_embeds = audio_embeds * getattr(embedding, "embed_scale", 1.0)
        return inputs_embeds.masked_scatter(is_audio[..., None], audio_embeds.to(inputs_embeds.dtype))

    def embed_prompt(self, input_ids, attention_mask=None, labels=None, audio_embeds=None, num_tokens=None) -> dict:
        """
        `input_ids`, `inputs_embeds`, `attention_mask` and `labels` for the language model, of fewer positions where
        windows are merged; `audio_embeds` and `num_tokens` are what `connect_audio` gives.
        """
        kept = None
        if audio_embeds is not None:
            audio_embeds, kept = self.embed_audio(audio_embeds, num_tokens)
        prompt = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        prompt["inputs_embeds"] = self.merge_audio(input_ids, audio_embeds)
        if kept is None or self.config.merged_windows == 1:
            return prompt
        return leave_out(prompt, input_ids == self.config.audio_token_id, kept)

    def hear(self, input_features, input_features_mask, input_values, input_values_mask, **frames) -> dict:
        """`audio_embeds` and `num_tokens` of clips that are given as features or as frames; neither without clips."""
        if input_features is not None:
            frames = self.encode_audio(input_features, input_features_mask, input_values, input_values_mask)
        if frames.get("audio_frames") is None:
            return {}
        return dict(zip(("audio_embeds", "num_tokens"), self.connect_audio(**frames), strict=True))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> SalmonnOutput:
        """The language model's last hidden state over text and audio; arguments as in the class below."""
        heard = self.hear(input_features, input_features_mask, input_values, input_values_mask)
        if input_ids is not None and inputs_embeds is None:
            prompt = self.embed_prompt(input_ids, attention_mask, **heard)
            inputs_embeds, attention_mask = prompt["inputs_embeds"], prompt["attention_mask"]
        outputs = self.language_model.base_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        return SalmonnOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            audio_embeds=heard.get("audio_embeds"),
        )


class SalmonnForConditionalGeneration(SalmonnModel, SalmonnGenerationMixin):
    """SALMONN with its language-model head: transcribes, captions, answers."""

    def __init__(self, config: SalmonnConfig):
        super().__init__(config)
        # It stands for audio that was given, not made.
        self.generation_config.suppress_tokens = [config.audio_token_id]

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

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
        ctc_labels: torch.LongTensor | None = None,
        caption_labels: torch.LongTensor | None = None,
        num_ctc_labels: torch.Tensor | None = None,
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
                `generate`, which looks for this argument, leaves padding out.
            labels (`torch.LongTensor` of shape `(batch, tokens)`): -100 where there is no loss.
            audio_frames, audio_frames_mask, sound_frames, sound_frames_mask: what `encode_audio` returned, in place of
                the features; they need not be encoded again.
            ctc_labels (`torch.LongTensor` of shape `(clips, tokens)`): indices into `ctc_head.token_ids`, -100 padded.
            caption_labels (`torch.LongTensor` of shape `(clips, tokens)`, *optional*, beside `ctc_labels`): the tokens
                of what a clip without a transcript is called, in any order, -100 padded; see `caption_loss`.
            num_ctc_labels (`torch.Tensor`, *optional*): how many of both there are in all batches of an optimizer
                step, as `num_items_in_batch` is for `labels`.
        """
        heard = self.hear(
            input_features,
            input_features_mask,
            input_values,
            input_values_mask,
            audio_frames=audio_frames,
            audio_frames_mask=audio_frames_mask,
            sound_frames=sound_frames,
            sound_frames_mask=sound_frames_mask,
        )
        audio_embeds, num_tokens = heard.get("audio_embeds"), heard.get("num_tokens")

        aligned = None
        if ctc_labels is not None:
            clips = nn.utils.rnn.pad_sequence(audio_embeds.split(num_tokens.tolist()))
            if self.config.speech_decoder_layers and self.training:
                classes, ctc_labels = self.ctc_head.training_classes(ctc_labels)
                log_probs = self.ctc_head(clips, self.ctc_embedding(), classes)
            else:
                log_probs = self.ctc_head(clips, self.ctc_embedding())
            aligned = ctc_loss(log_probs, num_tokens, ctc_labels)
            if caption_labels is not None:
                aligned = aligned + self.caption_loss(audio_embeds, num_tokens, caption_labels)
            own = sum((labels != -100).sum() for labels in (ctc_labels, caption_labels) if labels is not None)
            aligned = aligned / (own.clamp(min=1) if num_ctc_labels is None else num_ctc_labels)
            if input_ids is None and inputs_embeds is None:
                return SalmonnOutput(loss=aligned, ctc_loss=aligned, audio_embeds=audio_embeds)

        if input_ids is not None and inputs_embeds is None:
            prompt = self.embed_prompt(input_ids, attention_mask, labels, **heard)
            inputs_embeds, attention_mask, labels = (prompt[n] for n in ("inputs_embeds", "attention_mask", "labels"))
        if labels is not None and self.training:
            # Answers stand at the end of left-padded rows: no logits for the positions before the first of them.
            first = int((labels != -100).any(0).int().argmax())
            logits_to_keep = min(labels.shape[1] - first + 1, labels.shape[1])
            labels = labels[:, -logits_to_keep:]
        if isinstance(logits_to_keep, int) and logits_to_keep > 0:
            # By indices, the kept states are one block of memory; of a slice, torch copies the LM head for each row.
            logits_to_keep = torch.arange(-logits_to_keep, 0, device=inputs_embeds.device)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **kwargs
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=outputs.logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            if aligned is not None:
                # Over accumulated batches the next-token loss is a share of their common mean; so must this one be.
                items = kwargs.get("num_items_in_batch")
                is_share = items is None or num_ctc_labels is not None
                share = 1.0 if is_share else (labels[:, 1:] != -100).sum() / items
                loss = loss + self.config.ctc_loss_weight * share * aligned
        return SalmonnOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            audio_embeds=audio_embeds,
            ctc_loss=aligned,
        )


SalmonnForConditionalGeneration.register_for_auto_class("AutoModel")
AutoModel.register(BeatsConfig, BeatsModel, exist_ok=True)

__all__ = ["SalmonnForConditionalGeneration", "SalmonnModel", "SalmonnPreTrainedModel"]
