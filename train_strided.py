"""Strided energy-based fine-tuning (EBFT; Jelassi et al. 2026, arXiv 2603.12248) on raw text, or on answers to prompts.

    python train_strided.py --cfg examples/raw_text.yaml
    accelerate launch -q --config_file accelerate_configs/fsdp2.yaml train_strided.py --cfg examples/llama3b.yaml

One training step, for each document (`train_step` below reads like this list):
    1. Every `stride` tokens of what is learnt there is an anchor. At each anchor the policy writes n short rollouts,
       all anchors at once.                                                      decoding.generate_rollouts
    2. A frozen copy of the model turns each rollout, and the ground truth at the same place, into features.
                                                                                  features.strided_features
    3. A rollout's reward is its features' cosine with the truth's, minus its similarity to its siblings (eq 7-9).
                                                                                  rewards.feature_matching_rewards
    4. Its advantage is the reward minus the leave-one-out baseline (eq 94).
                                                                                  rewards.FeatureRewards.baseline
    5. loss = rl_coef * policy gradient + ce_coef * cross-entropy. The log-probs come from one packed forward
       (strided.strided_logprobs) of the rollouts that the gradient depends on: equal ones once, those without
       advantage not at all (strided.rollouts_to_train).
`ebft.rl_coef=0 ebft.ce_coef=1` leaves out 1-4 and is plain supervised fine-tuning.

What differs from the paper's released code: the n rollouts of all anchors share ONE copy of the document (it copies
the document n times); rollouts are decoded with a KV cache; equal rollouts have equal features; log-probs are those of
the policy that sampled (temperature included); windows that would cross a document's end are no groups. By default
whitening is eq 8 (released code: `ebft.whitening: sample`), each layer of a feature has the same weight (released
code: `ebft.feature_norm: joint`), and the baseline leaves the rollout out of whitening too (paper: `eq94`).
"""

from ebft_utils.config.command import check_command_line
from ebft_utils.config.modes import StridedConfig, parse_command_line

if __name__ == "__main__":
    check_command_line(StridedConfig, __doc__)  # before the imports that take seconds

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ebft_utils import models
from ebft_utils.algorithm.features import FeatureNetwork, strided_features
from ebft_utils.algorithm.losses import cross_entropy_loss, policy_gradient_loss
from ebft_utils.algorithm.rewards import (
    FeatureRewards,
    feature_matching_rewards,
    first_equal_rollout,
    group_normalised,
    share_equal_rollouts,
    unbiased_cfm,
)
from ebft_utils.algorithm.strided import in_parts, number_of_parts, rollouts_to_train, truth_windows
from ebft_utils.data.batches import Batch, make_batch, rollout_uniforms
from ebft_utils.data.rows import Rows, load_rows
from ebft_utils.data.sources import check_sources
from ebft_utils.layouts import choose_layout
from ebft_utils.run import checkpoint, distributed
from ebft_utils.run.export import export_final, merges, model_card
from ebft_utils.run.loop import TrainingLoop, Update, evaluate_only, evaluate_rows, make_optimizer, micro_batches
from ebft_utils.run.memory import out_of_memory_advice
from ebft_utils.run.metrics import (
    MetricLogger,
    MetricSums,
    SampleGroup,
    logged_evaluations,
    start_trackers,
    step_metrics,
)
from ebft_utils.run.preview import preview

SHOWN = {
    "reward": "ebft/mean_reward",
    "cfm": "ebft/cfm_unbiased",
    "ce": "ebft/ce_loss",
    "tok/s": "train/tokens_per_second",
}
EVALUATED = ("cross_entropy", "cfm_loss", "cfm_unbiased", "mean_reward", "reward_best_of_n")


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm


@dataclass
class Groups:
    """The rollouts of a batch and their rewards.

    rollouts (B, A, N, G); features (B, A, N, D); truth_features (B, A, D). B rows, A anchors, N rollouts, G tokens.
    """

    rollouts: Tensor
    features: Tensor
    truth_features: Tensor
    rewards: FeatureRewards


