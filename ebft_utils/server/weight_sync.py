"""The policy's weights on the rollout server: sending them, and proving that they have arrived.

A LoRA adapter goes as files, under a new name and in a new folder each time. All weights go as files that the server reads (`reload_weights`) or by
vLLM's own NCCL transfer. Every process calls every public function here: gathering the weights and scoring the probe are done by all together;
only the main process talks to the server. An error on it is raised on all.

Why the head is always sent beside tied embeddings: vLLM's CPU build packs the head's weight into a matrix of its own, and packs it again only when the
head is among the weights that arrive. A checkpoint of a model with tied embeddings does not name it, so the head would stay the old one.
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
from ..run.checkpoint import whole_state
from ..run.distributed import AgreedError, agree, whole_weights
from .client import START_IT, ForgottenWeights, VLLMServer

PROBE_TOKENS, PROBE_SAMPLED = 64, 4
SERVER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CANARY_SCALES = [0.02 * 2**power for power in range(8)]


class ServedPolicy:
    """The policy as the server has it. version: optimizer steps of the weights that it was given last, None before the first; name: what to request."""

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
        (self.token,) = broadcast_object_list([f"{time.time_ns():x}"])  # no name is used twice, in later starts neither
        self.number, self.transfer = 0, None

    def start(self, step: int) -> str:
        """Checks the server, proves with changed weights that what is sent takes effect, and sends the real ones. Returns what the server is, in words.

        Raises AgreedError when it is not there, is another model's, or does not take the weights.
        """
        words = self._on_main(lambda: self.server.check(self.config))
        self._on_main(self._clean_folder)
        (self.server.max_model_len, self.server.dtype) = self._on_main(
            lambda: (self.server.max_model_len, self.server.dtype)
        )
        self.probe = self.probe[: self.server.max_model_len - PROBE_SAMPLED]
        plain = self._own_scores([])[0]
        with self._changed_weights(plain) as changed:
            self._send("canary")
            self._prove(before=plain, expected=changed)
        self.sync(step)
        return words

    def sync(self, step: int) -> None:
        """Sends the weights as they are now (those after `step` optimizer steps), and proves it. Raises AgreedError."""
        started = time.perf_counter()
        self._send(str(step))
        self._prove()
        self.version = step
        self.seconds += time.perf_counter() - started

    def check_version(self) -> None:
        """Raises ForgottenWeights when the server does not have the weights that it was given last. (An adapter's name says it in each request.)"""
        if self.config.lora is None and (found := self.server.weight_version()) != self.weights_name:
            raise ForgottenWeights(f"its weights are of version {found!r}, not {self.weights_name!r}")

    def close(self) -> None:
        """Ends waiting for the server, and takes back what is left of this run: the adapter on the server, the files in the folder."""
        self.server.closed.set()
        if not self.accelerator.is_main_process:
            return
        if self.name != self.config.model.name_or_path:
            with suppress(UserError):  # a server that is gone has none
                self.server.unload_adapter(self.name)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- sending -----------------------------------------------------------------------------------------------------------------------

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
                causal_lm.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
                if old != self.config.model.name_or_path:
                    self.server.unload_adapter(old)
                self.server.load_adapter(name, str(folder))
            else:
                dtype = SERVER_DTYPES[self.server.dtype]
                save_file(
                    {key: _own_copy(tensor, dtype) for key, tensor in weights.items()},
                    folder / "model.safetensors",
                    metadata={"format": "pt"},
                )
                self.server.reload_weights(str(folder), name)
            for older in self.folder.iterdir():
                if older != folder or not isinstance(causal_lm, PeftModel):  # an adapter may be read again
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
            error = (
                f"vllm.weight_sync: nccl: the weights did not get to the vLLM server at {self.server.url}: {problem}"
            )
        agree(self.accelerator, error)

    def _open_transfer(self):
        if self.accelerator.device.type != "cuda":
            raise UserError(
                "vllm.weight_sync: nccl goes from GPU to GPU, and this process runs on the CPU; set it to files"
            )
        try:
            from .nccl_transfer import open_transfer
        except ImportError as error:
            raise UserError(
                f"vllm.weight_sync: nccl needs vllm beside the trainer: pip install vllm==0.32.0 ({error})"
            ) from None
        num_gpus = self._on_main(lambda: self.server.call("/get_world_size")["world_size"])
        causal_lm = self.accelerator.unwrap_model(self.policy).causal_lm
        return open_transfer(
            self.accelerator,
            causal_lm,
            self.server.url,
            num_gpus,
            SERVER_DTYPES[self.server.dtype],
            self.config.vllm.request_timeout,
        )

    def _clean_folder(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"vllm.sync_folder: {self.folder.parent} cannot be written: {error.strerror}") from None

    def _on_main(self, action):
        """action() on the main process, its result on all; its error an AgreedError on all."""
        result, error = None, None
        if self.accelerator.is_main_process:
            try:
                result = action()
            except (UserError, ForgottenWeights) as problem:
                error = str(problem)
            except OSError as problem:
                free = f"{shutil.disk_usage(self.folder.parent).free / 2**30:.1f} GB free there"
                error = f"vllm.sync_folder: the weights cannot be written to {self.folder}: {problem} ({free})"
        result, error = broadcast_object_list([result, error])
        if error is not None:
            raise AgreedError(error)
        return result

    # --- proving -----------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _own_scores(self, sampled: list[int]) -> tuple[Tensor, Tensor]:
        """The trainer's log-probs of the probe (at temperature 1) and of tokens sampled behind it (at the sampling temperature)."""
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

    def _prove(self, before: Tensor | None = None, expected: Tensor | None = None) -> None:
        """Scores the probe on both sides. before, expected: the trainer's scores before the change that was sent, and with it (at the start)."""
        temperature, tolerance = self.config.ebft.temperature, self.config.vllm.sync_tolerance
        given, sampled, logprobs = self._on_main(
            lambda: self.server.score(self.name, self.probe, PROBE_SAMPLED, temperature)
        )
        own_given, own_sampled = self._own_scores(sampled)
        given = torch.tensor(given)
        gap, sampled_gap = (
            (given - own_given).abs().mean().item(),
            (torch.tensor(logprobs) - own_sampled).abs().mean().item(),
        )
        where = f"the vLLM server at {self.server.url}"
        if not gap <= tolerance:
            old_gap = None if before is None else (given - before).abs().mean().item()
            if old_gap is not None and old_gap <= tolerance:
                reason = "it answers with the weights of before: what is sent does not take effect there"
            elif old_gap is not None:
                reason = "it has neither the weights of before nor those that were sent: another model or precision, or only a part of the weights has arrived"
            else:
                reason = "it has old weights, or only a part of the new ones"
            raise AgreedError(
                f"{where} and the trainer do not have the same weights: their log-probs of one text differ by {gap:.3g} nats per token, more than vllm.sync_tolerance {tolerance:g}; "
                f"{reason}. {START_IT}"
            )
        if not sampled_gap <= tolerance:
            raise AgreedError(
                f"{where} and the trainer agree on a text, and not on sampled tokens: their log-probs at temperature {temperature:g} differ by {sampled_gap:.3g} nats "
                f"per token, more than vllm.sync_tolerance {tolerance:g}; the server samples from another distribution than it is asked to. {START_IT}"
            )

    @contextmanager
    def _changed_weights(self, plain: Tensor):
        """Inside, the trained weights are changed so much that the probe shows it; gives the trainer's scores with them. Afterwards they are what they were, bit for bit."""
        trained = [
            (name, _local(parameter)) for name, parameter in self.policy.named_parameters() if parameter.requires_grad
        ]
        if self.config.lora is not None:
            trained = [
                (name, weight) for name, weight in trained if "lora_B" in name
            ]  # zero at the beginning: without them an adapter changes nothing
        kept = [weight.detach().clone() for _, weight in trained]
        try:
            for scale in CANARY_SCALES:
                for index, ((_, weight), original) in enumerate(zip(trained, kept, strict=True)):
                    sign = 1 if index % 2 else -1
                    weight.data.copy_(
                        original + scale if self.config.lora is not None else original * (1 + sign * scale)
                    )
                changed = self._own_scores([])[0]
                if (changed - plain).abs().mean() > 5 * self.config.vllm.sync_tolerance:
                    break
            else:
                raise AgreedError(
                    f"vllm.sync_tolerance: {self.config.vllm.sync_tolerance:g} is so high that no change of the weights could be noticed; lower it"
                )
            yield changed
        finally:
            for (_, weight), original in zip(trained, kept, strict=True):
                weight.data.copy_(original)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _own_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """For safetensors, which refuses tensors that share memory (embedding and head)."""
    return tensor.to(dtype, copy=True).contiguous()
