"""transformers' tests of a feature extractor on SALMONN's and on BEATs'."""

import random
import unittest

import numpy as np
from transformers_tests.test_sequence_feature_extraction_common import SequenceFeatureExtractionTestMixin

from salmonn_hf import BeatsFeatureExtractor, SalmonnFeatureExtractor


class FeatureExtractionTester:
    """Sequences of growing length, as the feature extractor's own `pad` takes them."""

    batch_size = 7
    min_seq_length = 400
    max_seq_length = 2000
    seq_length_diff = (max_seq_length - min_seq_length) // (batch_size - 1)

    def __init__(self, feature_size, **settings):
        self.feature_size = feature_size
        self.settings = settings

    def prepare_feat_extract_dict(self):
        return {"feature_size": self.feature_size, "padding_value": 0.0, "sampling_rate": 16_000} | self.settings

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        longest = [self.max_seq_length] * self.batch_size
        lengths = range(self.min_seq_length, self.max_seq_length, self.seq_length_diff)
        values = random.Random(0)
        row = (lambda: [values.random() for _ in range(self.feature_size)]) if self.feature_size > 1 else values.random
        clips = [[row() for _ in range(length)] for length in (longest if equal_length else lengths)]
        return [np.asarray(clip) for clip in clips] if numpify else clips


class SalmonnFeatureExtractionTest(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = SalmonnFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = FeatureExtractionTester(feature_size=10, tail_seconds=0.1)


class BeatsFeatureExtractionTest(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = BeatsFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = FeatureExtractionTester(feature_size=1)