def sample_and_score(
    config: StridedConfig,
    accelerator: Accelerator,
    policy: models.Policy,
    network: FeatureNetwork,
    batch: Batch,
    seed: int,
) -> Groups:
    """Points 1 to 3 of the algorithm: rollouts at every anchor, features of rollouts and truth, rewards.

    policy: unwrapped, without DDP around it.
    """
    ebft, document, segments = config.ebft, batch.document_ids, batch.segment_ids
    num_anchors, samples = batch.anchors.shape[1], ebft.n_samples_per_prompt
    uniforms = rollout_uniforms(seed, batch.keys, num_anchors, samples, ebft.generate_max_len).to(batch.anchors.device)
    num_parts = agreed_parts(config, accelerator, num_anchors, samples * ebft.generate_max_len, batch)
    with distributed.precision(accelerator, policy), ExitStack() as gathered:
        gathered.enter_context(distributed.whole_weights(accelerator, policy))
        parts = in_parts(num_parts, batch.anchors, batch.valid, uniforms)
        written = [
            policy.generate(
                document_ids=document,
                segment_ids=segments,
                anchors=anchors,
                valid=valid,
                temperature=ebft.temperature,
                uniforms=numbers,
            )
            for anchors, valid, numbers in parts
        ]
        if not network.is_policy:
            gathered.close()
        read = [
            strided_features(
                network, document, segments, rollouts, anchors, valid, ebft.embed_method, ebft.feature_norm
            )
            for rollouts, (anchors, valid, _) in zip(written, parts, strict=True)
        ]
    whole = (torch.cat(tensors, dim=1)[:, :num_anchors] for tensors in (written, *zip(*read, strict=True)))
    rollouts, features, truth_features = whole
    features = share_equal_rollouts(features, rollouts)
    rewards = feature_matching_rewards(
        features,
        truth_features,
        whitening=None if ebft.whitening == "none" else ebft.whitening,
        alignment_coef=ebft.alignment_coef,
        diversity_coef=ebft.diversity_coef,
        whiten_tol=ebft.whiten_tol,
        baseline="eq94" if ebft.advantage_estimator in ("eq94", "group_norm") else "leave_out",
    )
    return Groups(rollouts, features, truth_features, rewards)


def advantages_of(config: StridedConfig, rewards: FeatureRewards) -> Tensor:
    """Point 4: how much better each rollout is than its siblings. (B, A, N)."""
    if config.ebft.advantage_estimator == "reinforce":
        return rewards.reward
    advantages = rewards.reward - rewards.baseline
    if config.ebft.advantage_estimator == "group_norm":
        return group_normalised(advantages, rewards.reward)
    return advantages


def document_targets(batch: Batch) -> Tensor:
    """(B, S-1), True where document token s+1 is learnt and token s, which predicts it, is of the same document.

    Tokens of prompts and padding are not learnt.
    """
    return (batch.completion_ids[:, 1:] >= 0) & (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1])


def agreed_parts(
    config: StridedConfig, accelerator: Accelerator, num_slots: int, tokens_per_slot: int, batch: Batch
) -> int:
    """How many forwards a batch takes (ebft.max_packed_tokens): on each process as many as on the one that needs most.

    FSDP2 runs a forward on all processes together.
    """
    limit = config.ebft.max_packed_tokens
    num_parts = number_of_parts(num_slots, tokens_per_slot, batch.document_ids.shape[1], limit)
    if limit is None:
        return num_parts
    return int(accelerator.gather(torch.tensor([num_parts], device=accelerator.device)).max())


