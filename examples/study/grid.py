"""The runs of the study: which methods, settings, learning rates and seeds. No training here: see study.py."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from ebft_utils.config.modes import StridedConfig, StructuredConfig, load_config
from ebft_utils.config.settings import UserError

RESULTS = HERE / "results"
LENGTHS = (8, 16, 32, 64)  # tokens of a rollout, in CFM by length
SEEDS = (0, 1, 2)
# A held-out document does not count when a larger share of its 16-token windows stands in training documents too:
# templates, as in encodings/
MOST_COPIED = 0.5
KINDS = {"lora": [], "full": ["lora=null"]}
METHODS = {
    "sft": ["ebft.rl_coef=0", "ebft.ce_coef=1"],
    "ebft_0": ["ebft.ce_coef=0"],
    "ebft_0.03": ["ebft.ce_coef=0.03"],
    "ebft_0.1": ["ebft.ce_coef=0.1"],
}
RATES = {
    "lora": {
        "sft": (1e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        "ebft_0": (1e-4, 5e-4, 2e-3, 4e-3),
        "ebft_0.1": (1e-4, 5e-4, 2e-3, 4e-3),
    },
    "full": {"sft": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), "ebft_0": (3e-6, 2e-5, 1e-4), "ebft_0.1": (3e-6, 2e-5, 1e-4, 3e-4)},
}
# as RATES, in structured mode, and of strided_larger.yaml
STRUCTURED = {"lora": {method: (1e-4, 5e-4, 2e-3) for method in ("sft", "ebft_0", "ebft_0.1")}}
LARGER = {"lora": {"sft": (1e-3, 2e-3, 4e-3), "ebft_0": (2e-4, 5e-4, 2e-3), "ebft_0.1": (5e-4, 2e-3)}}
# method -> whose sweep gives its learning rate
SWEPT = {"sft": "sft", "ebft_0": "ebft_0", "ebft_0.03": "ebft_0.1", "ebft_0.1": "ebft_0.1"}
ABLATIONS = {
    "whitening_sample": ["ebft.whitening=sample"],
    "whitening_none": ["ebft.whitening=none"],
    "embed_completion_mean": ["ebft.embed_method=completion_mean"],
    "embed_concat": ["ebft.embed_method=concat"],
    "diversity_0": ["ebft.diversity_coef=0"],
    "diversity_0.5": ["ebft.diversity_coef=0.5"],
    "naive_baseline": ["ebft.diversity_coef=0.6666667"],  # the plain leave-one-out mean, exactly: see test_study.py
    "samples_2": ["ebft.n_samples_per_prompt=2"],
    "samples_8": ["ebft.n_samples_per_prompt=8", "train.per_device_batch_size=2"],
    "temperature_1": ["ebft.temperature=1.0"],
}
ONE_DOCUMENT = ("train.batch_size=1", "train.per_device_batch_size=1")


@dataclass(frozen=True)
class Run:
    """One result: its name is that of its file. measure: what is measured after training (measure.MEASURES).

    on_the_way: what is measured every so many steps, too; None: nothing.
    """

    name: str
    base: str
    overrides: tuple[str, ...]
    measure: str
    on_the_way: tuple[str, int] | None = None

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def unfinished(self) -> Path:
        """Where a run that takes long keeps what it needs to go on."""
        return ROOT / "runs" / "study-unfinished" / f"{self.name}.pt"

    def config(self, *overrides: str) -> StridedConfig | StructuredConfig:
        """Of its base file and these overrides."""
        return load_config(str(HERE / self.base), overrides, config_class(self.base))


def config_class(base: str) -> type[StridedConfig | StructuredConfig]:
    """Of the script that a base file is for."""
    return StructuredConfig if base == "structured.yaml" else StridedConfig


def sweep(base: str = "strided.yaml", prefix: str = "", kinds=RATES, steps: int = 6) -> list[Run]:
    """Each method at several learning rates, one seed, a shorter run."""
    runs = []
    for kind, methods in kinds.items():
        for method, rates in methods.items():
            for rate in rates:
                overrides = (*KINDS[kind], *METHODS[method], f"train.learning_rate={rate}")
                overrides += (f"train.max_steps={steps}", "train.seed=100")
                runs.append(Run(f"{prefix}sweep-{kind}-{method}-{rate:g}", base, overrides, "validation"))
    return runs


def chosen_rate(kind: str, method: str, prefix: str = "", kinds=RATES) -> float:
    """The learning rate with the best value of what the method is trained for."""
    reached = {}
    for rate in kinds[kind][SWEPT[method]]:
        file = RESULTS / f"{prefix}sweep-{kind}-{SWEPT[method]}-{rate:g}.json"
        if not file.is_file():
            raise UserError(f"{file.name} is missing in {RESULTS}: run the part {prefix.replace('-', '_')}sweep first")
        reached[rate] = trained_for(json.loads(file.read_text()))
    return max(reached, key=reached.get)


def trained_for(done: dict) -> float:
    """What a method is trained for, as a result reached it: the more the better.

    That is rl_coef * reward / tokens of a rollout - ce_coef * cross-entropy, on the validation documents that count.
    """
    config = load_config(str(HERE / done["base"]), done["overrides"], config_class(done["base"]))
    ebft = config.ebft
    length = ebft.max_completion_length if config.mode == "structured" else ebft.generate_max_len
    reward, cross_entropy = (mean_of_fresh(done["measured"], name) for name in ("mean_reward", "cross_entropy"))
    return ebft.rl_coef * reward / length - ebft.ce_coef * cross_entropy


def fresh(measured: dict[str, list], metric: str) -> tuple[list[float], list[float]]:
    """Totals and weights of the documents that are not mostly made of what stands in training documents too."""
    totals, weights = measured[metric]
    shares = measured["copied_share"][0] if "copied_share" in measured else []
    if len(shares) != len(totals):  # HumanEval; documents of which the copies were left out before
        return totals, weights
    kept = [number for number, share in enumerate(shares) if share <= MOST_COPIED]
    return [totals[number] for number in kept], [weights[number] for number in kept]


def mean_of_fresh(measured: dict[str, list], metric: str) -> float:
    """Over those documents."""
    totals, weights = fresh(measured, metric)
    return sum(totals) / sum(weights)


def main_runs() -> list[Run]:
    """The comparison: methods x (LoRA, full) x seeds, and the base model."""
    runs = [Run("lora-base", "strided.yaml", (), "everything")]
    runs += [Run("full-base", "strided.yaml", ("lora=null",), "everything")]  # it rounds differently
    for seed in SEEDS:
        for kind in KINDS:
            measure = "everything" if kind == "lora" else "without_lengths"
            for method, settings in METHODS.items():
                rate = chosen_rate(kind, method)
                overrides = (*KINDS[kind], *settings, f"train.learning_rate={rate}", f"train.seed={seed}")
                runs.append(Run(f"main-{kind}-{method}-seed{seed}", "strided.yaml", overrides, measure))
    return runs


def compute_runs() -> list[Run]:
    """SFT for as long as EBFT takes: about eight times the documents."""
    runs, rate = [], chosen_rate("lora", "sft")
    for seed in SEEDS:
        overrides = (*METHODS["sft"], f"train.learning_rate={rate}", "train.max_steps=64", f"train.seed={seed}")
        runs.append(Run(f"compute-lora-sft-seed{seed}", "strided.yaml", overrides, "everything"))
    return runs


def ablation_runs() -> list[Run]:
    """One setting changed in EBFT without cross-entropy, LoRA; the rival of a default with all seeds.

    All are measured with the settings of strided.yaml.
    """
    runs, rate = [], chosen_rate("lora", "ebft_0")
    for name, settings in ABLATIONS.items():
        for seed in SEEDS if name == "whitening_sample" else SEEDS[:1]:
            overrides = (*METHODS["ebft_0"], f"train.learning_rate={rate}", f"train.seed={seed}", *settings)
            runs.append(Run(f"ablation-{name}-seed{seed}", "strided.yaml", overrides, "held_out"))
    return runs


def pass_at_k_runs() -> list[Run]:
    """HumanEval's pass@1 and pass@10: only with --execute, because it runs what the models write."""
    runs = [Run("pass_at_k-base", "strided.yaml", (), "pass_at_k")]
    for method, settings in METHODS.items():
        overrides = (*settings, f"train.learning_rate={chosen_rate('lora', method)}", "train.seed=0")
        runs.append(Run(f"pass_at_k-lora-{method}-seed0", "strided.yaml", overrides, "pass_at_k"))
    return runs


