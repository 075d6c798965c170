"""What a run runs on: one process, DDP or FSDP2, as the accelerate config says.

A run is refused where accelerate would silently do something else. Every process calls every function here, because
most of them communicate.
"""

import ctypes
import os
import signal
import sys
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..algorithm.attention import STRIDED_BLOCKS
from ..algorithm.features import FeatureNetwork
from ..algorithm.flex import STRIDED_FLEX
from ..config.modes import Config
from ..config.settings import UserError
from ..models import DTYPES, feature_device

PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>: sets the signal that a process gets when its parent ends
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MIXED_PRECISION = {"bfloat16": "bf16", "float32": "no"}  # model.dtype -> accelerate's name


# ----------------------------------------------------------------------------------------------------------------------
# The accelerator


def prepare_accelerator(config: Config) -> Accelerator:
    """The accelerator, with the precision of model.dtype. Raises UserError for launch settings that would not hold."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    _refuse_contradicting_launch(config)
    if fsdp:
        _refuse_fsdp_settings()
    handlers = [
        InitProcessGroupKwargs(timeout=timedelta(minutes=config.train.process_timeout_minutes)),
        DistributedDataParallelKwargs(broadcast_buffers=False),  # buffers are constants
    ]
    for tracker in config.train.report_to:
        if tracker not in map(str, get_available_trackers()):
            raise UserError(f"train.report_to: {tracker} is not installed: pip install {tracker.replace('_', '-')}")
    logs = Path(config.train.output_dir).expanduser().resolve() / "tensorboard"
    accelerator = Accelerator(
        cpu=torch.backends.mps.is_available(),  # accelerate would take Apple's GPUs, which have no float64
        mixed_precision=MIXED_PRECISION[config.model.dtype],
        kwargs_handlers=handlers,
        log_with=config.train.report_to,
        project_config=ProjectConfiguration(logging_dir=str(logs)),
    )
    kind = accelerator.distributed_type
    # it makes a plan for each new shape, and NaN gradients with masks at some lengths are reported of it
    torch.backends.cuda.enable_cudnn_sdp(False)
    _refuse_missing_gpus(accelerator)
    if fsdp and kind != DistributedType.FSDP:
        raise UserError(
            "distributed_type: FSDP in the accelerate config would silently run unsharded here (on the CPU, or as one "
            "process); one process: python train_strided.py .., several: accelerate_configs/ddp.yaml"
        )
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        allowed = "NO, MULTI_GPU, FSDP"
        raise UserError(f"distributed_type: {kind.value} in the accelerate config is not supported; allowed: {allowed}")
    feature_device(config.feature_network.device, accelerator.device)  # raises UserError for a device that is missing
    if kind == DistributedType.FSDP:
        # accelerate's own policy would reduce gradients, and return log-probs, in bfloat16.
        # Inputs are not cast: uniform random numbers in bfloat16 would repeat.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[config.model.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if config.model.compile_decoding:
            raise UserError(
                "model.compile_decoding: true and FSDP2 exclude each other: it gathers and frees weights in the "
                "middle of what would be compiled; leave it out"
            )
    elif config.feature_network.shard:
        launch = "--config_file accelerate_configs/fsdp2.yaml"
        raise UserError(f"feature_network.shard: true needs a launch that shards: {launch}")
    return accelerator


def _refuse_contradicting_launch(config: Config) -> None:
    """Refuses settings that accelerate passes on in environment variables and that this program would not honour."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", MIXED_PRECISION[config.model.dtype]):
        raise UserError(
            f"mixed_precision: {launched} in the accelerate config contradicts model.dtype: {config.model.dtype}; "
            "set mixed_precision: 'no' there"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            f"gradient_accumulation_steps: {steps} in the accelerate config would divide the loss once more; "
            "leave it out there: accumulation follows from train.batch_size"
        )
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < gpus < processes and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        raise UserError(
            f"num_processes: {processes} processes were launched on a machine with {gpus} GPUs; "
            f"launch with --num_processes {gpus}"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UserError(f"dynamo_backend: {backend} in the accelerate config is not supported; leave it out there")
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        raise UserError(
            "parallelism_config in the accelerate config is not supported; leave it out there: "
            "FSDP2 shards over all processes"
        )
    if {"MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "num_processes: accelerate launch silently starts one process where distributed_type is 'NO'; several "
            "processes on the CPU: ACCELERATE_USE_CPU=true accelerate launch --config_file "
            "accelerate_configs/ddp.yaml --num_processes 2 .. (If one process is what you want: unset MASTER_ADDR "
            "and MASTER_PORT.)"
        )


def _refuse_missing_gpus(accelerator: Accelerator) -> None:
    """Refuses accelerate's fallbacks: to the CPU where there is no GPU, and to several runs of one process each."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "unsaid").lower()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.device.type == "cpu" and (asked == "false" or (asked == "unsaid" and launched > 1)):
        raise UserError(
            "no GPU is visible, and the accelerate config wants one (use_cpu: false); on the CPU: python "
            "train_strided.py .., or for several processes ACCELERATE_USE_CPU=true accelerate launch --config_file "
            "accelerate_configs/ddp.yaml .."
        )
    if launched != accelerator.num_processes:
        raise UserError(
            f"num_processes: {launched} processes were launched, and accelerate would run each by itself; "
            "check num_processes and the GPUs that are visible"
        )


def _refuse_fsdp_settings() -> None:
    """Refuses FSDP settings that would not be honoured, or that would break the rollouts."""
    there = "in the accelerate config"
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"fsdp_version: {version} {there} is not supported; set fsdp_version: 2")
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        raise UserError(
            f"fsdp_activation_checkpointing: true {there}: leave it out there and set model.gradient_checkpointing: "
            "true, which does the same under every launch"
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise UserError(f"fsdp_offload_params: true {there} is not supported; leave it out there")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    if policy != "TRANSFORMER_BASED_WRAP":
        wrong = f"fsdp_auto_wrap_policy: {policy} {there} would not shard layer by layer"
        raise UserError(f"{wrong}; set TRANSFORMER_BASED_WRAP")
    if os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        raise UserError(
            f"fsdp_transformer_layer_cls_to_wrap {there}: leave it out there; "
            "the model's own decoder layers are sharded"
        )
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise UserError(
            f"fsdp_ignored_modules {there}: leave it out there; the gradients of ignored modules would not be reduced"
        )
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT").upper()
    if kind != "SHARDED_STATE_DICT":
        raise UserError(
            f"fsdp_state_dict_type: {kind} {there}: checkpoints are always sharded and the final model is always "
            "whole; set SHARDED_STATE_DICT"
        )


def micro_batches_per_step(config: Config, accelerator: Accelerator) -> int:
    """Forwards of one optimizer step on each process (gradient accumulation).

    Raises UserError when train.batch_size cannot be split evenly.
    """
    train, processes = config.train, accelerator.num_processes
    at_once = train.per_device_batch_size * processes
    if train.batch_size % at_once:
        below = train.batch_size // at_once * at_once
        near = f"{below} or {below + at_once}" if below else f"{at_once}"
        raise UserError(
            f"train.batch_size: {train.batch_size} rows cannot be split over {processes} processes x "
            f"train.per_device_batch_size {train.per_device_batch_size}; the nearest that can: {near}"
        )
    return train.batch_size // at_once


def main_process_first(accelerator: Accelerator, action):
    """Runs action() on the main process, then on the first process of each machine, then on the others.

    A UserError of the main process is raised on all, so that none waits for it.
    """
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = action()
        except UserError as problem:
            error = str(problem)
    (error,) = broadcast_object_list([error])
    if error is not None:
        raise UserError(error)
    with accelerator.local_main_process_first():
        return result if accelerator.is_main_process else action()


class AgreedError(UserError):
    """An error that all processes raise at the same place, so they can still act together, for example save."""


def agree(accelerator: Accelerator, error: str | None) -> None:
    """Raises AgreedError on all processes when one of them has an error."""
    errors = gather_object([error])
    message = next((message for message in errors if message is not None), None)
    if message is not None:
        raise AgreedError(message)


def together(accelerator: Accelerator, action):
    """Runs action() on all processes. A UserError of one of them is raised on all."""
    result, error = None, None
    try:
        result = action()
    except UserError as problem:
        error = str(problem)
    agree(accelerator, error)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# The prepared policy


def prepare_policy(accelerator: Accelerator, policy: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """Policy and optimizer, prepared for one process, DDP or FSDP2.

    Under FSDP2 each decoder layer is a unit, and the rest (embedding, norm, head) is one more.
    """
    policy, optimizer = accelerator.prepare(policy, optimizer)
    register_fsdp_forward_method(policy, "generate")
    if accelerator.distributed_type == DistributedType.FSDP:
        layers = accelerator.unwrap_model(policy).layers
        whole = sum(not isinstance(layer, FSDPModule) for layer in layers)
        if whole or not layers:
            raise UserError(
                "FSDP2: this architecture is not built of one list of decoder layers that could be sharded"
                if not layers
                else f"FSDP2: {whole} of {len(layers)} decoder layers would not be sharded"
            )
        if not all(isinstance(parameter, DTensor) for parameter in policy.parameters()):
            raise UserError(
                "FSDP2: some weights would not be sharded, and their gradients not reduced; "
                "use accelerate_configs/fsdp2.yaml as it is"
            )
    return policy, optimizer


@contextmanager
def whole_weights(accelerator: Accelerator, policy: torch.nn.Module):
    """Gathers the weights that FSDP2 has split, and keeps them: once for a whole rollout, not once for each token.

    All are gathered here, before an adapter is switched off inside: peft switches off the gradient of the parameters
    that it finds in the layers, and back on. Were they the split ones at first and the gathered ones at last, the split
    ones would stay without a gradient. It does nothing without FSDP2.
    """
    if not isinstance(policy, FSDPModule):
        yield
        return
    policy.set_reshard_after_forward(False)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    try:
        yield
    finally:
        policy.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)
        policy.set_reshard_after_forward(False, recurse=False)  # the backward pass uses the root's weights to its end
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def precision(accelerator: Accelerator, policy: torch.nn.Module) -> AbstractContextManager:
    """The precision of the prepared forward, for generation and features.

    This is autocast. Under FSDP2 it is nothing, because FSDP2 casts the weights themselves.
    """
    return nullcontext() if isinstance(policy, FSDPModule) else accelerator.autocast()


def gradient_sync(accelerator: Accelerator, policy: torch.nn.Module, last: bool) -> AbstractContextManager:
    """The context of a micro-batch's backward pass, which decides when gradients are summed over the processes.

    DDP sums them with the last micro-batch only. FSDP2 sums them with each, because gradients that wait would be whole
    on every process.
    """
    return nullcontext() if last or isinstance(policy, FSDPModule) else accelerator.no_sync(policy)


def clip_gradients(accelerator: Accelerator, policy: torch.nn.Module, max_norm: float) -> float:
    """Scales the gradients down to max_norm. Returns the norm before that, over all processes."""
    norm = accelerator.clip_grad_norm_(policy.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def describe_run(config: Config, accelerator: Accelerator, policy: torch.nn.Module, network: FeatureNetwork) -> str:
    """What this run runs on, in words."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    units = sum(isinstance(module, FSDPModule) for module in policy.modules())
    processes, dtype = accelerator.num_processes, config.model.dtype
    how = f", FSDP2 in {units} units" if units else ", DDP" if processes > 1 else ""
    if config.lora:
        features = "the policy with its adapter off"
    else:
        spread = "whole on each process" if processes > 1 else "a frozen copy"
        spread = "split over the processes" if config.feature_network.shard else spread
        features = f"{spread}, {dtype}, {network.device}"
    attention = accelerator.unwrap_model(policy).decoder.config._attn_implementation
    attention = {STRIDED_BLOCKS: "sdpa in blocks", STRIDED_FLEX: "flex_attention"}.get(attention, attention)
    if config.mode == "structured":
        attention += ", completions packed" if network.layout == "packed" else ", a row for each completion"
    compiled = ", decoding compiled" if config.model.compile_decoding else ""
    method = "LoRA" if config.lora else "full fine-tuning"
    num_weights = sum(parameter.numel() for parameter in trained)
    dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained}))
    at_once, times = config.train.per_device_batch_size, micro_batches_per_step(config, accelerator)
    return (
        f"{processes} process{'es' if processes > 1 else ''} on {accelerator.device.type}{how}; "
        f"forwards in {dtype}, attention: {attention}{compiled}\n"
        f"{method}: {num_weights:,} trained weights in {dtypes}; feature network: {features}\n"
        f"{config.train.batch_size} rows a step: {processes} x {at_once} at a time, {times} times"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Stopping


class Stopped(Exception):
    """The run was asked to stop by a signal, and has stopped. number: the signal's."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Inside, SIGINT, SIGTERM or SIGUSR1 asks the run to stop after its step, on all processes together.

    A second Ctrl-C ends it at once.
    """

    def __enter__(self) -> "StopSignals":
        self.received, self.at_once = 0, False
        self.before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if number == self.received == signal.SIGINT:  # not for the other signals: clusters may send them twice
            self.at_once = True
            raise KeyboardInterrupt
        self.received = number
        if os.environ.get("RANK", "0") == "0":  # written past Python's buffers, which may be in use
            again = "; Ctrl-C again: stop at once, without saving" * (number == signal.SIGINT)
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving{again}\n".encode())

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any process has received, 0 when none has: the same answer on each."""
        if accelerator.num_processes == 1:
            return self.received
        return int(accelerator.gather(torch.tensor([self.received], device=accelerator.device)).max())


def run_as_command(main) -> None:
    """Runs a script's main(argv). Ends the process with one message for an error that the user can mend."""
    process = int(os.environ.get("RANK", "0"))
    resume = "train.resume=latest goes on from the last checkpoint, where there is one"
    if sys.platform == "linux" and {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        # when the launcher dies, its processes save and stop
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    try:
        main(sys.argv[1:])
    except UserError as error:
        if process and not torch.distributed.is_initialized():
            # about the launch: the same on all processes of a machine, and the first one says it
            if os.environ.get("LOCAL_RANK", "0") != "0":
                sys.exit(1)
        elif process:
            time.sleep(5)  # usually the main process has printed the same by now, and the launcher ends this one
        sys.exit(f"error{f' on process {process}' if process else ''}: {error}")
    except Stopped as stopped:
        if not process:
            print(f"{stopped}; {resume}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {resume}")