def train_step(config: StridedConfig, accelerator: Accelerator, policy, network: FeatureNetwork, batches: list[Batch]):
    """Gradients of one optimizer step, accumulated over its micro-batches.

    Returns metric sums, the loss, and up to four micro-batches with their groups, to show.
    """
    ebft, sums, unwrapped = config.ebft, MetricSums(), accelerator.unwrap_model(policy)
    # counts of the whole global batch, known before the first forward: each loss is sum over tokens / global count
    counts = sum(torch.stack([batch.valid.sum(), document_targets(batch).sum()]) for batch in batches)
    num_anchors, num_targets = accelerator.reduce(counts.to(accelerator.device), reduction="sum").tolist()
    num_rollout_tokens = num_anchors * ebft.n_samples_per_prompt * ebft.generate_max_len
    total_loss, written = torch.zeros((), device=accelerator.device), []
    for index, batch in enumerate(batches):
        batch = batch.to(accelerator.device)
        parts, num_tokens = [(batch.anchors, batch.valid, None, None)], (batch.segment_ids >= 0).sum()
        if ebft.rl_coef > 0:
            groups = sample_and_score(config, accelerator, unwrapped, network, batch, config.train.seed)
            advantages = advantages_of(config, groups.rewards)
            scale = 1.0 if ebft.advantage_estimator == "group_norm" else ebft.alignment_coef + ebft.diversity_coef
            rollouts, anchors, valid, summed = rollouts_to_train(
                groups.rollouts, advantages, batch.anchors, batch.valid, scale
            )
            num_parts = agreed_parts(config, accelerator, anchors.shape[1], ebft.generate_max_len, batch)
            parts = in_parts(num_parts, anchors, valid, rollouts, summed)
            rollout_tokens = batch.valid.sum() * ebft.n_samples_per_prompt * ebft.generate_max_len
            num_tokens = num_tokens + rollout_tokens
            count_groups(sums, batch, groups, advantages, valid.sum())
            written = [*written[-3:], (batch, groups)]
        for number, (anchors, valid, rollouts, summed) in enumerate(parts):
            last = index == len(batches) - 1 and number == len(parts) - 1
            with distributed.gradient_sync(accelerator, policy, last=last):
                rollout_logps, document_logps = policy(
                    document_ids=batch.document_ids,
                    segment_ids=batch.segment_ids,
                    rollouts=rollouts,
                    anchors=anchors,
                    valid=valid,
                    temperature=ebft.temperature,
                    document_grad=ebft.ce_coef > 0 if number == 0 else None,
                )
                loss = torch.zeros((), device=accelerator.device)
                if rollouts is not None:
                    rl_loss = policy_gradient_loss(rollout_logps, summed, valid.unsqueeze(-1), num_rollout_tokens)
                    loss = ebft.rl_coef * rl_loss
                    sums.add_sum("ebft/rl_loss", rl_loss * num_rollout_tokens, rollout_tokens * (number == 0))
                if number == 0:
                    targets = document_targets(batch)
                    loss = loss + ebft.ce_coef * cross_entropy_loss(document_logps, targets, num_targets)
                    sums.add("ebft/ce_loss", -document_logps, targets)
                # DDP and FSDP average gradients over the processes; the sum is wanted
                accelerator.backward(loss * accelerator.num_processes)
            total_loss += loss.detach()
        sums.add_sum("tokens", num_tokens, 1.0)
    return sums, accelerator.reduce(total_loss, reduction="sum").item(), written


def count_groups(sums: MetricSums, batch: Batch, groups: Groups, advantages: Tensor, num_trained: Tensor) -> None:
    """Adds the metrics of a batch's groups. Only valid anchors count. num_trained: rollouts in the training forward."""
    counted = batch.valid.unsqueeze(-1).expand_as(advantages)
    rewards = groups.rewards
    sums.add("ebft/alignment", rewards.alignment, counted)
    sums.add("ebft/diversity", rewards.diversity, counted)
    sums.add("ebft/mean_reward", rewards.reward, counted)
    sums.add("ebft/cfm_loss", rewards.cfm, batch.valid)
    sums.add("ebft/cfm_unbiased", unbiased_cfm(groups.features, groups.truth_features), batch.valid)
    sums.add("advantage", advantages, counted)
    sums.add("advantage_square", advantages.double().square(), counted)
    duplicate = first_equal_rollout(groups.rollouts) != torch.arange(counted.shape[-1], device=counted.device)
    sums.add("ebft/duplicate_rollouts", duplicate.float(), counted)
    sums.add_sum("ebft/tokens_saved", counted.sum() - num_trained, counted.sum())
    sums.add_sum("ebft/valid_anchors", batch.valid.sum(), batch.valid.numel())


