"""Average checkpoints that one recipe made from the same start: one model, as fast as each, with fewer errors.

accelerate launch training/run_stage2.py training/recipes/nano/stage2.yaml --output_dir runs/a
accelerate launch training/run_stage2.py training/recipes/nano/stage2.yaml --output_dir runs/b --data_seed 11
python training/average.py runs/a runs/b --output_dir runs/mean

`data_seed` changes the order and the augmentation of the clips, and leaves LoRA's first weights as they are.
"""

import argparse

from salmonn_hf import SalmonnProcessor
from salmonn_hf.terminal import command
from salmonn_hf.training.averaging import average_checkpoints


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="two or more, directories or hub names")
    parser.add_argument("--output_dir", required=True, help="directory for the mean")
    args = parser.parse_args()
    average_checkpoints(args.checkpoints).save_pretrained(args.output_dir)
    SalmonnProcessor.from_pretrained(args.checkpoints[0]).save_pretrained(args.output_dir)
    print(f"written: {args.output_dir}")


if __name__ == "__main__":
    main()
