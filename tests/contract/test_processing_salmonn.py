"""transformers' tests of a processor on SALMONN's."""

import unittest

from conftest import tiny_tokenizer
from transformers_tests.test_processing_common import ProcessorTesterMixin

from salmonn_hf import SalmonnFeatureExtractor, SalmonnProcessor


class SalmonnProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = SalmonnProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()

    @classmethod
    def _setup_feature_extractor(cls):
        return SalmonnFeatureExtractor()
