"""SALMONN-lite for transformers: importing this package registers its classes with the Auto classes and pipelines."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

from .base_parts import find_copy
from .model.audio import AudioError, load_audio
from .model.base_part_resolver import register_copies
from .model.configuration_beats import BeatsConfig
from .model.configuration_salmonn import SalmonnConfig
from .model.feature_extraction_beats import BeatsFeatureExtractor
from .model.feature_extraction_salmonn import SalmonnFeatureExtractor
from .model.modeling_beats import BeatsForAudioClassification, BeatsModel
from .model.modeling_salmonn import SalmonnForConditionalGeneration, SalmonnModel
from .model.pipeline_salmonn import register_pipeline
from .model.processing_salmonn import SalmonnProcessor
from .model.quantizer_salmonn import SalmonnQuantizationConfig

__version__ = "0.2.0"

AutoConfig.register("salmonn", SalmonnConfig)
# The generative model, which is also a SalmonnModel: what AutoModel gives can transcribe.
AutoModel.register(SalmonnConfig, SalmonnForConditionalGeneration)
AutoModelForSpeechSeq2Seq.register(SalmonnConfig, SalmonnForConditionalGeneration)
AutoModelForMultimodalLM.register(SalmonnConfig, SalmonnForConditionalGeneration)
AutoFeatureExtractor.register(SalmonnConfig, SalmonnFeatureExtractor)
AutoProcessor.register(SalmonnConfig, SalmonnProcessor)
AutoConfig.register("beats", BeatsConfig)
AutoModel.register(BeatsConfig, BeatsModel)
AutoModelForAudioClassification.register(BeatsConfig, BeatsForAudioClassification)
AutoFeatureExtractor.register(BeatsConfig, BeatsFeatureExtractor)
# The pipeline looks here, and not among what is registered, to tell whether it supports a model.
MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES["beats"] = "BeatsForAudioClassification"
register_pipeline()
register_copies(find_copy)

__all__ = [
    "AudioError",
    "BeatsConfig",
    "BeatsFeatureExtractor",
    "BeatsForAudioClassification",
    "BeatsModel",
    "SalmonnConfig",
    "SalmonnFeatureExtractor",
    "SalmonnForConditionalGeneration",
    "SalmonnModel",
    "SalmonnProcessor",
    "SalmonnQuantizationConfig",
    "load_audio",
]
