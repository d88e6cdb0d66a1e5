"""SALMONN-lite for transformers: importing this package registers its classes with the Auto classes and pipelines."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
)

from .audio import AudioError, load_audio
from .configuration_salmonn import SalmonnConfig
from .feature_extraction_salmonn import SalmonnFeatureExtractor
from .modeling_salmonn import SalmonnForConditionalGeneration, SalmonnModel
from .pipeline_salmonn import register_pipeline
from .processing_salmonn import SalmonnProcessor

__version__ = "0.1.0"

AutoConfig.register("salmonn", SalmonnConfig)
# The generative model, which is also a SalmonnModel: what AutoModel gives can transcribe.
AutoModel.register(SalmonnConfig, SalmonnForConditionalGeneration)
AutoModelForSpeechSeq2Seq.register(SalmonnConfig, SalmonnForConditionalGeneration)
AutoModelForMultimodalLM.register(SalmonnConfig, SalmonnForConditionalGeneration)
AutoFeatureExtractor.register(SalmonnConfig, SalmonnFeatureExtractor)
AutoProcessor.register(SalmonnConfig, SalmonnProcessor)
register_pipeline()

__all__ = [
    "AudioError",
    "SalmonnConfig",
    "SalmonnFeatureExtractor",
    "SalmonnForConditionalGeneration",
    "SalmonnModel",
    "SalmonnProcessor",
    "load_audio",
]
