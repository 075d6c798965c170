"""Structured energy-based fine-tuning (EBFT; Jelassi et al. 2026, arXiv 2603.12248): prompts, completions, a server.

    python serve_vllm.py --cfg examples/structured.yaml        # in one terminal (or machine): the rollout server
    python train_structured.py --cfg examples/structured.yaml

One training step (`take_step` and `train_step` below read like this list):
    1. The server writes n completions of each prompt, turn by turn, with the policy's weights.
                                                                                  prompts.converse
    2. A frozen copy of the model turns prompt + completion, and prompt + truth, into features.
                                                                                  features.completion_features
    3. A completion's reward is its features' cosine with the truth's, minus its similarity to its siblings (eq 7-9).
                                                                                  rewards.feature_matching_rewards
    4. Its advantage is the reward minus the leave-one-out baseline (eq 94).
                                                                                  rewards.FeatureRewards.baseline
    5. loss = rl_coef * clipped policy gradient + ce_coef * cross-entropy on the truth, num_iterations times.
                                                                                  losses.clipped_policy_loss
    6. The new weights go to the server, and a probe proves that they arrived.    weight_sync.ServedPolicy
With `ebft.async_prefetch` the server does point 1 for the next batch meanwhile, with weights one update older.

The layout is the strided one with a single anchor, at the prompt's end: prompt + truth and its n completions share ONE
copy of the prompt and one forward. Completions of different lengths are padded on the right. Masks come from lengths,
never from token values, so the end-of-text token counts.

Two distributions meet in a step. The server's (mu) sampled the tokens; its log-probs come with them. The trainer's
before the batch's first update (pi_old) is where the clipped ratio starts. Their quotient, truncated at
`ebft.vllm_importance_cap`, weights each token: it corrects for the server's other kernels and precision, and for older
weights. Without a server (`ebft.use_vllm: false`) both are the policy itself.
"""

from ebft_utils.config.command import check_command_line
from ebft_utils.config.modes import StructuredConfig, parse_command_line

if __name__ == "__main__":
    check_command_line(StructuredConfig, __doc__)  # before the imports that take seconds

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ebft_utils import models
from ebft_utils.algorithm import losses
from ebft_utils.algorithm.features import FeatureNetwork, completion_features
from ebft_utils.algorithm.rewards import (
    FeatureRewards,
    feature_matching_rewards,
    first_equal_rollout,
    group_normalised,
    share_equal_rollouts,
    unbiased_cfm,
)
from ebft_utils.data.prompts import Completion, PromptBatch, conversation_of, feature_spans, make_prompt_batch, padded
from ebft_utils.data.rows import MixedRows, Rows, load_rows
from ebft_utils.data.sources import check_sources
from ebft_utils.data.streams import StreamedRows
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
from ebft_utils.server.client import VLLMServer
from ebft_utils.server.rollouts import Rollouts
from ebft_utils.server.weight_sync import ServedPolicy

SHOWN = {
    "reward": "ebft/mean_reward",
    "cfm": "ebft/cfm_unbiased",
    "ce": "ebft/ce_loss",
    "length": "rollout/length",
    "kl": "vllm/kl",
    "stale": "vllm/staleness",
    "generate s": "time/generate",
    "step s": "time/step",
}
EVALUATED = ("cross_entropy", "cfm_loss", "cfm_unbiased", "mean_reward", "reward_best_of_n")


@dataclass
class Run:
    """What a run consists of. policy: prepared (perhaps inside DDP or FSDP2); served: None without a server."""

    config: StructuredConfig
    accelerator: Accelerator
    policy: torch.nn.Module
    network: FeatureNetwork
    tokenizer: PreTrainedTokenizerBase
    rows: Rows | StreamedRows | MixedRows
    rollouts: Rollouts
    served: ServedPolicy | None


# --------------------------------------------------------------------------------------------------------------------
# The algorithm


@dataclass
class Groups:
    """The completions of a batch and their rewards. B prompts, N completions of each, G tokens (padded), D features.

    tokens (B, N, G); written (B, N, G): the policy wrote the token; counted (B, N, G): it takes part in the policy
    gradient; behaviour_logprobs (B, N, G) of the sampler; truncated (B, N); features (B, N, D); truth_features (B, D).
    """

    tokens: Tensor
    written: Tensor
    counted: Tensor
    behaviour_logprobs: Tensor
    truncated: Tensor
    features: Tensor
    truth_features: Tensor
    rewards: FeatureRewards