@torch.no_grad()
def evaluate(
    config: StridedConfig,
    accelerator: Accelerator,
    policy,
    network: FeatureNetwork,
    rows: Rows,
    pad_token_id: int,
    signals: distributed.StopSignals,
) -> dict[str, Tensor] | None:
    """Held-out cross-entropy, CFM and reward of each document: name -> (2, documents), totals and their weights.

    The same seed gives the same numbers. None: the run was asked to stop meanwhile.
    """
    policy = accelerator.unwrap_model(policy)

    def measure(row_ids: list[int]) -> list[tuple[Tensor, Tensor]]:
        batch = batch_of(config, rows, row_ids, row_ids, pad_token_id).to(accelerator.device)
        groups = sample_and_score(config, accelerator, policy, network, batch, config.eval.seed)
        with distributed.whole_weights(accelerator, policy):  # which FSDP2's own forward would leave behind
            _, logps = policy(
                document_ids=batch.document_ids,
                segment_ids=batch.segment_ids,
                rollouts=None,
                anchors=batch.anchors,
                valid=batch.valid,
                temperature=1.0,
                document_grad=False,
            )
        rewards, cfm_unbiased = groups.rewards, unbiased_cfm(groups.features, groups.truth_features)
        per_group = (rewards.cfm, cfm_unbiased, rewards.reward.mean(-1), rewards.reward.amax(-1))
        return [(-logps, document_targets(batch))] + [(values, batch.valid) for values in per_group]

    policy.eval()
    table = evaluate_rows(config, accelerator, len(rows), EVALUATED, measure, signals)
    policy.train()
    return table


# --------------------------------------------------------------------------------------------------------------------
# Around it


def batch_of(config: StridedConfig, rows, row_ids: list, keys: list[int], pad_token_id: int) -> Batch:
    """The rows as tensors, with their anchors."""
    ebft = config.ebft
    anchors = dict(
        context_length=ebft.context_length,
        min_completion_prefix=ebft.min_completion_prefix,
        stride=ebft.stride,
        num_generated=ebft.generate_max_len,
    )
    return make_batch(rows, row_ids, keys, pad_token_id, **anchors)


def step_batches(config: StridedConfig, accelerator: Accelerator, rows, step: int, pad_token_id: int) -> list[Batch]:
    """This process's micro-batches of an optimizer step (counted from 0)."""
    return micro_batches(config, accelerator, rows, step, partial(batch_of, config, rows, pad_token_id=pad_token_id))


