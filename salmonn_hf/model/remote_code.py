"""The code of a checkpoint: what a process without the package loads it with (`trust_remote_code=True`)."""

import shutil
from pathlib import Path

# Named here so that transformers, which copies what relative imports reach, brings them along with the model.
from .feature_extraction_beats import BeatsFeatureExtractor as BeatsFeatureExtractor
from .pipeline_salmonn import SalmonnAutomaticSpeechRecognitionPipeline as SalmonnAutomaticSpeechRecognitionPipeline


def save_code(directory: str | Path):
    """Copy the modules of this folder into a checkpoint."""
    for module in Path(__file__).parent.glob("*.py"):
        if module.name != "__init__.py":
            shutil.copy(module, directory)