def score(run: Run, batch: PromptBatch, completions: list[list[Completion]]) -> Groups:
    """Points 2 and 3 of the algorithm: features of completions and truths, rewards."""
    ebft, device, tokenizer = run.config.ebft, run.accelerator.device, run.tokenizer
    samples, flat = ebft.num_generations, [completion for group in completions for completion in group]

    def grouped(rows: list[list], value) -> Tensor:
        return padded(rows, value, device).unflatten(0, (-1, samples))

    tokens = grouped([completion.tokens for completion in flat], tokenizer.pad_token_id)
    written = grouped([completion.written for completion in flat], False)
    behaviour = grouped([completion.logprobs for completion in flat], 0.0)
    truncated = torch.tensor([[completion.truncated for completion in group] for group in completions], device=device)
    counted = written & ~truncated.unsqueeze(-1) if ebft.mask_truncated else written
    spans, truth_spans = feature_spans(batch, flat, ebft.feature_span, tokenizer)
    whole_truths = [row.prompt + span for row, span in zip(batch.conversations, truth_spans, strict=True)]
    features, truth_features = completion_features(
        run.network,
        padded(whole_truths, tokenizer.pad_token_id, device),
        batch.prompt_lengths,
        torch.tensor([len(span) for span in truth_spans], device=device),
        grouped(spans, tokenizer.pad_token_id),
        torch.tensor([len(span) for span in spans], device=device).view(-1, samples),
        ebft.embed_method,
        ebft.feature_norm,
    )
    features = share_equal_rollouts(features, grouped(spans, -1))
    rewards = feature_matching_rewards(
        features,
        truth_features,
        whitening=None if ebft.whitening == "none" else ebft.whitening,
        alignment_coef=ebft.alignment_coef,
        diversity_coef=ebft.diversity_coef,
        whiten_tol=ebft.whiten_tol,
        baseline="eq94" if ebft.advantage_estimator in ("eq94", "group_norm") else "leave_out",
    )
    return Groups(tokens, written, counted, behaviour, truncated, features, truth_features, rewards)


def advantages_of(config: StructuredConfig, rewards: FeatureRewards) -> Tensor:
    """Point 4: how much better each completion is than its siblings. (B, N)."""
    if config.ebft.advantage_estimator == "reinforce":
        return rewards.reward
    advantages = rewards.reward - rewards.baseline
    if config.ebft.advantage_estimator == "group_norm" and config.ebft.scale_rewards is not False:
        return group_normalised(advantages, rewards.reward)
    return advantages


def take_step(run: Run, step: int, update: Update):
    """A whole step (counted from 0), with its metrics.

    Point 6 is at the beginning of `of_step`: the server gets new weights when it is asked to use them.
    """
    started, synced, written = time.perf_counter(), run.served.seconds if run.served is not None else 0.0, None
    if run.config.ebft.rl_coef > 0:
        written = run.rollouts.of_step(step)
    waited = time.perf_counter() - started
    batches = step_batches(run.config, run.accelerator, run.rows, step, run.tokenizer.pad_token_id)
    sums, groups = train_step(run, batches, None if written is None else written.completions, update)
    metrics = step_metrics(run.accelerator, sums, len(batches))
    if written is not None:
        metrics |= {"time/generate": written.seconds, "time/wait": waited}
        if run.served is not None:
            metrics |= {"vllm/staleness": float(step - written.version), "time/sync": run.served.seconds - synced}
            metrics["vllm/ratio_min"] = -metrics.pop("vllm/ratio_least")
    return metrics, None if groups is None else partial(sample_groups, run.tokenizer, batches, groups)


