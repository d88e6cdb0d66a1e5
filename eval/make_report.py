"""
Turn the results of evaluations into a Markdown page and a self-contained HTML page with plots and audio players.

    python eval/make_report.py runs/eval/nano runs/eval/whisper runs/eval/captions --output runs/report

Each directory is the `--output` of a finished `run_asr.py`, `run_aac.py`, `run_qa.py` or `run_efficiency.py`.
"""

import argparse
from pathlib import Path

from salmonn_hf.evaluation.report import write_report
from salmonn_hf.terminal import command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="directories of results")
    parser.add_argument("--output", type=Path, required=True, help="directory for report.md, report.html and plots")
    arguments = parser.parse_args()
    write_report(arguments.results, arguments.output)
    print(f"{arguments.output / 'report.md'}\n{arguments.output / 'report.html'}")


if __name__ == "__main__":
    main()
