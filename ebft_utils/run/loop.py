"""The loop around an algorithm's steps: learning rate, updates, logging, evaluation, checkpoints.

Whatever ends a run, the steps that were trained are saved.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from ..config.modes import Config
from ..config.settings import UserError
from ..data.rows import Rows, rows_of_step
from .checkpoint import RunState, list_checkpoints, save_checkpoint
from .distributed import AgreedError, Stopped, StopSignals, clip_gradients, micro_batches_per_step, together
from .metrics import MetricLogger, evaluation_metrics, summary_of

Update = Callable[[float], None]


def learning_rate(config: Config, step: int, num_steps: int) -> float:
    """Learning rate of a step (counted from 0): linear warm-up to the peak, then constant, or cosine or linear to 0.

    num_steps: of the whole run (TrainConfig.total_steps).
    """
    train = config.train
    warmup_steps = round(train.warmup_ratio * num_steps) if train.warmup_steps is None else train.warmup_steps
    if step < warmup_steps:
        return train.learning_rate * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return train.learning_rate * decay[train.lr_scheduler]


def make_optimizer(config: Config, policy: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW over the weights that are trained."""
    train = config.train
    return torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.weight_decay,
    )


def micro_batches(config: Config, accelerator: Accelerator, rows, step: int, make: Callable) -> list:
    """This process's micro-batches of an optimizer step (counted from 0).

    make(row_ids, keys) -> batch. A row's key seeds its rollouts: the same row has another key in each epoch.
    """
    size, rows_per_step = config.train.per_device_batch_size, config.train.batch_size
    num_batches, row_ids = micro_batches_per_step(config, accelerator), rows_of_step(rows, step, rows_per_step)

    def read() -> list:
        batches = []
        for index in range(num_batches):
            start = (index * accelerator.num_processes + accelerator.process_index) * size
            first_key = step * rows_per_step + start
            batches.append(make(row_ids[start : start + size], list(range(first_key, first_key + size))))
        return batches

    return together(accelerator, read) if config.data.streaming else read()  # one process's stream alone can break off


def evaluate_rows(
    config: Config,
    accelerator: Accelerator,
    num_rows: int,
    names: Sequence[str],
    measure: Callable,
    signals: StopSignals,
) -> dict[str, Tensor] | None:
    """Metrics of each held-out row: name -> (2, num_rows), totals and their weights. None: the run was asked to stop.

    measure(row_ids) -> for each name a pair (values, mask), both (rows, ..): what counts for a row is summed.
    """
    size, device = config.eval.per_device_batch_size, accelerator.device
    table = torch.zeros(len(names), 2, num_rows, dtype=torch.float64, device=device)
    starts = range(0, num_rows, size * accelerator.num_processes)
    for start in tqdm(starts, desc="evaluating", disable=not accelerator.is_main_process, leave=False):
        if signals.agreed(accelerator):
            return None
        start += accelerator.process_index * size
        row_ids = list(range(start, min(start + size, num_rows)))
        # FSDP2 needs every process in every forward: a process without rows runs the first one and does not count it
        measured = measure(row_ids or [0])
        for index, (values, mask) in enumerate(measured if row_ids else ()):
            table[index, 0, row_ids] = torch.where(mask, values, 0.0).double().sum(1)
            table[index, 1, row_ids] = mask.double().sum(1)
    return dict(zip(names, accelerator.reduce(table, reduction="sum").cpu(), strict=True))