def train_step(
    run: Run, batches: list[PromptBatch], completions: list[list[list[Completion]]] | None, update: Update
) -> tuple[MetricSums, list[Groups] | None]:
    """Points 2 to 5: the updates made with one batch of completions (None: rl_coef is 0).

    Returns metric sums and each micro-batch's groups (None: rl_coef is 0).
    """
    accelerator, ebft, sums = run.accelerator, run.config.ebft, MetricSums()
    started, groups = time.perf_counter(), [None] * len(batches)
    if completions is not None:
        unwrapped = accelerator.unwrap_model(run.policy)
        with distributed.precision(accelerator, unwrapped), ExitStack() as gathered:
            if run.network.is_policy:
                gathered.enter_context(distributed.whole_weights(accelerator, unwrapped))
            groups = [score(run, batch, group) for batch, group in zip(batches, completions, strict=True)]
    num_tokens, num_completions, num_targets = global_counts(accelerator, batches, groups)
    cap = ebft.vllm_importance_cap if ebft.use_vllm else None
    features_done = time.perf_counter()
    old_logps = [None] * len(batches)
    for iteration in range(ebft.num_iterations):
        last_iteration = iteration == ebft.num_iterations - 1
        total_loss = torch.zeros((), device=accelerator.device)
        for index, (batch, group) in enumerate(zip(batches, groups, strict=True)):
            with distributed.gradient_sync(accelerator, run.policy, last=index == len(batches) - 1):
                tokens = None if group is None else group.tokens
                rollout_logps, document_logps = policy_logprobs(run, batch, tokens, ebft.ce_coef > 0)
                targets = batch.written[:, 1:]
                loss = ebft.ce_coef * losses.cross_entropy_loss(document_logps, targets, num_targets)
                if group is not None:
                    if iteration == 0:
                        old_logps[index] = rollout_logps.detach()
                    advantages = advantages_of(run.config, group.rewards)
                    weights = losses.completion_token_weights(
                        group.counted, ebft.loss_type, num_completions, num_tokens, ebft.max_completion_length
                    ) * losses.importance_weights(old_logps[index], group.behaviour_logprobs, group.counted, cap)
                    rl_loss = losses.clipped_policy_loss(
                        rollout_logps, old_logps[index], advantages, weights, ebft.epsilon
                    )
                    loss = loss + ebft.rl_coef * rl_loss
                    if last_iteration:
                        count_completions(run.config, sums, group, advantages, rollout_logps.detach(), old_logps[index])
                        sums.add_sum("ebft/rl_loss", rl_loss * accelerator.num_processes * len(batches), 1.0)
                # DDP and FSDP average gradients over the processes; the sum is wanted
                accelerator.backward(loss * accelerator.num_processes)
            if last_iteration:
                sums.add("ebft/ce_loss", -document_logps, targets)
                read = (batch.segment_ids >= 0).sum() + (0 if group is None else group.written.sum())
                sums.add_sum("tokens", read, 1.0)
            total_loss += loss.detach()
        update(accelerator.reduce(total_loss, reduction="sum").item())
    sums.add_sum("time/features", torch.tensor(features_done - started, device=accelerator.device), 1.0)
    sums.add_sum("time/train", torch.tensor(time.perf_counter() - features_done, device=accelerator.device), 1.0)
    return sums, groups if completions is not None else None


def global_counts(accelerator: Accelerator, batches: list[PromptBatch], groups: list[Groups | None]) -> list[int]:
    """Of the whole global batch: counted tokens of completions, completions, learnt tokens of the truth.

    They are known before the first forward: each loss is a sum over tokens / a global count. Completions that are left
    out of the policy gradient count too: the others' weight does not depend on them.
    """
    written = [group for group in groups if group is not None]
    totals = [sum(group.counted.sum() for group in written), sum(group.truncated.numel() for group in written)]
    totals.append(sum(batch.written[:, 1:].sum() for batch in batches))
    totals = torch.stack([torch.as_tensor(total, device=accelerator.device) for total in totals])
    return accelerator.reduce(totals, reduction="sum").clamp_min(1).tolist()


def policy_logprobs(
    run: Run, batch: PromptBatch, tokens: Tensor | None, document_grad: bool
) -> tuple[Tensor | None, Tensor]:
    """One packed forward of the prepared policy.

    Returns log-probs of completions (B, N, G), at the sampling temperature, and of prompt + truth (B, S-1), at 1.
    """
    anchors = batch.prompt_lengths.unsqueeze(-1)
    rollout_logps, document_logps = run.policy(
        document_ids=batch.document_ids,
        segment_ids=batch.segment_ids,
        rollouts=None if tokens is None else tokens.unsqueeze(1),
        anchors=anchors,
        valid=torch.ones_like(anchors, dtype=torch.bool),
        temperature=run.config.ebft.temperature,
        document_grad=document_grad,
    )
    return None if rollout_logps is None else rollout_logps.squeeze(1), document_logps


