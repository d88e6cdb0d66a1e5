"""transformers' tests of a model on SALMONN: with each projector, with LoRA, with BEATs."""

import unittest

from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from salmonn_hf import SalmonnConfig, SalmonnForConditionalGeneration, SalmonnModel
from salmonn_hf.model.lora import encoder_lora

from .model_testers import ConfigTester, SalmonnModelTester, tiny_beats_config


class SalmonnContract(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    all_model_classes = (SalmonnModel, SalmonnForConditionalGeneration)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # the name is older than the model
    additional_model_inputs = ("input_features", "input_features_mask", "input_values", "input_values_mask")
    config_kwargs = {}
    model_tester = None  # an abstract property of the training mixin

    def setUp(self):
        self.model_tester = SalmonnModelTester(**self.config_kwargs)
        self.config_tester = ConfigTester(self, config_class=SalmonnConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()


class SalmonnWindowQFormerTest(SalmonnContract, unittest.TestCase):
    config_kwargs = {"ctc_vocab_size": 7}
    test_all_params_have_gradient = False  # the CTC head has none without `ctc_labels`


class SalmonnWhisperProjectorTest(SalmonnContract, unittest.TestCase):
    config_kwargs = {"num_layers": 1}


class SalmonnLoraTest(SalmonnContract, unittest.TestCase):
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config_kwargs = {
        "lora": {"r": 16, "lora_alpha": 64, "target_modules": linears},
        "audio_lora": encoder_lora(2),
        "text": {"hidden_size": 96, "initializer_range": 0.1},  # a head that can tell tokens apart as it is
    }
    training_overfit_learning_rate = 1e-2


class SalmonnBeatsTest(SalmonnContract, unittest.TestCase):
    # The language model is one with masks for each type of layer.
    config_kwargs = {"sound_config": tiny_beats_config(), "text": {"model_type": "qwen2"}}