def sample_groups(tokenizer, written: list[tuple[Batch, Groups]], number: int = 8) -> list[SampleGroup]:
    """A few groups as text, evenly over the documents and their valid anchors."""
    places = [(batch, groups, *place) for batch, groups in written for place in batch.valid.nonzero().tolist()]
    found = []
    for batch, groups, row, index in places[:: max(1, len(places) // number)][:number]:
        anchor, length = int(batch.anchors[row, index]), groups.rollouts.shape[-1]
        before = slice(max(0, anchor - 40), anchor)
        # without the end of the document that is packed before this one
        own = batch.segment_ids[row, before] == batch.segment_ids[row, anchor]
        prefix = tokenizer.decode(batch.document_ids[row, before][own])
        truth = tokenizer.decode(truth_windows(batch.document_ids, batch.anchors, length)[row, index])
        texts = [tokenizer.decode(tokens) for tokens in groups.rollouts[row, index].tolist()]
        rewards = groups.rewards.reward[row, index].tolist()
        found.append(SampleGroup(prefix, truth, list(zip(rewards, texts, strict=True))))
    return found


def main(argv: list[str]) -> None:
    """The command."""
    # --- configuration ------------------------------------------------------------------------------------------------
    config, dry_run = parse_command_line(argv, __doc__)
    if config is None:
        return
    accelerator = distributed.prepare_accelerator(config)
    distributed.micro_batches_per_step(config, accelerator)  # or it refuses
    merges(config)  # or it refuses
    if dry_run:
        accelerator.print(preview(config, accelerator))
        return
    torch.manual_seed(config.train.seed)  # the initial adapter; all else is drawn from (seed, step, row)
    with checkpoint.output_folder(config, accelerator) as output_dir, out_of_memory_advice(config, accelerator):
        train_or_evaluate(config, accelerator, output_dir)
    accelerator.end_training()


def train_or_evaluate(config: StridedConfig, accelerator: Accelerator, output_dir: Path) -> None:
    """The whole run, in one fixed order."""
    # --- data, model --------------------------------------------------------------------------------------------------
    saved = checkpoint.find_checkpoint(config, accelerator)
    changed = checkpoint.check_same_run(config, saved) if saved is not None else []
    check_sources(config)
    tokenizer = models.load_tokenizer(config.model)
    load = partial(load_rows, config, tokenizer)
    rows, held_out = distributed.main_process_first(accelerator, load)  # the other processes then read its cache
    causal_lm = models.load_policy(config)
    models.check_vocabulary(tokenizer, causal_lm, config.model.name_or_path)
    layout = choose_layout(config, accelerator, causal_lm)

    # --- optimizer ---------------------------------------------------------------------------------------------------
    policy = models.Policy(causal_lm, layout.name, config.model.compile_decoding)
    policy, optimizer = distributed.prepare_policy(accelerator, policy, make_optimizer(config, policy))
    unwrapped = accelerator.unwrap_model(policy).causal_lm
    network = models.load_feature_network(unwrapped, config, accelerator.device, layout)
    accelerator.print(distributed.describe_run(config, accelerator, policy, network))
    run = checkpoint.RunState(0, checkpoint.launch_of(accelerator), rows.fingerprint(), None, rows.places)
    if saved is not None:
        run = checkpoint.load_checkpoint(saved, policy, optimizer.optimizer)
        accelerator.print("\n  ".join([f"going on from {saved}, step {run.step}", *changed]))
        if not config.eval.only:
            checkpoint.continue_with(config, accelerator, run, rows)
    checkpoint.write_config(config, accelerator, output_dir)

    # --- evaluate only, or train -------------------------------------------------------------------------------------
    with distributed.StopSignals() as signals:

        def evaluation() -> dict[str, Tensor] | None:
            return evaluate(config, accelerator, policy, network, held_out, tokenizer.pad_token_id, signals)

        def take_step(step: int, update: Update):
            batches = step_batches(config, accelerator, rows, step, tokenizer.pad_token_id)
            sums, loss, written = train_step(config, accelerator, policy, network, batches)
            update(loss)
            metrics = step_metrics(accelerator, sums, len(batches))
            return metrics, partial(sample_groups, tokenizer, written) if written else None

        if config.eval.only:
            evaluate_only(config, accelerator, saved, run.step, None if held_out is None else evaluation, signals)
            return
        results = logged_evaluations(output_dir, run.step) if saved is not None else {}
        accelerator.wait_for_everyone()  # all have read it
        first_step = None if saved is None else run.step
        trackers = start_trackers(config, accelerator, output_dir, first_step)
        logger = MetricLogger(output_dir, first_step, trackers) if accelerator.is_main_process else None
        evaluated = None if held_out is None else evaluation
        how = {"take_step": take_step, "evaluate": evaluated, "shown": SHOWN, "rows": rows}
        TrainingLoop(config, accelerator, policy, optimizer, run, results, logger, **how).train(signals)

    # --- the final model ---------------------------------------------------------------------------------------------
    target = export_final(config, accelerator, policy, tokenizer, model_card(config, results, run.step, rows.notes))
    accelerator.print("\n".join([*rows.notes, f"the final model is in {target}"]))


if __name__ == "__main__":
    distributed.run_as_command(main)
