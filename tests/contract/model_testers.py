"""Tiny models and inputs, in the form in which transformers' tests ask for them."""

import copy

import torch
from conftest import tiny_config, tiny_text_config
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import floats_tensor, global_rng, ids_tensor

from salmonn_hf import BeatsConfig, SalmonnForConditionalGeneration

MEL_FRAMES = 64  # 32 encoder frames
SAMPLES = 10_240  # as long: 0.64 s


def tiny_beats_config(**kwargs):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "embed_dim": 8,
        "num_mel_bins": 128,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "layerdrop": 0.0,
    }
    return BeatsConfig(**sizes | kwargs)


class SalmonnModelTester:
    """Rows of a padding token, text and one clip each, all of one length."""

    causal_lm_class = SalmonnForConditionalGeneration
    is_training = True
    batch_size = 7  # as many rows as a test makes of fewer, without clips for the new ones
    seq_length = 24
    audio_token_id = 0  # not among the tokens of the training test, nor among those that the test of resizing removes
    pad_token_id = 2

    def __init__(self, **config_kwargs):
        global_rng.seed(1)  # with which no text without a clip has the audio token
        self.config_kwargs = config_kwargs
        config = self.get_config()
        self.text_config, self.audio_config = config.text_config, config.audio_config
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads
        self.vocab_size = config.text_config.vocab_size

    def get_config(self):
        kwargs = copy.deepcopy(self.config_kwargs)
        text_config = tiny_text_config(max_position_embeddings=64, **kwargs.pop("text", {}))
        return tiny_config(text_config=text_config, audio_token_id=self.audio_token_id, **kwargs)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        projector = config.projector_config
        audio_tokens = MEL_FRAMES // 2 // projector.window_frames * projector.queries_per_window
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 30) + 30
        input_ids[:, 0] = self.pad_token_id
        input_ids[:, 2 : 2 + audio_tokens] = self.audio_token_id
        attention_mask = torch.ones_like(input_ids)
        attention_mask[:, 0] = 0
        mask = torch.ones(self.batch_size, MEL_FRAMES, dtype=torch.long)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "input_features": floats_tensor([self.batch_size, config.audio_config.num_mel_bins, MEL_FRAMES]),
            "input_features_mask": mask,
        }
        if config.sound_config is not None:
            inputs["input_values"] = floats_tensor([self.batch_size, SAMPLES], scale=0.1)
            inputs["input_values_mask"] = torch.ones(self.batch_size, SAMPLES, dtype=torch.long)
        return config, inputs


class BeatsModelTester:
    is_training = True
    batch_size = 3
    hidden_size = 16
    num_hidden_layers = 2
    num_attention_heads = 2
    seq_length = 24  # 8 patches for each 160 ms

    def __init__(self, **config_kwargs):
        self.config_kwargs = config_kwargs

    def get_config(self):
        return tiny_beats_config(**self.config_kwargs)

    def prepare_config_and_inputs_for_common(self):
        inputs = {"input_values": floats_tensor([self.batch_size, SAMPLES], scale=0.1)}
        inputs["attention_mask"] = torch.ones(self.batch_size, SAMPLES, dtype=torch.long)
        return self.get_config(), inputs


__all__ = ["BeatsModelTester", "ConfigTester", "SalmonnModelTester", "tiny_beats_config"]
