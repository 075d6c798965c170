"""Structured energy-based fine-tuning (EBFT; Jelassi et al. 2026, arXiv 2603.12248) on prompt + completion data, with rollouts from a vLLM server.

    python serve_vllm.py --cfg examples/structured.yaml              # one terminal (or machine): the rollout server
    accelerate launch --config_file accelerate_configs/cpu.yaml train_structured.py --cfg examples/structured.yaml     # another one: the trainer

One training step (`train_step` below reads like this list):
    1. the server writes n completions of each prompt, turn by turn, with the policy's weights              prompts.converse
    2. a frozen copy of the model turns prompt + completion, and prompt + truth, into features               features.completion_features
    3. a completion's reward: its features' cosine with the truth's, minus its similarity to its siblings (eq 7-9)     rewards.feature_matching_rewards
    4. advantage: reward minus the corrected leave-one-out baseline (eq 94)                                  rewards.rloo_advantages
    5. loss: rl_coef * clipped policy gradient + ce_coef * cross-entropy on the truth, num_iterations times  losses.clipped_policy_loss
    6. the new weights go to the server, and a probe proves that they are there                              weight_sync.ServedPolicy
With `ebft.async_prefetch` the server does point 1 for the next batch during points 2 to 5, with weights one update older.

The layout is the strided one with a single anchor, at the prompt's end: prompt + truth and its n completions share ONE copy of the prompt and one
forward. Completions of different lengths are padded on the right; masks come from lengths, never from token values, so the end-of-text token counts.

Two distributions meet in a step. The server's (mu) sampled the tokens: its log-probs come with them. The trainer's before the batch's first update
(pi_old) is where the clipped ratio starts. Their quotient, truncated at `ebft.vllm_importance_cap`, weights each token: it corrects for the server's
other kernels and precision, and for older weights. Without a server (`ebft.use_vllm: false`) both are the policy itself.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ebft_utils.algorithm.features import FeatureNetwork, completion_features
from ebft_utils.algorithm.losses import (
    clipped_policy_loss,
    completion_token_weights,
    cross_entropy_loss,
    importance_weights,
)
from ebft_utils.algorithm.rewards import (
    FeatureRewards,
    feature_matching_rewards,
    first_equal_rollout,
    group_norm_advantages,
    rloo_advantages,
    share_equal_rollouts,
    unbiased_cfm,
)
from ebft_utils.config.modes import StructuredConfig, parse_command_line
from ebft_utils.data.prompts import (
    Completion,
    PromptBatch,
    conversation_of,
    make_prompt_batch,
    padded,
    thinking_opened,
    without_thinking,
)
from ebft_utils.data.rows import MixedRows, Rows, StreamedRows, load_rows, rows_of_step
from ebft_utils.models import (
    StridedPolicy,
    check_vocabulary,
    load_feature_network,
    load_policy,
    load_tokenizer,
    model_card,
    set_attention,
    stop_token_ids,
)
from ebft_utils.run.checkpoint import (
    RunState,
    check_same_run,
    continue_with,
    export_final,
    find_checkpoint,
    launch_of,
    load_checkpoint,
    output_folder,
)
from ebft_utils.run.distributed import (
    StopSignals,
    describe_run,
    gradient_sync,
    main_process_first,
    micro_batches_per_step,
    precision,
    prepare_accelerator,
    prepare_policy,
    run_as_command,
    together,
    whole_weights,
)
from ebft_utils.run.loop import TrainingLoop, Update, evaluate_only
from ebft_utils.run.memory import out_of_memory_advice
from ebft_utils.run.metrics import MetricLogger, MetricSums, logged_evaluations, rollout_table, step_metrics
from ebft_utils.run.preview import preview
from ebft_utils.server.client import VLLMServer
from ebft_utils.server.rollouts import Rollouts
from ebft_utils.server.weight_sync import ServedPolicy

SHOWN = {
    "reward": "ebft/mean_reward",
    "cfm": "ebft/cfm_loss",
    "ce": "ebft/ce_loss",
    "length": "rollout/length",
    "kl": "vllm/kl",
    "stale": "vllm/staleness",
    "generate s": "time/generate",
    "step s": "time/step",
}
EVALUATED = ("cross_entropy", "cfm_loss", "cfm_unbiased", "reward_pass@1", "reward_best_of_n")


@dataclass
class Run:
    """What a run consists of, for the functions below. policy: prepared; served: the policy as the server has it, None without a server."""

    config: StructuredConfig
    accelerator: Accelerator
    policy: torch.nn.Module
    network: FeatureNetwork
    tokenizer: PreTrainedTokenizerBase
    rows: Rows | StreamedRows | MixedRows
    rollouts: Rollouts
    served: ServedPolicy | None


# ---------------------------------------------------------------------------------------------------------------------------------------
# The algorithm


@dataclass
class Groups:
    """The completions of a batch and what they are worth.

    tokens (B, N, G), padded; written (B, N, G): the policy wrote the token; counted (B, N, G): it takes part in the policy gradient;
    behaviour_logprobs (B, N, G) of the sampler; truncated (B, N); features (B, N, D); truth_features (B, D).
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
    ebft, device = run.config.ebft, run.accelerator.device
    samples, flat = ebft.num_generations, [completion for group in completions for completion in group]
    tokens = padded([completion.tokens for completion in flat], run.tokenizer.pad_token_id, device)
    written = padded([completion.written for completion in flat], False, device)
    behaviour = padded([completion.logprobs for completion in flat], 0.0, device)
    truncated = torch.tensor([completion.truncated for completion in flat], device=device)
    counted = written & ~truncated.unsqueeze(-1) if ebft.mask_truncated else written
    prompts = [conversation.prompt for conversation in batch.conversations]
    truths = [conversation.truth for conversation in batch.conversations]
    spans, truth_spans = [completion.tokens for completion in flat], [truth for truth, _ in truths]
    if ebft.feature_span == "answer":
        opened = [thinking_opened(prompt, run.tokenizer) for prompt in prompts]
        spans = [
            without_thinking(completion.tokens, completion.written, opened[index // samples], run.tokenizer)
            for index, completion in enumerate(flat)
        ]
        truth_spans = [without_thinking(*truth, opened[row], run.tokenizer) for row, truth in enumerate(truths)]
    lengths = torch.tensor([len(span) for span in spans], device=device)
    features, truth_features = completion_features(
        run.network,
        padded(
            [prompt + span for prompt, span in zip(prompts, truth_spans, strict=True)],
            run.tokenizer.pad_token_id,
            device,
        ),
        batch.prompt_lengths,
        torch.tensor([len(span) for span in truth_spans], device=device),
        padded(spans, run.tokenizer.pad_token_id, device).unflatten(0, (-1, samples)),
        lengths.view(-1, samples),
        ebft.embed_method,
    )
    features = share_equal_rollouts(features, padded(spans, -1, device).unflatten(0, (-1, samples)))
    rewards = feature_matching_rewards(
        features,
        truth_features,
        whitening=ebft.whitening if ebft.use_whitening else None,
        alignment_coef=ebft.alignment_coef,
        diversity_coef=ebft.diversity_coef,
        whiten_tol=ebft.whiten_tol,
    )
    grouped = [tensor.unflatten(0, (-1, samples)) for tensor in (tokens, written, counted, behaviour, truncated)]
    return Groups(*grouped, features, truth_features, rewards)


def advantages_of(config: StructuredConfig, rewards: FeatureRewards) -> Tensor:
    """Point 4: how much better each completion is than its siblings. (B, N)."""
    ebft = config.ebft
    if ebft.advantage_estimator == "rloo":
        return rloo_advantages(rewards.alignment, rewards.diversity, ebft.alignment_coef, ebft.diversity_coef)
    if ebft.advantage_estimator == "group_norm":
        return (
            rewards.reward - rewards.reward.mean(-1, keepdim=True)
            if ebft.scale_rewards is False
            else group_norm_advantages(rewards.reward)
        )
    return rewards.reward


def take_step(run: Run, step: int, update: Update):
    """A whole step (counted from 0), with its metrics. (Point 6 is at the beginning of `of_step`: the server gets new weights when it is asked to use them.)"""
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
            metrics |= {
                "vllm/staleness": float(step - written.version),
                "time/sync": run.served.seconds - synced,
                "vllm/ratio_min": -metrics.pop("vllm/ratio_least"),
            }
    metrics["time/step"] = time.perf_counter() - started
    return metrics, None if groups is None else lambda: sample_table(run.tokenizer, batches[-1], groups)


def train_step(run: Run, batches: list[PromptBatch], completions: list[list[list[Completion]]] | None, update: Update):
    """Points 2 to 5: the updates made with one batch of completions (None: rl_coef is 0). Returns metric sums and the last micro-batch's groups."""
    config, accelerator, ebft, sums = run.config, run.accelerator, run.config.ebft, MetricSums()
    started, groups = time.perf_counter(), [None] * len(batches)
    if completions is not None:
        unwrapped = accelerator.unwrap_model(run.policy)
        with precision(accelerator, unwrapped), whole_weights(accelerator, unwrapped):
            groups = [score(run, batch, group) for batch, group in zip(batches, completions, strict=True)]
    # counts of the whole global batch, known before the first forward: each loss is sum over tokens / global count
    counted = [group.counted for group in groups if group is not None]
    totals = [
        sum(mask.sum() for mask in counted),
        sum(mask.any(-1).sum() for mask in counted),
        sum(batch.written[:, 1:].sum() for batch in batches),
    ]
    totals = torch.stack([torch.as_tensor(total, device=accelerator.device) for total in totals])
    num_tokens, num_completions, num_targets = accelerator.reduce(totals, reduction="sum").clamp_min(1).tolist()
    features_done = time.perf_counter()
    old_logps = [None] * len(batches)
    for iteration in range(ebft.num_iterations):
        total_loss = torch.zeros((), device=accelerator.device)
        for index, (batch, group) in enumerate(zip(batches, groups, strict=True)):
            with gradient_sync(accelerator, run.policy, last=index == len(batches) - 1):
                rollout_logps, document_logps = policy_logprobs(
                    run, batch, None if group is None else group.tokens, ebft.ce_coef > 0
                )
                targets = batch.written[:, 1:]
                loss = ebft.ce_coef * cross_entropy_loss(document_logps, targets, num_targets)
                if group is not None:
                    if iteration == 0:
                        old_logps[index] = rollout_logps.detach()
                    token_weights = completion_token_weights(
                        group.counted, ebft.loss_type, num_completions, num_tokens, ebft.max_completion_length
                    )
                    weights = token_weights * importance_weights(
                        old_logps[index],
                        group.behaviour_logprobs,
                        group.counted,
                        ebft.vllm_importance_cap if ebft.use_vllm else None,
                    )
                    advantages = advantages_of(config, group.rewards)
                    rl_loss = clipped_policy_loss(rollout_logps, old_logps[index], advantages, weights, ebft.epsilon)
                    loss = loss + ebft.rl_coef * rl_loss
                    if iteration == ebft.num_iterations - 1:
                        count_completions(config, sums, group, advantages, rollout_logps.detach(), old_logps[index])
                        sums.add_sum("ebft/rl_loss", rl_loss * accelerator.num_processes * len(batches), 1.0)
                # DDP and FSDP average gradients over the processes; the sum is wanted
                accelerator.backward(loss * accelerator.num_processes)
            if iteration == ebft.num_iterations - 1:
                sums.add("ebft/ce_loss", -document_logps, targets)
                read = (batch.segment_ids >= 0).sum() + (0 if group is None else group.written.sum())
                sums.add_sum("tokens", read, 1.0)
            total_loss += loss.detach()
        update(accelerator.reduce(total_loss, reduction="sum").item())
    sums.add_sum("time/features", torch.tensor(features_done - started), 1.0)
    sums.add_sum("time/train", torch.tensor(time.perf_counter() - features_done), 1.0)
    return sums, groups[-1]


def policy_logprobs(
    run: Run, batch: PromptBatch, tokens: Tensor | None, document_grad: bool
) -> tuple[Tensor | None, Tensor]:
    """Log-probs of completions (B, N, G), at the sampling temperature, and of prompt + truth (B, S-1), at temperature 1: one packed forward of the prepared policy."""
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
    """Adds the metrics of a batch's completions. logps, old_logps (B, N, G): in the batch's last iteration, and before its first."""
    rewards, ebft, every = groups.rewards, config.ebft, torch.ones_like(groups.truncated)
    sums.add("ebft/alignment", rewards.alignment, every)
    sums.add("ebft/diversity", rewards.diversity, every)
    sums.add("ebft/mean_reward", rewards.reward, every)
    sums.add("ebft/cfm_loss", rewards.cfm, every[:, 0])
    sums.add("advantage", advantages, every)
    sums.add("advantage_square", advantages.square(), every)
    first = first_equal_rollout(torch.where(groups.written, groups.tokens, -1))
    sums.add("ebft/duplicate_rollouts", (first != torch.arange(every.shape[1], device=every.device)).float(), every)
    sums.add("rollout/length", groups.written.sum(-1).float(), every)
    sums.add("rollout/truncated", groups.truncated.float(), every)
    sums.add("rollout/entropy", -old_logps, groups.written)
    ratio = torch.where(groups.written, logps - old_logps, 0.0).exp()
    ahead = advantages.unsqueeze(-1) > 0
    clipped = torch.where(ahead, ratio > 1 + ebft.epsilon, ratio < 1 - ebft.epsilon)
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


# ---------------------------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(run: Run, rows: Rows, step: int, signals: StopSignals) -> dict[str, Tensor] | None:
    """Held-out cross-entropy, CFM and reward of each row: name -> (2, rows), totals and their weights. Same seed, same numbers.

    None when the run was asked to stop in the middle.
    """
    config, accelerator, size = run.config, run.accelerator, run.config.eval.per_device_batch_size
    run.rollouts.bring_up_to(step)
    policy = accelerator.unwrap_model(run.policy)
    policy.eval()
    table = torch.zeros(len(EVALUATED), 2, len(rows), dtype=torch.float64, device=accelerator.device)
    for start in tqdm(
        range(0, len(rows), size * accelerator.num_processes),
        desc="evaluating",
        disable=not accelerator.is_main_process,
        leave=False,
    ):
        if signals.agreed(accelerator):
            policy.train()
            return None
        start += accelerator.process_index * size
        row_ids = list(range(start, min(start + size, len(rows))))
        run_ids = row_ids or [
            0
        ]  # FSDP2 needs every process in every forward: one that has no rows left runs the first, and does not count it
        batch = make_prompt_batch(rows, run_ids, run_ids, run.tokenizer.pad_token_id, accelerator.device)
        (completions,) = run.rollouts.write([batch], config.eval.seed).completions
        with ExitStack() as stack:
            stack.enter_context(precision(accelerator, policy))
            stack.enter_context(whole_weights(accelerator, policy))
            groups = score(run, batch, completions)
            _, logps = policy_logprobs(run, batch, None, False)
        rewards = groups.rewards
        values = [(-logps, batch.written[:, 1:])] + [
            (value.unsqueeze(-1), torch.ones(len(run_ids), 1, dtype=torch.bool, device=value.device))
            for value in (
                rewards.cfm,
                unbiased_cfm(groups.features, groups.truth_features),
                rewards.reward.mean(-1),
                rewards.reward.amax(-1),
            )
        ]
        for index, (value, counted) in enumerate(values if row_ids else ()):
            table[index, 0, row_ids] = torch.where(counted, value, 0.0).double().sum(1)
            table[index, 1, row_ids] = counted.double().sum(1)
    policy.train()
    return dict(zip(EVALUATED, accelerator.reduce(table, reduction="sum").cpu(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Around it


def step_batches(
    config: StructuredConfig, accelerator: Accelerator, rows, step: int, pad_token_id: int
) -> list[PromptBatch]:
    """This process's micro-batches of a step (counted from 0)."""
    size, rows_per_step = config.train.per_device_batch_size, config.train.batch_size
    row_ids = rows_of_step(rows, step, rows_per_step)
    starts = [
        (index * accelerator.num_processes + accelerator.process_index) * size
        for index in range(micro_batches_per_step(config, accelerator))
    ]
    keys = [
        range(step * rows_per_step + start, step * rows_per_step + start + size) for start in starts
    ]  # a row has other completions in each epoch

    def read() -> list[PromptBatch]:
        return [
            make_prompt_batch(rows, row_ids[start : start + size], list(key), pad_token_id, accelerator.device)
            for start, key in zip(starts, keys, strict=True)
        ]

    return (
        together(accelerator, read) if config.data.streaming else read()
    )  # a stream can break off, on one process alone


def sample_table(tokenizer, batch: PromptBatch, groups: Groups, num_rows: int = 8) -> str:
    """A few completions of a batch as text."""
    return rollout_table(
        [
            {
                "prefix": tokenizer.decode(conversation.prompt[-24:]),
                "rollout": tokenizer.decode(
                    groups.tokens[row, sample][: int(groups.written[row, sample].nonzero().max()) + 1].cpu()
                ),
                "ground truth": tokenizer.decode(conversation.truth[0]),
                "reward": groups.rewards.reward[row, sample].item(),
            }
            for row, conversation in enumerate(batch.conversations)
            for sample in range(2)
        ][:num_rows]
    )


def main(argv: list[str]) -> None:
    # --- configuration -----------------------------------------------------------------------------------------------------------------
    config = parse_command_line(argv, __doc__, StructuredConfig)
    if config is None:
        return
    accelerator = prepare_accelerator(config)
    micro_batches_per_step(config, accelerator)  # or it refuses
    if config.train.dry_run:
        accelerator.print(preview(config, accelerator))
        return
    torch.manual_seed(config.train.seed)  # the initial adapter; all else is drawn from (seed, step, row)
    with output_folder(config, accelerator) as output_dir, out_of_memory_advice(config, accelerator):
        train_or_evaluate(config, accelerator, output_dir)
    accelerator.end_training()


def train_or_evaluate(config: StructuredConfig, accelerator: Accelerator, output_dir: Path) -> None:
    """The whole run, in one fixed order."""
    # --- data, model -------------------------------------------------------------------------------------------------------------------
    checkpoint = find_checkpoint(config, accelerator)
    changed = check_same_run(config, checkpoint) if checkpoint is not None else []
    tokenizer = load_tokenizer(config.model)
    rows, held_out = main_process_first(
        accelerator, lambda: load_rows(config, tokenizer, conversation_of)
    )  # the others then read its cache
    causal_lm = load_policy(config)
    check_vocabulary(tokenizer, causal_lm, config.model.name_or_path)
    set_attention(config, causal_lm, accelerator.device)

    # --- optimizer ---------------------------------------------------------------------------------------------------------------------
    policy = StridedPolicy(causal_lm, config.model.compile_decoding)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=config.train.learning_rate,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        weight_decay=config.train.weight_decay,
    )
    stop_ids = stop_token_ids(causal_lm, tokenizer)
    policy, optimizer = prepare_policy(accelerator, policy, optimizer)
    network = load_feature_network(accelerator.unwrap_model(policy).causal_lm, config, accelerator.device)
    accelerator.print(describe_run(config, accelerator, policy, network))
    state = RunState(step=0, launch=launch_of(accelerator), data=rows.fingerprint(), before=None, places=rows.places)
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, policy, optimizer.optimizer)
        accelerator.print(
            f"going on from {checkpoint}, step {state.step}" + "".join(f"\n  {change}" for change in changed)
        )
        if not config.eval.only:
            continue_with(config, accelerator, state, rows)

    # --- the server --------------------------------------------------------------------------------------------------------------------
    with ExitStack() as stack:
        served = None
        if config.ebft.use_vllm and (config.ebft.rl_coef > 0 or held_out is not None):
            probe = (
                held_out[0]
                if config.eval.only
                else together(accelerator, lambda: rows[rows.row_at(state.step * config.train.batch_size)])
            )
            served = ServedPolicy(config, accelerator, policy, VLLMServer(config), probe.prompt + probe.truth[0])
            stack.callback(served.close)
            accelerator.print(f"rollouts: {served.start(state.step)}")
        rollouts = Rollouts(
            config,
            accelerator,
            policy,
            tokenizer,
            stop_ids,
            served,
            lambda step: step_batches(config, accelerator, rows, step, tokenizer.pad_token_id),
        )
        stack.callback(rollouts.close)
        signals = stack.enter_context(StopSignals())
        if served is not None:
            served.server.gives_up = lambda: (
                signals.received > 0
            )  # what was trained is saved, instead of waiting for a server that may not come back
        run = Run(config, accelerator, policy, network, tokenizer, rows, rollouts, served)

        # --- evaluate only, or train ---------------------------------------------------------------------------------------------------
        evaluation = None if held_out is None else lambda: evaluate(run, held_out, state.step, signals)
        if config.eval.only:
            evaluate_only(accelerator, output_dir, state.step, evaluation, signals)
            return
        results = logged_evaluations(output_dir, state.step) if checkpoint is not None else {}
        accelerator.wait_for_everyone()  # all have read it
        logger = (
            MetricLogger(output_dir, None if checkpoint is None else state.step)
            if accelerator.is_main_process
            else None
        )
        step = partial(take_step, run)
        TrainingLoop(
            config,
            accelerator,
            policy,
            optimizer,
            state,
            results,
            logger,
            take_step=step,
            evaluate=evaluation,
            shown=SHOWN,
        ).train(signals)

    # --- the final model ---------------------------------------------------------------------------------------------------------------
    target = export_final(config, accelerator, policy, tokenizer, model_card(config, results))
    accelerator.print(f"the final model is in {target}")
    if logger is not None:
        logger.close()


if __name__ == "__main__":
    run_as_command(main)
