"""The completions of a step: from the rollout server, perhaps one step ahead, or from the policy itself."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..config.modes import StructuredConfig
from ..config.settings import UserError
from ..data.batches import rollout_uniforms
from ..data.prompts import Completion, PromptBatch, converse, padded, seed_of
from ..run.distributed import agree, precision, whole_weights
from .client import ForgottenWeights
from .weight_sync import ServedPolicy


@dataclass
class Written:
    """completions[micro-batch][row][sample]; version: optimizer steps of the weights that wrote them; seconds taken."""

    completions: list[list[list[Completion]]]
    version: int
    seconds: float


class Rollouts:
    """Completions, step after step.

    Every process calls every public method, and asks for its own rows. The completions depend only on the seed, the
    step, the row and the weights, not on the process or on when they are asked for.

    Args:
        policy: prepared; served: the policy as the server has it, None without a server.
        step_batches: this process's micro-batches of a step. num_steps: of the whole run.
    """

    def __init__(
        self,
        config: StructuredConfig,
        accelerator: Accelerator,
        policy: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        served: ServedPolicy | None,
        step_batches,
        num_steps: int,
    ):
        self.config, self.accelerator, self.policy = config, accelerator, policy
        self.tokenizer, self.stop_ids, self.served, self.step_batches = tokenizer, stop_ids, served, step_batches
        self.num_steps = num_steps
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.ahead: dict[int, Future] = {}
        self.now = 0  # optimizer steps of the policy's weights

    def of_step(self, step: int) -> Written:
        """The completions of a step (counted from 0). With ebft.async_prefetch the next step's are started.

        Raises AgreedError when there are none to be had.
        """
        served, ebft, self.now = self.served, self.config.ebft, step
        if served is None:
            return self._by_policy(self.step_batches(step), self.config.train.seed, step)
        early = self._collect(step) if step in self.ahead else None  # before the weights change
        if served.version is None or step - served.version >= ebft.vllm_sync_interval:
            served.sync(step)
        written = early or self._collect(step)
        if ebft.async_prefetch and step + 1 < self.num_steps:
            self.ahead[step + 1] = self._start(self.step_batches(step + 1), self.config.train.seed)
        return written

    def write(self, batches: list[PromptBatch], seed: int) -> Written:
        """Completions now, with the weights that the server (or the policy) has."""
        if self.served is None:
            return self._by_policy(batches, seed, 0)
        return self._agreed(lambda: self._start(batches, seed))

    def bring_up_to(self, step: int) -> None:
        """Sends the weights of a step unless the server has them. Waits for completions that are written ahead."""
        self.now = step
        for future in self.ahead.values():
            future.exception()
        if self.served is not None and self.served.version != step:
            self.served.sync(step)

    def close(self) -> None:
        """Gives up the completions that are being written ahead."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    # --- from the server ----------------------------------------------------------------------------------------------

    def _collect(self, step: int) -> Written:
        return self._agreed(
            lambda: self.ahead.pop(step, None) or self._start(self.step_batches(step), self.config.train.seed)
        )

    def _start(self, batches: list[PromptBatch], seed: int) -> Future:
        return self.thread.submit(self._by_server, batches, seed, self.served.version, self.served.name)

    def _by_server(self, batches: list[PromptBatch], seed: int, version: int, name: str) -> Written:
        """Sends all prompts at once. The server decides how many it runs together."""
        started, served, config = time.perf_counter(), self.served, self.config
        longest = served.server.max_model_len

        def complete(contexts: list[list[int]], limits: list[int], keys: list[tuple[int, int, int]], n: int):
            for context, limit in zip(contexts, limits, strict=True):
                if len(context) + limit > longest:
                    raise UserError(
                        f"vllm.max_model_len: a conversation of {len(context)} tokens and its next answer of up to "
                        f"{limit} are more than the server's {longest}; raise it"
                    )
            seeds, temperature = [seed_of(seed, *key) for key in keys], config.ebft.temperature
            return served.server.complete(name, contexts, limits, seeds, n, temperature, self.stop_ids)

        conversations = [conversation for batch in batches for conversation in batch.conversations]
        row_keys = [key for batch in batches for key in batch.keys]
        rows = iter(converse(config, conversations, row_keys, complete, self.tokenizer.eos_token_id))
        served.check_version()
        return Written([[next(rows) for _ in batch.keys] for batch in batches], version, time.perf_counter() - started)

    def _agreed(self, start) -> Written:
        """The result of start(), once all processes have theirs. Weights that the server lost are sent again, once."""
        server = f"the vLLM server at {self.served.server.url}"
        for again in (False, True):
            written, lost, error = None, False, None
            try:
                written = start().result()
            except ForgottenWeights:
                lost = True
            except UserError as problem:
                error = str(problem)
            agree(self.accelerator, error)
            num_lost = torch.tensor(int(lost), device=self.accelerator.device)
            if not self.accelerator.reduce(num_lost, reduction="sum").item():
                return written
            if not again:
                self.accelerator.print(
                    f"{server} has lost the weights (was it started again?): they are sent once more"
                )
                self.served.sync(self.now)
        agree(self.accelerator, f"{server} loses the weights that it is given: does another run send its own?")

    # --- from the policy itself ---------------------------------------------------------------------------------------

    def _by_policy(self, batches: list[PromptBatch], seed: int, version: int) -> Written:
        started, device = time.perf_counter(), self.accelerator.device
        policy = self.accelerator.unwrap_model(self.policy)
        stop_ids = torch.tensor(self.stop_ids, device=device)

        def complete(contexts: list[list[int]], limits: list[int], keys: list[tuple[int, int, int]], n: int):
            document_ids = padded(contexts, self.tokenizer.pad_token_id, device)
            lengths = torch.tensor([len(context) for context in contexts], device=device)
            is_token = torch.arange(document_ids.shape[1], device=device) < lengths.unsqueeze(-1)
            # always drawn at full width, so that they do not depend on the limits of other rows in the batch
            width = self.config.ebft.max_completion_length
            uniforms = torch.cat([rollout_uniforms(seed_of(seed, *key), [0], 1, n, width) for key in keys])
            tokens = policy.generate(
                document_ids=document_ids,
                segment_ids=torch.where(is_token, 0, -1),
                anchors=lengths.unsqueeze(-1),
                valid=torch.ones(len(contexts), 1, dtype=torch.bool, device=device),
                temperature=self.config.ebft.temperature,
                uniforms=uniforms[..., : max(limits)].to(device),
                stop_ids=stop_ids,
            ).squeeze(1)  # (B, N, G)
            stops = torch.isin(tokens, stop_ids)
            # the length up to the first stop token; without one, a length beyond the last token
            ends = torch.where(stops.any(-1), stops.int().argmax(-1) + 1, tokens.shape[-1] + 1)
            rows = zip(tokens.tolist(), ends.tolist(), limits, strict=True)
            return [
                [(sample[: min(end, limit)], None, end > limit) for sample, end in zip(samples, row, strict=True)]
                for samples, row, limit in rows
            ]

        with precision(self.accelerator, policy), whole_weights(self.accelerator, policy):
            eos = self.tokenizer.eos_token_id
            completions = [converse(self.config, batch.conversations, batch.keys, complete, eos) for batch in batches]
        return Written(completions, version, time.perf_counter() - started)