def gradient_runs() -> list[Run]:
    """How noisy the gradient is at the base model, document by document: no training."""
    variants = {"sft": METHODS["sft"], "ebft_0": METHODS["ebft_0"]}
    variants |= {name: [*METHODS["ebft_0"], *settings] for name, settings in ABLATIONS.items()}
    runs = []
    for name, settings in variants.items():
        runs.append(Run(f"gradient-{name}", "strided.yaml", (*settings, *ONE_DOCUMENT), "gradients"))
    for name in ("embed_completion_mean", "ebft_0"):
        overrides = (*variants[name], *ONE_DOCUMENT)
        runs.append(Run(f"gradient-{name}-192", "strided.yaml", overrides, "more_gradients"))
    return runs


def lora_runs(base: str, prefix: str, kinds: dict, measure: str) -> list[Run]:
    """A comparison with LoRA alone: the methods of kinds x seeds, and the base model."""
    runs = [Run(f"{prefix}base", base, (), measure)]
    for seed in SEEDS:
        for method in kinds["lora"]:
            rate = chosen_rate("lora", method, prefix, kinds)
            overrides = (*METHODS[method], f"train.learning_rate={rate}", f"train.seed={seed}")
            runs.append(Run(f"{prefix}lora-{method}-seed{seed}", base, overrides, measure))
    return runs


def structured_sweep() -> list[Run]:
    """The learning rates of structured mode."""
    return sweep("structured.yaml", "structured-", STRUCTURED, steps=6)


def structured_runs() -> list[Run]:
    """The comparison in structured mode."""
    return lora_runs("structured.yaml", "structured-", STRUCTURED, "held_out")


def larger_sweep() -> list[Run]:
    """The learning rates of the larger runs."""
    return sweep("strided_larger.yaml", "larger-", LARGER, steps=6)


def larger_runs() -> list[Run]:
    """The comparison with features whose gradient can be seen in fewer groups.

    Features are means over a rollout; twice the groups a step, four times the documents.
    """
    return lora_runs("strided_larger.yaml", "larger-", LARGER, "everything")


PARTS = {
    "sweep": sweep,
    "main": main_runs,
    "gradients": gradient_runs,
    "ablations": ablation_runs,
    "structured_sweep": structured_sweep,
    "structured": structured_runs,
    "compute": compute_runs,
    "larger_sweep": larger_sweep,
    "larger": larger_runs,
    "pass_at_k": pass_at_k_runs,
}
