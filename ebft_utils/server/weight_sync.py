"""The policy's weights on the rollout server: sending them, and proving that they have arrived.

A LoRA adapter goes as files, under a new name and in a new folder each time. All weights go as files that the server
reads (`reload_weights`), or by vLLM's own NCCL transfer. Every process calls every public function here, because all of
them gather the weights and score the probe together. Only the main process talks to the server. Its errors are raised
on all.

Why a tied head is always sent beside the embedding: vLLM's CPU build packs the head's weight into a matrix of its own,
and packs it again only when the head is among the weights that arrive. A checkpoint of a model with tied embeddings
does not name the head, so the server would keep the old one.
"""

import hashlib
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import requests
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..config.modes import StructuredConfig
from ..config.settings import UserError
from ..run.checkpoint import free_space
from ..run.distributed import AgreedError, agree, whole_weights
from ..run.export import whole_state
from ..text_decoders import save_adapter, served_name
from .client import START_IT, ForgottenWeights, VLLMServer

PROBE_TOKENS, PROBE_SAMPLED = 64, 4
SERVER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CANARY_SCALES = [0.02 * 2**power for power in range(8)]


class ServedPolicy:
    """The policy as the server has it.

    version: optimizer steps of the weights that were sent last, None before the first; name: the model to request.
    """

    def __init__(
        self,
        config: StructuredConfig,
        accelerator: Accelerator,
        policy: torch.nn.Module,
        server: VLLMServer,
        probe: list[int],
    ):
        self.config, self.accelerator, self.policy, self.server = config, accelerator, policy, server
        self.probe = probe[:PROBE_TOKENS]
        self.version, self.name, self.seconds = None, config.model.name_or_path, 0.0
        identity = hashlib.sha256(str(Path(config.train.output_dir).expanduser().resolve()).encode()).hexdigest()[:8]
        self.folder = Path(config.vllm.sync_folder).expanduser().resolve() / f"ebft-{identity}"
        (self.token,) = broadcast_object_list([f"{time.time_ns():x}"])  # no name is used twice, even after a restart
        self.number, self.transfer = 0, None

    def start(self, step: int) -> str:
        """Checks the server, proves with changed weights that sending takes effect, and sends the real weights.

        Returns what the server is, in words. Raises AgreedError when it does not answer, serves another model, or does
        not take the weights.
        """
        words = self._on_main(lambda: self.server.check(self.config))
        self._on_main(self._clean_folder)
        checked = self._on_main(lambda: (self.server.max_model_len, self.server.dtype))
        self.server.max_model_len, self.server.dtype = checked
        self.probe = self.probe[: self.server.max_model_len - PROBE_SAMPLED]
        plain = self._own_scores([])[0]
        with self._changed_weights(plain):
            self._send("canary")
            self._prove(before=plain)
        self.sync(step)
        return words

    def sync(self, step: int) -> None:
        """Sends the weights as they are now, after `step` optimizer steps, and proves it. Raises AgreedError."""
        started = time.perf_counter()
        self._send(str(step))
        self._prove()
        self.version = step
        self.seconds += time.perf_counter() - started

    def check_version(self) -> None:
        """Raises ForgottenWeights when the server has lost the weights that were sent last.

        An adapter needs no check: each request names it.
        """
        if self.config.lora is None and (found := self.server.weight_version()) != self.weights_name:
            raise ForgottenWeights(f"its weights are of version {found!r}, not {self.weights_name!r}")

    def close(self) -> None:
        """Stops waiting for the server, and removes what is left: the adapter on it, the files in the folder."""
        self.server.closed.set()
        if not self.accelerator.is_main_process:
            return
        if self.name != self.config.model.name_or_path:
            with suppress(UserError):  # a server that is gone has no adapter
                self.server.unload_adapter(self.name)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- sending ------------------------------------------------------------------------------------------------------

    def _send(self, label: str) -> None:
        self.number += 1
        old, name = self.name, f"ebft-{self.token}-{self.number}-v{label}"
        self.weights_name = name
        if self.config.vllm.weight_sync == "nccl":
            self._send_by_nccl()
            self._on_main(lambda: self.server.finish_update(name))
            return
        weights = whole_state(self.config, self.policy)
        causal_lm = self.accelerator.unwrap_model(self.policy).causal_lm
        folder = self.folder / name

        def push() -> None:
            folder.mkdir(parents=True)
            if isinstance(causal_lm, PeftModel):
                save_adapter(causal_lm, weights, folder, served=True)
                if old != self.config.model.name_or_path:
                    self.server.unload_adapter(old)
                self.server.load_adapter(name, str(folder))
            else:
                dtype = SERVER_DTYPES[self.server.dtype]
                copies = {served_name(causal_lm, key): _own_copy(tensor, dtype) for key, tensor in weights.items()}
                save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
                self.server.reload_weights(str(folder), name)
            for older in self.folder.iterdir():
                if older != folder or not isinstance(causal_lm, PeftModel):  # the server may read an adapter again
                    shutil.rmtree(older, ignore_errors=True)

        self._on_main(push)
        if isinstance(causal_lm, PeftModel):
            self.name = name

    def _send_by_nccl(self) -> None:
        error = None
        try:
            if self.transfer is None:
                self.transfer = self._open_transfer()
            self.transfer.send_weights()
        except (requests.RequestException, RuntimeError) as problem:
            server = f"the vLLM server at {self.server.url}"
            error = f"vllm.weight_sync: nccl: the weights did not get to {server}: {problem}"
        agree(self.accelerator, error)

    def _open_transfer(self):
        if self.accelerator.device.type != "cuda":
            wrong = "nccl goes from GPU to GPU, and this process runs on the CPU"
            raise UserError(f"vllm.weight_sync: {wrong}; set it to files")
        try:
            from .nccl_transfer import open_transfer
        except ImportError as error:
            needs = "nccl needs vllm beside the trainer: pip install vllm==0.32.0"
            raise UserError(f"vllm.weight_sync: {needs} ({error})") from None
        num_gpus = self._on_main(lambda: self.server.call("/get_world_size")["world_size"])
        causal_lm = self.accelerator.unwrap_model(self.policy).causal_lm
        dtype, timeout = SERVER_DTYPES[self.server.dtype], self.config.vllm.request_timeout
        return open_transfer(self.accelerator, causal_lm, self.server.url, num_gpus, dtype, timeout)

    def _clean_folder(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"vllm.sync_folder: {self.folder.parent} cannot be written: {error.strerror}") from None

    def _on_main(self, action):
        """Runs action() on the main process. All processes get its result, or its error as an AgreedError."""
        result, error = None, None
        if self.accelerator.is_main_process:
            try:
                result = action()
            except (UserError, ForgottenWeights) as problem:
                error = str(problem)
            except OSError as problem:
                free = free_space(self.folder.parent)
                error = f"vllm.sync_folder: the weights cannot be written to {self.folder}: {problem} ({free})"
        result, error = broadcast_object_list([result, error])
        if error is not None:
            raise AgreedError(error)
        return result

    # --- proving ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _own_scores(self, sampled: list[int]) -> tuple[Tensor, Tensor]:
        """The trainer's log-probs of the probe (temperature 1) and of tokens sampled after it (ebft.temperature)."""
        device = self.accelerator.device
        probe = torch.tensor([self.probe], device=device)
        rollouts = torch.tensor([[[sampled]]], device=device) if sampled else None
        self.policy.eval()
        with whole_weights(self.accelerator, self.policy):
            rollout_logps, document_logps = self.policy(
                document_ids=probe,
                segment_ids=torch.zeros_like(probe),
                rollouts=rollouts,
                anchors=torch.tensor([[len(self.probe)]], device=device),
                valid=torch.ones(1, 1, dtype=torch.bool, device=device),
                temperature=self.config.ebft.temperature,
                document_grad=False,
            )
        self.policy.train()
        return document_logps[0].cpu(), torch.empty(0) if rollout_logps is None else rollout_logps.flatten().cpu()

    def _prove(self, before: Tensor | None = None) -> None:
        """Compares the scores of the probe on both sides. Raises AgreedError when they differ.

        before: at the start, the trainer's scores without the changed weights that were sent.
        """
        temperature, tolerance = self.config.ebft.temperature, self.config.vllm.sync_tolerance
        scores = self._on_main(lambda: self.server.score(self.name, self.probe, PROBE_SAMPLED, temperature))
        given, sampled, logprobs = torch.tensor(scores[0]), scores[1], torch.tensor(scores[2])
        own_given, own_sampled = self._own_scores(sampled)
        gap = (given - own_given).abs().mean().item()
        sampled_gap = (logprobs - own_sampled).abs().mean().item()
        where = f"the vLLM server at {self.server.url}"
        if not gap <= tolerance:
            old_gap = None if before is None else (given - before).abs().mean().item()
            if old_gap is not None and old_gap <= tolerance:
                reason = "it answers with the weights of before: what is sent does not take effect there"
            elif old_gap is not None:
                reason = (
                    "it has neither the weights of before nor those that were sent: another model or precision, or "
                    "only a part of the weights has arrived"
                )
            else:
                reason = "it has old weights, or only a part of the new ones"
            raise AgreedError(
                f"{where} and the trainer do not have the same weights: their log-probs of one text differ by "
                f"{gap:.3g} nats per token, more than vllm.sync_tolerance {tolerance:g}; {reason}. {START_IT}"
            )
        if not sampled_gap <= tolerance:
            raise AgreedError(
                f"{where} and the trainer agree on a text, and not on sampled tokens: their log-probs at temperature "
                f"{temperature:g} differ by {sampled_gap:.3g} nats per token, more than vllm.sync_tolerance "
                f"{tolerance:g}; the server samples from another distribution than it is asked to. {START_IT}"
            )

    @contextmanager
    def _changed_weights(self, plain: Tensor):
        """Changes the trained weights so much that the probe shows it. Restores them exactly at the end."""
        parameters = self.policy.named_parameters()
        trained = [(name, _local(parameter)) for name, parameter in parameters if parameter.requires_grad]
        lora, tolerance = self.config.lora is not None, self.config.vllm.sync_tolerance
        if lora:  # an adapter changes nothing without lora_B, which is 0 at the beginning
            trained = [(name, weight) for name, weight in trained if "lora_B" in name]
        kept = [weight.detach().clone() for _, weight in trained]
        try:
            for scale in CANARY_SCALES:
                for index, ((_, weight), original) in enumerate(zip(trained, kept, strict=True)):
                    sign = 1 if index % 2 else -1
                    weight.data.copy_(original + scale if lora else original * (1 + sign * scale))
                changed = self._own_scores([])[0]
                if (changed - plain).abs().mean() > 5 * tolerance:
                    break
            else:
                wrong = f"{tolerance:g} is so high that no change of the weights could be noticed"
                raise AgreedError(f"vllm.sync_tolerance: {wrong}; lower it")
            yield
        finally:
            for (_, weight), original in zip(trained, kept, strict=True):
                weight.data.copy_(original)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _own_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy for safetensors, which refuses tensors that share memory (embedding and head)."""
    return tensor.to(dtype, copy=True).contiguous()