def count_completions(
    config: StructuredConfig, sums: MetricSums, groups: Groups, advantages: Tensor, logps: Tensor, old_logps: Tensor
) -> None:
    """Adds the metrics of a batch's completions.

    logps, old_logps (B, N, G): in the batch's last iteration, and before its first.
    """
    rewards, ebft, every = groups.rewards, config.ebft, torch.ones_like(groups.truncated)
    sums.add("ebft/alignment", rewards.alignment, every)
    sums.add("ebft/diversity", rewards.diversity, every)
    sums.add("ebft/mean_reward", rewards.reward, every)
    sums.add("ebft/cfm_loss", rewards.cfm, every[:, 0])
    sums.add("ebft/cfm_unbiased", unbiased_cfm(groups.features, groups.truth_features), every[:, 0])
    sums.add("advantage", advantages, every)
    sums.add("advantage_square", advantages.double().square(), every)
    first = first_equal_rollout(torch.where(groups.written, groups.tokens, -1))
    sums.add("ebft/duplicate_rollouts", (first != torch.arange(every.shape[1], device=every.device)).float(), every)
    sums.add("rollout/length", groups.written.sum(-1).float(), every)
    sums.add("rollout/truncated", groups.truncated.float(), every)
    sums.add("rollout/entropy", -old_logps, groups.written)
    ratio = torch.where(groups.written, logps - old_logps, 0.0).exp()
    ahead, behind = advantages.unsqueeze(-1) > 0, advantages.unsqueeze(-1) < 0
    clipped = (ahead & (ratio > 1 + ebft.epsilon)) | (behind & (ratio < 1 - ebft.epsilon))
    sums.add("ebft/clipped", clipped.float(), groups.counted)
    if ebft.use_vllm:
        quotient = torch.where(groups.written, old_logps - groups.behaviour_logprobs, 0.0)
        sums.add("vllm/ratio_mean", quotient.exp(), groups.written)
        sums.add_max("vllm/ratio_max", quotient.exp(), groups.written)
        sums.add_max("vllm/ratio_least", -quotient.exp(), groups.written)
        sums.add("vllm/kl", -quotient, groups.written)
        sums.add("vllm/logprob_gap", quotient.abs(), groups.written)
        if ebft.vllm_importance_cap is not None:
            sums.add("vllm/capped", (quotient.exp() > ebft.vllm_importance_cap).float(), groups.counted)


# --------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(run: Run, rows: Rows, step: int, signals: distributed.StopSignals) -> dict[str, Tensor] | None:
    """Held-out cross-entropy, CFM and reward of each row: name -> (2, rows), totals and their weights.

    The same seed gives the same numbers. None: the run was asked to stop meanwhile.
    """
    config, accelerator = run.config, run.accelerator
    run.rollouts.bring_up_to(step)
    policy = accelerator.unwrap_model(run.policy)

    def measure(row_ids: list[int]) -> list[tuple[Tensor, Tensor]]:
        batch = make_prompt_batch(rows, row_ids, row_ids, run.tokenizer.pad_token_id, accelerator.device)
        (completions,) = run.rollouts.write([batch], config.eval.seed).completions
        with distributed.precision(accelerator, policy), distributed.whole_weights(accelerator, policy):
            groups = score(run, batch, completions)
            _, logps = policy_logprobs(run, batch, None, False)
        rewards, cfm_unbiased = groups.rewards, unbiased_cfm(groups.features, groups.truth_features)
        per_row = (rewards.cfm, cfm_unbiased, rewards.reward.mean(-1), rewards.reward.amax(-1))
        every = torch.ones(len(row_ids), 1, dtype=torch.bool, device=accelerator.device)
        return [(-logps, batch.written[:, 1:])] + [(values.unsqueeze(-1), every) for values in per_row]

    policy.eval()
    table = evaluate_rows(config, accelerator, len(rows), EVALUATED, measure, signals)
    policy.train()
    return table


# --------------------------------------------------------------------------------------------------------------------
# Around it


def step_batches(
    config: StructuredConfig, accelerator: Accelerator, rows, step: int, pad_token_id: int
) -> list[PromptBatch]:
    """This process's micro-batches of a step (counted from 0)."""
    make = partial(make_prompt_batch, rows, pad_token_id=pad_token_id, device=accelerator.device)
    return micro_batches(config, accelerator, rows, step, make)


def sample_groups(tokenizer, batches: list[PromptBatch], written: list[Groups], number: int = 8) -> list[SampleGroup]:
    """A few prompts with their completions as text."""
    found = []
    for batch, groups in zip(batches, written, strict=True):
        for row, conversation in enumerate(batch.conversations):
            lengths = [int(own.nonzero().max()) + 1 for own in groups.written[row]]
            tokens = groups.tokens[row].tolist()
            texts = [tokenizer.decode(ids[:length]) for ids, length in zip(tokens, lengths, strict=True)]
            rewards = groups.rewards.reward[row].tolist()
            prefix, truth = tokenizer.decode(conversation.prompt[-200:]), tokenizer.decode(conversation.truth[0])
            found.append(SampleGroup(prefix, truth, list(zip(rewards, texts, strict=True))))
            if len(found) == number:
                return found
    return found


