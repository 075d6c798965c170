"""EBFT against supervised fine-tuning on a model that is small enough for a thousand groups of rollouts in each step.

    python examples/study/small/run.py               all that has no result yet, one run after the other
    python examples/study/small/run.py --list        what that would be
    python examples/study/small/run.py --minutes 90  begins no further run after that time
    python examples/study/small/run.py --tables      only the tables of README.md, from results/

In the environment of the study (../README.md, "Run it yourself"), from any folder. The first call makes data, tokenizer
and base model (make.py, base.yaml). A run that was stopped goes on; one that has its file in results/ is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import runs
import study
from ebft_utils.run.distributed import run_as_command
from grid import ROOT
from tables import write_page

FOLDER = ROOT / "runs" / "small"


def make_base() -> None:
    """Data, tokenizer and base model, where they are not there; how the base model learnt goes into results/."""
    if not (FOLDER / "start").is_dir():
        subprocess.run([sys.executable, str(HERE / "make.py")], check=True)
    if not (FOLDER / "base" / "final").is_dir():
        resume = ["train.resume=latest"] if list(FOLDER.glob("base/checkpoint-*")) else []
        subprocess.run([sys.executable, "train_strided.py", "--cfg", str(HERE / "base.yaml"), *resume], check=True)
    file = runs.RESULTS / "base-training.json"
    if not file.is_file():
        entries = [json.loads(line) for line in (FOLDER / "base" / "metrics.jsonl").read_text().splitlines()]
        kept = ("step", "eval/cross_entropy", "eval/cross_entropy_se")
        log = [{name: entry[name] for name in kept} for entry in entries if "eval/cross_entropy" in entry]
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"name": file.stem, "log": log}) + "\n")


def next_run() -> runs.Run | None:
    """The first one without a result."""
    return next((run for run in runs.every_run() if not study.is_done(run)), None)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    arguments, started = parser.parse_args(argv), time.monotonic()
    os.chdir(ROOT)
    if arguments.list:
        for run in runs.every_run():
            if not study.is_done(run):
                print(f"{run.name}: {' '.join(run.overrides)}")
        return
    if not arguments.tables:
        make_base()
        while (run := next_run()) is not None and time.monotonic() - started < 60 * arguments.minutes:
            study.run_one(run)
            write_page(plot=False)
    write_page()


if __name__ == "__main__":
    run_as_command(main)
