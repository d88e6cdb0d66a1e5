"""
Clips per second of stage 1 on this machine: as the reference systems train, without and with the feature cache.

    python training/benchmarks/measure_throughput.py training/recipes/nano/stage1.yaml --clips 96

The reference way is the same script with other settings: every clip as 30 s and 88 audio tokens, encoders in float32,
clips of any length in a batch, no cache. All runs train once on the first clips of the recipe's first training
file, and only the training itself is timed. Nothing else should run on the machine.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from salmonn_hf.terminal import command

SALMONNS = {"pad_to_30_seconds": True, "window_position_embeddings": True, "output_norm": True}
REFERENCE = {"encoder_dtype": "float32", "train_sampling_strategy": "random", "feature_cache": ""}
REFERENCE["projector_config"] = {"model_type": "salmonn_window_qformer", **SALMONNS}
UNTIMED = (
    "max_steps num_train_epochs save_steps eval_steps eval_file joined_clips masked_frames speeds speed_files "
    "speed_factors time_masks frequency_masks "
    "audio_lora_r"  # behind which no features can be cached
).split()


@dataclass
class MeasureArguments:
    clips: int = HfArg(default=96, help="Clips that each run trains on.")
    batch: int = HfArg(default=16, help="Clips of a step.")
    bf16: bool | None = HfArg(default=None, help="False where the processor lacks bfloat16; default: the recipe's.")


def clips_per_second(recipe: dict, work: Path) -> float:
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output_dir": tempfile.mkdtemp(dir=work)}))
    script = Path(__file__).resolve().parents[1] / "run_stage1.py"
    result = subprocess.run([sys.executable, script, path], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return float(re.search(r"'train_samples_per_second': '?([\d.]+)", result.stdout)[1])


@command
def main():
    parser = HfArgumentParser(MeasureArguments, description=__doc__.split("\n")[1])
    parser.add_argument("recipe", help="Of stage 1.")
    arguments, given = parser.parse_args_into_dataclasses()
    recipe = yaml.safe_load(Path(given.recipe).read_text())
    recipe = {key: value for key, value in recipe.items() if key not in UNTIMED}
    recipe |= {"per_device_train_batch_size": arguments.batch, "max_steps": -(-arguments.clips // arguments.batch)}
    recipe |= {"save_strategy": "no", "eval_strategy": "no"}
    recipe |= {} if arguments.bf16 is None else {"bf16": arguments.bf16}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        clips = pq.read_table(recipe["train_files"][0]).slice(0, arguments.clips)
        pq.write_table(clips, work / "clips.parquet")
        recipe["train_files"] = [str(work / "clips.parquet")]
        cache = {"feature_cache": str(work / "cache")}
        reference = clips_per_second(recipe | REFERENCE, work)
        without = clips_per_second(recipe | {"feature_cache": ""}, work)
        clips_per_second(recipe | cache, work)  # fills it, with the same clips in the same order
        cached = clips_per_second(recipe | cache, work)
    print(f"reference way        {reference:8.2f} clips/s")
    print(f"without the cache    {without:8.2f} clips/s  {without / reference:5.1f} times")
    print(f"with the cache       {cached:8.2f} clips/s  {cached / reference:5.1f} times")


if __name__ == "__main__":
    main()