def main(argv: list[str]) -> None:
    """The command."""
    # --- configuration ------------------------------------------------------------------------------------------------
    config, dry_run = parse_command_line(argv, __doc__, StructuredConfig)
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


def train_or_evaluate(config: StructuredConfig, accelerator: Accelerator, output_dir: Path) -> None:
    """The whole run, in one fixed order."""
    # --- data, model --------------------------------------------------------------------------------------------------
    saved = checkpoint.find_checkpoint(config, accelerator)
    changed = checkpoint.check_same_run(config, saved) if saved is not None else []
    check_sources(config)
    tokenizer = models.load_tokenizer(config.model)
    load = partial(load_rows, config, tokenizer, conversation_of)
    rows, held_out = distributed.main_process_first(accelerator, load)  # the other processes then read its cache
    causal_lm = models.load_policy(config)
    models.check_vocabulary(tokenizer, causal_lm, config.model.name_or_path)
    layout = choose_layout(config, accelerator, causal_lm)

    # --- optimizer ---------------------------------------------------------------------------------------------------
    policy = models.Policy(causal_lm, layout.name, config.model.compile_decoding)
    stop_ids = models.stop_token_ids(causal_lm, tokenizer)
    policy, optimizer = distributed.prepare_policy(accelerator, policy, make_optimizer(config, policy))
    unwrapped = accelerator.unwrap_model(policy).causal_lm
    network = models.load_feature_network(unwrapped, config, accelerator.device, layout)
    accelerator.print(distributed.describe_run(config, accelerator, policy, network))
    state = checkpoint.RunState(0, checkpoint.launch_of(accelerator), rows.fingerprint(), None, rows.places)
    if saved is not None:
        state = checkpoint.load_checkpoint(saved, policy, optimizer.optimizer)
        accelerator.print("\n  ".join([f"going on from {saved}, step {state.step}", *changed]))
        if not config.eval.only:
            checkpoint.continue_with(config, accelerator, state, rows)
    checkpoint.write_config(config, accelerator, output_dir)

    # --- the server --------------------------------------------------------------------------------------------------
    def first_row():
        return rows[rows.row_at(state.step * config.train.batch_size)]

    def batches_of(step: int) -> list[PromptBatch]:
        return step_batches(config, accelerator, rows, step, tokenizer.pad_token_id)

    with ExitStack() as stack:
        served = None
        if config.ebft.use_vllm and (config.ebft.rl_coef > 0 or held_out is not None):
            probe = held_out[0] if config.eval.only else distributed.together(accelerator, first_row)
            served = ServedPolicy(config, accelerator, policy, VLLMServer(config), probe.prompt + probe.truth[0])
            stack.callback(served.close)
            accelerator.print(f"rollouts: {served.start(state.step)}")
        num_steps = config.train.total_steps(rows)
        rollouts = Rollouts(config, accelerator, policy, tokenizer, stop_ids, served, batches_of, num_steps)
        stack.callback(rollouts.close)
        signals = stack.enter_context(distributed.StopSignals())
        if served is not None:
            # what was trained is saved, instead of waiting for a server that may not come back
            served.server.gives_up = lambda: signals.received > 0
        run = Run(config, accelerator, policy, network, tokenizer, rows, rollouts, served)

        # --- evaluate only, or train ---------------------------------------------------------------------------------
        evaluation = None if held_out is None else lambda: evaluate(run, held_out, state.step, signals)
        if config.eval.only:
            evaluate_only(config, accelerator, saved, state.step, evaluation, signals)
            return
        results = logged_evaluations(output_dir, state.step) if saved is not None else {}
        accelerator.wait_for_everyone()  # all have read it
        first_step = None if saved is None else state.step
        trackers = start_trackers(config, accelerator, output_dir, first_step)
        logger = MetricLogger(output_dir, first_step, trackers) if accelerator.is_main_process else None
        how = {"take_step": partial(take_step, run), "evaluate": evaluation, "shown": SHOWN, "rows": rows}
        TrainingLoop(config, accelerator, policy, optimizer, state, results, logger, **how).train(signals)

    # --- the final model ---------------------------------------------------------------------------------------------
    target = export_final(config, accelerator, policy, tokenizer, model_card(config, results, state.step, rows.notes))
    accelerator.print("\n".join([*rows.notes, f"the final model is in {target}"]))


if __name__ == "__main__":
    distributed.run_as_command(main)