class TrainingLoop:
    """One run of training.

    Args:
        run: where it starts. results: evaluation metrics by step, extended here. logger: on the main process only.
        take_step(step, update) -> (metrics, samples): one step of the algorithm, counted from 0. It leaves gradients
            and calls update(loss) once for each update that it makes. The metric "tokens" becomes tokens per second.
            samples() gives some groups of rollouts as text; samples may be None.
        evaluate() -> name -> (2, documents), totals and weights; None when the run was asked to stop meanwhile.
            evaluate None: no evaluation.
        shown: label -> metric, for the console. rows: what it trains on.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        policy,
        optimizer,
        run: RunState,
        results: dict[int, dict[str, float]],
        logger: MetricLogger | None,
        *,
        take_step,
        evaluate,
        shown,
        rows,
    ):
        self.config, self.accelerator, self.policy, self.optimizer = config, accelerator, policy, optimizer
        self.run, self.results, self.logger = run, results, logger
        self.take_step, self.evaluate = take_step, evaluate
        self.shown, self.rows, self.num_steps = shown, rows, config.train.total_steps(rows)
        self.saved, self.updating, self.grad_norm, self.loss = run.step, False, 0.0, 0.0
        if (config.train.warmup_steps or 0) > self.num_steps:
            words = f"{config.train.warmup_steps} are more than the {self.num_steps} steps of the run"
            raise UserError(f"train.warmup_steps: {words}")

    def train(self, signals: StopSignals) -> None:
        """Runs to the last step.

        Raises Stopped when the run was asked to stop, UserError when the loss is not finite or a step cannot be done.
        """
        config, accelerator, run, train = self.config, self.accelerator, self.run, self.config.train
        finished = False
        hidden = not accelerator.is_main_process
        self.progress = tqdm(total=self.num_steps, initial=run.step, desc="training", disable=hidden)
        self.policy.train()
        try:
            if run.step == 0 and config.eval.at_start:
                self._evaluate_now()
            while run.step < self.num_steps and not signals.agreed(accelerator):
                self._step()
                if config.eval.every_steps and run.step % config.eval.every_steps == 0 and run.step < self.num_steps:
                    self._evaluate_now()
                if train.save_steps and run.step % train.save_steps == 0:
                    self._save()
            if config.eval.at_end and not signals.agreed(accelerator):
                self._evaluate_now()
            self._save()
            finished = True
        except AgreedError as error:
            if run.step > self.saved and not self.updating:
                self._save()
            finished = True
            continuing = f"step {self.saved} is saved: train.resume=latest goes on from it"
            raise UserError(f"{error} ({continuing if self.saved else 'nothing was trained yet'})") from None
        finally:
            # an error, perhaps on this process alone
            if run.step > self.saved and not (finished or self.updating or signals.at_once):
                self._save_alone()
            self.progress.close()
            if self.logger is not None:
                self.logger.close()
        if number := signals.agreed(accelerator):
            raise Stopped(number)

    def _step(self) -> None:
        run, train, started = self.run, self.config.train, time.perf_counter()
        rate = learning_rate(self.config, run.step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics, samples = self.take_step(run.step, self._update)
        run.step, self.updating = run.step + 1, False
        metrics |= {"train/loss": self.loss, "train/learning_rate": rate, "train/grad_norm": self.grad_norm}
        num_tokens = metrics.pop("tokens")
        run.tokens += round(num_tokens)
        metrics["time/step"] = time.perf_counter() - started
        metrics |= {"train/tokens_per_second": num_tokens / metrics["time/step"], "train/tokens": run.tokens}
        if isinstance(self.rows, Rows):  # streams and mixtures have no epoch
            metrics["train/epoch"] = run.step * train.batch_size / len(self.rows)
        if self.logger is not None and (run.step % train.logging_steps == 0 or run.step == self.num_steps):
            self.logger.log(run.step, metrics)
            line = ", ".join(f"{label} {metrics[name]:.4g}" for label, name in self.shown.items() if name in metrics)
            self._print(f"step {run.step}: {line}")
        self.progress.update()
        table_steps = train.rollout_table_steps
        if self.logger is not None and samples is not None and table_steps:
            if run.step == 1 or run.step % table_steps == 0:
                self.logger.samples(run.step, samples())

    def _update(self, loss: float) -> None:
        self.loss, self.grad_norm = loss, clip_gradients(self.accelerator, self.policy, self.config.train.max_grad_norm)
        if not (math.isfinite(self.loss) and math.isfinite(self.grad_norm)):  # the same numbers on every process
            if not self.updating:
                self._save(keep_all=True)  # these weights may already be bad
            kept = f"the weights after step {self.saved} are saved as checkpoint-{self.saved}, beside earlier ones"
            raise UserError(
                f"step {self.run.step + 1}: loss {self.loss}, gradient norm {self.grad_norm}: not finite, stopped "
                f"before the update; {kept if self.saved else 'nothing was trained yet'}. Going on would end here "
                "again: start a new run with a lower train.learning_rate"
            )
        self.updating = True  # until the step is counted, the weights belong to no step
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _evaluate_now(self) -> None:
        if self.evaluate is None or self.run.step in self.results:
            return
        table: dict[str, Tensor] | None = self.evaluate()
        self.progress.unpause()  # its seconds per step leave the evaluation out
        if table is None:
            return
        results = self.results[self.run.step] = evaluation_metrics(table, self.run.before)
        self.run.before = table if self.run.step == 0 else self.run.before
        if self.logger is not None:
            self.logger.log(self.run.step, results)
            self._print(_evaluation_text(f"step {self.run.step}", table, results))

    def _save(self, **how) -> None:
        if self.run.step > self.saved:
            self.saved = self.run.step  # one attempt: a full disk stays full
            target = save_checkpoint(self.config, self.accelerator, self.policy, self.optimizer, self.run, **how)
            self._print(f"saved {target}")

    def _save_alone(self) -> None:
        """Saves on the main process without the others, where that is possible."""
        if isinstance(self.policy, FSDPModule) and self.accelerator.num_processes > 1:
            self._print(
                f"step {self.run.step} cannot be saved without all processes, which hold a part of the weights each; "
                f"the last checkpoint is of step {self.saved}"
            )
        elif self.accelerator.is_main_process:
            self._save(alone=True)

    def _print(self, text: str) -> None:
        """Prints above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            self.progress.write(text)


def evaluate_only(
    config: Config, accelerator: Accelerator, saved: Path | None, step: int, evaluate, signals: StopSignals
) -> None:
    """eval.only: evaluates once, prints the results, and writes them beside what they are of.

    saved: the checkpoint that was loaded, of a step; its results are in eval-checkpoint-STEP.json beside it. None: the
    model as it is before training; its results are in eval-step-0.json in train.output_dir. Raises Stopped when the run
    was asked to stop.
    """
    if evaluate is None:
        raise UserError(
            "eval.only: true without held-out documents leaves nothing to do; set eval.num_documents above 0"
        )
    folder = Path(config.train.output_dir).expanduser()
    target, name = folder / "eval-step-0.json", f"{config.model.name_or_path} before training"
    if saved is not None:
        target, name = saved.parent / f"eval-{saved.name}.json", str(saved)
    elif found := list_checkpoints(folder):
        name += f" (not {found[-1]}, which train.resume=latest evaluates)"
    accelerator.print(f"evaluating {name}")
    table = evaluate()
    if table is None:
        raise Stopped(signals.agreed(accelerator))
    results = evaluation_metrics(table, None)
    accelerator.print(_evaluation_text(name, table, results))
    if accelerator.is_main_process:
        finite = {name: value if math.isfinite(value) else None for name, value in results.items()}
        try:
            target.write_text(json.dumps({"step": step, **finite}, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{target} could not be written: {error.strerror}") from None
        accelerator.print(f"written to {target}")


def _evaluation_text(name: str, table: dict[str, Tensor], results: dict[str, float]) -> str:
    documents = next(iter(table.values())).shape[1]
    return f"{name}, {documents} held-out documents, mean ± standard error:\n{summary_of(results)}"
