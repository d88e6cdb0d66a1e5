"""
lmms-eval, with SALMONN among its models. The arguments are lmms-eval's own:

    python eval/leaderboard/run_lmms_eval.py --model salmonn --model_args pretrained=DIR,transcribe=True \
        --tasks librispeech --batch_size 16
    accelerate launch --num_processes 4 eval/leaderboard/run_lmms_eval.py --model salmonn ...

Needs `pip install lmms-eval`. What the model takes: `lmms_eval_model.py`; how a data set of one's own becomes a task:
`docs/leaderboards.md`.
"""

from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest

if __name__ == "__main__":
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("salmonn", simple_class_path="lmms_eval_model.Salmonn"))
    main()
