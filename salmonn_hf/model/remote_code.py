"""The code that travels in a checkpoint, for processes without the package (`trust_remote_code=True`): this folder."""

import shutil
from pathlib import Path


def save_code(directory: str | Path):
    """Copy the modules of this folder into a checkpoint."""
    # A process without the package gets the modules that transformers finds from the model's on, by lines that begin
    # with `from .`, also within functions. No others name these three, but a model that is loaded so and saved again
    # must have them beside it too.
    from .feature_extraction_beats import BeatsFeatureExtractor  # noqa: F401
    from .feature_extraction_salmonn import SalmonnFeatureExtractor  # noqa: F401
    from .pipeline_salmonn import SalmonnAutomaticSpeechRecognitionPipeline  # noqa: F401

    for module in Path(__file__).parent.glob("*.py"):
        if module.name != "__init__.py":
            shutil.copyfile(module, Path(directory) / module.name)
