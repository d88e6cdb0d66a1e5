"""transformers' tests of a model on BEATs alone."""

import unittest

from transformers_tests.test_modeling_common import ModelTesterMixin

from salmonn_hf import BeatsConfig, BeatsForAudioClassification, BeatsModel

from .model_testers import BeatsModelTester, ConfigTester


class BeatsModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (BeatsModel, BeatsForAudioClassification)
    test_resize_embeddings = False  # it has no tokens
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = BeatsModelTester()
        self.config_tester = ConfigTester(self, config_class=BeatsConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()
