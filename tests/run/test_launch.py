"""Several processes and other launches: refused where they would quietly be something else, stopped together, resumed.

What accelerate tells its processes is computed in this process. Runs of several processes are real launches with the
shipped accelerate configs.
"""

import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

import train_strided
from ebft_utils import models
from ebft_utils.config.modes import load_config
from ebft_utils.config.settings import UserError
from ebft_utils.run import checkpoint, distributed
from helpers import (
    ROOT,
    all_started,
    assert_equal_weights,
    assert_holds,
    assert_same_weights,
    end_of,
    error_of,
    steps_of,
    training,
    wait_for,
    weights,
)

CONFIGS = ROOT / "accelerate_configs"
TWO_PROCESSES = ("--num_processes", "2")


# ----------------------------------------------------------------------------------------------------------------------
# Several processes: full disks, non-finite numbers, processes that die


TWO = dict(train__max_steps=6, train__per_device_batch_size=1, train__learning_rate=1e-2, eval__num_documents=0)
TWO["train__save_steps"] = 2
KINDS = pytest.mark.parametrize("config", ["ddp", "fsdp2"])
FULL_DISK = """
save = checkpoint.save_checkpoint
def save_on_full_disk(config, accelerator, policy, optimizer, run, **options):
    if run.step == 4 and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
    return save(config, accelerator, policy, optimizer, run, **options)
checkpoint.save_checkpoint = save_on_full_disk
"""


@KINDS
def test_disk_full_on_one_process(start, train, write_config, tmp_path, config):
    """Guards against a process that waits for one whose disk is full, and a checkpoint of which a part is missing."""
    code, output = end_of(start(config, write_config(**TWO), sabotage=FULL_DISK))
    assert code != 0 and "Traceback" not in output.partition("error: ")[0]
    words = ("could not be written", "checkpoint-2 is whole", "train.resume=latest")
    assert_holds(error_of(output), tmp_path / "run" / "checkpoint-4", *words)
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-2"]
    train("run", "train.resume=latest", **TWO)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


@KINDS
def test_non_finite_loss_on_one_process(start, write_config, tmp_path, config):
    """Guards against one process that stops and others that go on, or wait; and against NaN in what is saved."""
    code, output = end_of(start(config, write_config(**TWO), sabotage="if rank == 1: at_step(4, lambda: float('nan'))"))
    assert code != 0
    assert_holds(error_of(output), "step 4", "not finite", "before the update", "checkpoint-3", "train.learning_rate")
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-3"
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    assert all_started(tmp_path) == []


@KINDS
def test_a_process_that_dies(start, train, write_config, tmp_path, config):
    """Guards against processes that wait for one that is gone, and against losing what can be saved without it."""
    dies = "if rank == 1: at_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))"
    process = start(config, write_config(**TWO), sabotage=dies)
    wait_for(process, lambda: len(all_started(tmp_path)) >= 3)
    wait_for(process, lambda: (tmp_path / "run" / "metrics.jsonl").exists() and steps_of(tmp_path / "run")[-1:] == [3])
    code, output = end_of(process, within=60)
    assert code != 0 and all_started(tmp_path) == []
    last = "checkpoint-3" if config == "ddp" else "checkpoint-2"
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1].name == last
    if config == "fsdp2":
        assert "the last checkpoint is of step 2" in output
    train("run", "train.resume=latest", **TWO)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


# ----------------------------------------------------------------------------------------------------------------------
# Signals


LONG = dict(train__max_steps=30, train__per_device_batch_size=1, train__learning_rate=1e-2, eval__num_documents=0)


def has_logged(run: Path, num_steps: int):
    """For wait_for: whether the run has logged that many steps."""
    return lambda: (run / "metrics.jsonl").exists() and len(steps_of(run)) >= num_steps


@KINDS
def test_signals_stop_all_processes(start, write_config, tmp_path, config):
    """Guards against a signal that loses steps, leaves other processes waiting, or ends like a finished run.

    It comes to one process, or to the launcher.
    """
    file, run = write_config(**LONG), tmp_path / "run"
    assert end_of(start(config, file, f"train.output_dir={tmp_path / 'whole'}"))[0] == 0
    for number, at_launcher in ((signal.SIGUSR1, False), (signal.SIGTERM, True)):
        done = steps_of(run)[-1] if run.exists() else 0
        process = start(config, file, *(["train.resume=latest"] if done else []))
        wait_for(process, has_logged(run, done + 3))
        (worker,) = [worker for worker in psutil.Process(process.pid).children() if worker.environ().get("RANK") == "1"]
        os.kill(process.pid if at_launcher else worker.pid, number)
        code, output = end_of(process)
        assert code != 0 and f"stopped by {number.name}" in output and "train.resume=latest" in output
        assert all_started(tmp_path) == []
        (saved,) = run.glob("checkpoint-*") if not done else [checkpoint.list_checkpoints(run)[-1]]
        assert saved.name == f"checkpoint-{steps_of(run)[-1]}" and done + 3 <= steps_of(run)[-1] < 30
    assert end_of(start(config, file, "train.resume=latest"))[0] == 0
    assert_equal_weights(run, tmp_path / "whole")
    assert training(run) == training(tmp_path / "whole")


@pytest.mark.parametrize("config, number", [("cpu", signal.SIGTERM), ("ddp", signal.SIGKILL)])
def test_a_launcher_that_dies_leaves_no_orphans(start, write_config, tmp_path, config, number):
    """Guards against processes that train on after their launcher.

    On a GPU that somebody else is given, in a folder that stays locked.
    """
    run = tmp_path / "run"
    options = () if config == "cpu" else TWO_PROCESSES
    process = start(config, write_config(**{**LONG, "train__max_steps": 100_000}), options=options)
    wait_for(process, has_logged(run, 3))
    os.kill(process.pid, number)
    process.wait(30)
    assert psutil.wait_procs(all_started(tmp_path), timeout=30)[1] == []
    assert "stopped by SIGTERM" in process.output.read_text()
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{steps_of(run)[-1]}"]


# ----------------------------------------------------------------------------------------------------------------------
# Launches


def launch_environment(config: Path, *options: str) -> dict[str, str]:
    """What `accelerate launch` tells its processes."""
    command = ["--config_file", str(config), *options, "train_strided.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    several = arguments.multi_gpu or arguments.use_fsdp
    environment = prepare_multi_gpu_env(arguments) if several else prepare_simple_launcher_cmd_env(arguments)[1]
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """launched("fsdp2", fsdp_version=1): this process, as a shipped accelerate config with these changes starts it."""

    def launch(config: str, *options: str, **changes) -> None:
        tree = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
        for key, value in changes.items():
            (tree["fsdp_config"] if key.startswith("fsdp_") else tree)[key] = value
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump(tree))
        monkeypatch.delenv("ACCELERATE_USE_CPU")
        for name, value in launch_environment(tmp_path / "launch.yaml", *options).items():
            monkeypatch.setenv(name, value)

    return launch


FSDP_SETTINGS = [
    ("fsdp_version", 1, ["fsdp_version: 1", "fsdp_version: 2"]),
    ("fsdp_activation_checkpointing", True, ["fsdp_activation_checkpointing", "model.gradient_checkpointing: true"]),
    ("fsdp_offload_params", True, ["fsdp_offload_params: true"]),
    ("fsdp_auto_wrap_policy", "NO_WRAP", ["fsdp_auto_wrap_policy: NO_WRAP", "TRANSFORMER_BASED_WRAP"]),
    ("fsdp_auto_wrap_policy", "SIZE_BASED_WRAP", ["fsdp_auto_wrap_policy: SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"]),
    ("fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", ["fsdp_transformer_layer_cls_to_wrap", "leave it out"]),
    ("fsdp_ignored_modules", ".*embed_tokens", ["fsdp_ignored_modules", "would not be reduced"]),
    ("fsdp_state_dict_type", "FULL_STATE_DICT", ["fsdp_state_dict_type: FULL_STATE_DICT", "SHARDED_STATE_DICT"]),
]


@pytest.mark.parametrize("key, value, words", FSDP_SETTINGS)
def test_fsdp_settings_that_are_refused(launched, key, value, words):
    """Guards against settings of an accelerate config that would quietly do nothing, or something else."""
    launched("fsdp2", **{key: value})
    with pytest.raises(UserError) as caught:
        distributed._refuse_fsdp_settings()
    assert_holds(str(caught.value), "accelerate config", *words)


BF16, INDUCTOR = {"mixed_precision": "bf16"}, {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}
SEVERAL_WORDS = ["num_processes", "silently starts one process", "accelerate_configs/ddp.yaml"]
BF16_WORDS = ["mixed_precision: bf16", "contradicts model.dtype: float32", "mixed_precision: 'no'"]
WRONG_LAUNCHES = {  # accelerate config, options, changes of the config, words of the message
    "several processes on the CPU": ("cpu", TWO_PROCESSES, {}, SEVERAL_WORDS),
    "no GPU": ("single_gpu", (), {}, ["use_cpu: false", "no GPU is visible", "python train_strided.py"]),
    "precision": ("cpu", (), BF16, BF16_WORDS),
    "dynamo": ("cpu", (), INDUCTOR, ["dynamo_backend: INDUCTOR", "leave it out"]),
}


@pytest.mark.parametrize("case", WRONG_LAUNCHES.values(), ids=WRONG_LAUNCHES)
def test_launches_that_are_refused(launched, refused, write_config, monkeypatch, tmp_path, case):
    """Guards against a launch that is quietly another one.

    One process, the CPU, another precision, or a loss that is divided twice.
    """
    config, options, changes, words = case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launched(config, *options, **changes)
    assert_holds(refused("--cfg", write_config()), *words)
    assert not (tmp_path / "run").exists()


def test_launch_that_is_not_refused(launched, command, write_config):
    """Guards against refusing the configuration for one process on the CPU that the messages recommend."""
    launched("cpu")
    assert command("--cfg", write_config(train__max_steps=1, eval__num_documents=0))[0] == 0


BATCH_WORDS = ["train.batch_size", "3 rows", "2 processes x train.per_device_batch_size 1"]
BATCH_WORDS += ["the nearest that can: 2 or 4"]
NO_GPU_WORDS = ["no GPU is visible", "ACCELERATE_USE_CPU=true", "ddp.yaml"]
WRONG_REAL_LAUNCHES = {  # accelerate config, on the CPU or not, override, words of the message
    "FSDP2 without a GPU": ("fsdp2", False, "train.seed=0", NO_GPU_WORDS),
    "DDP without a GPU": ("ddp", False, "train.seed=0", NO_GPU_WORDS),
    "batch of 3 on 2": ("ddp", True, "train.batch_size=3", BATCH_WORDS),
}


@pytest.mark.parametrize("config, on_cpu, override, words", WRONG_REAL_LAUNCHES.values(), ids=WRONG_REAL_LAUNCHES)
def test_real_launches_that_are_refused(start, write_config, tmp_path, config, on_cpu, override, words):
    """Guards against processes that each train alone, or unsharded, where several were asked for.

    The refusal comes before any work.
    """
    code, output = end_of(start(config, write_config(**TWO), override, on_cpu=on_cpu))
    assert code != 0
    assert_holds(error_of(output), *words)
    assert not (tmp_path / "run").exists() and all_started(tmp_path) == []


@pytest.mark.parametrize(
    "batch, at_once, processes, near",
    [(3, 1, 2, "2 or 4"), (8, 4, 3, "12"), (8, 1, 3, "6 or 9"), (8, 2, 2, None), (6, 1, 3, None)],
)
def test_batches_that_cannot_be_split(write_config, batch, at_once, processes, near):
    """Guards against rows that are dropped, or trained on twice, and a remedy that is refused as well."""
    values = dict(train__batch_size=batch, train__per_device_batch_size=at_once)
    config, _ = train_strided.parse_command_line(["--cfg", str(write_config(**values))], "")
    accelerator = SimpleNamespace(num_processes=processes)
    if near is None:
        assert distributed.micro_batches_per_step(config, accelerator) == batch // at_once // processes
        return
    with pytest.raises(UserError) as caught:
        distributed.micro_batches_per_step(config, accelerator)
    words = ("train.batch_size", f"{batch} rows", f"{processes} processes x train.per_device_batch_size {at_once}")
    assert_holds(str(caught.value), *words)
    assert str(caught.value).endswith(f"the nearest that can: {near}")
    for value in near.split(" or "):
        config.train.batch_size = int(value)
        assert distributed.micro_batches_per_step(config, accelerator) >= 1


LORA, SHARD, ON_CPU = {"lora": {"r": 4}}, {"feature_network__shard": True}, {"feature_network__device": "cpu"}
SIX_BY_FOUR = {"train__batch_size": 6, "train__per_device_batch_size": 4}
SIX_BY_FOUR_WORDS = ["train.batch_size", "6 rows", "no multiple", "train.per_device_batch_size 4"]
ACCUMULATION_WORDS = ["train.gradient_accumulation_steps", "unknown key", "train.batch_size"]
SHARD_LORA_WORDS = ["feature_network.shard", "lora", "leave the section feature_network out"]
WRONG_SETTINGS = [
    (SIX_BY_FOUR, [], SIX_BY_FOUR_WORDS),
    ({"train__gradient_accumulation_steps": 4}, [], ACCUMULATION_WORDS),
    (SHARD, [], ["feature_network.shard", "accelerate_configs/fsdp2.yaml"]),
    ({**SHARD, **LORA}, [], SHARD_LORA_WORDS),
    ({**ON_CPU, **LORA}, [], ["feature_network.device", "lora"]),
    ({**ON_CPU, **SHARD}, [], ["feature_network.shard", "feature_network.device is cpu"]),
    ({"feature_network__device": "gpu"}, [], ["feature_network.device", "'gpu'", "auto | cpu | cuda:0"]),
    ({"feature_network__device": "cuda:1"}, [], ["feature_network.device", "cuda:1", "sees 0 GPUs"]),
]


@pytest.mark.parametrize("changes, arguments, words", WRONG_SETTINGS)
def test_settings_that_are_refused(refused, write_config, monkeypatch, changes, arguments, words):
    """Guards against settings that would quietly do nothing."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert_holds(refused("--cfg", write_config(**changes), *arguments), *words)


def test_device_of_the_feature_network(monkeypatch):
    """Guards against a copy on the policy's own GPU while a second one idles.

    Several processes must not put theirs on each other's.
    """
    policy, cpu = torch.device("cuda", 0), torch.device("cpu")

    def processes_and_gpus(processes: int, gpus: int) -> None:
        monkeypatch.setattr(models, "PartialState", lambda: SimpleNamespace(num_processes=processes))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    for processes, gpus, choice, expected in (
        (1, 2, "auto", "cuda:1"),
        (1, 1, "auto", "cuda:0"),
        (2, 2, "auto", "cuda:0"),
        (1, 2, "cuda:1", "cuda:1"),
        (1, 2, "cpu", "cpu"),
    ):
        processes_and_gpus(processes, gpus)
        assert models.feature_device(choice, policy) == torch.device(expected)
    assert models.feature_device("auto", torch.device("cuda", 1)) == torch.device("cuda", 0)
    assert models.feature_device("auto", cpu) == cpu
    for processes, choice, words in (
        (1, "cuda:2", ["cuda:2", "sees 2 GPUs"]),
        (2, "cuda:1", ["cuda:1", "2 processes", "auto or cpu"]),
    ):
        processes_and_gpus(processes, 2)
        with pytest.raises(UserError) as caught:
            models.feature_device(choice, policy)
        assert_holds(str(caught.value), "feature_network.device", *words)


def test_more_processes_than_gpus(launched, write_config, monkeypatch):
    """Guards against 'invalid device ordinal' where a shipped config says 8 and the machine has fewer."""
    launched("ddp")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError) as caught:
        distributed.prepare_accelerator(load_config(str(write_config())))
    assert_holds(str(caught.value), "8 processes", "4 GPUs", "--num_processes 4")


@pytest.mark.parametrize(
    "config, kind, processes, machines",
    [
        ("cpu", "NO", 1, 1),
        ("single_gpu", "NO", 1, 1),
        ("ddp", "MULTI_GPU", 8, 1),
        ("fsdp2", "FSDP", 8, 1),
        ("multi_node", "FSDP", 16, 2),
    ],
)
def test_shipped_accelerate_configs(launched, config, kind, processes, machines):
    """Guards against a key that accelerate does not know, or reads as something else."""
    read = load_config_from_file(str(CONFIGS / f"{config}.yaml"))
    assert (read.distributed_type.value, read.num_processes, read.num_machines) == (kind, processes, machines)
    assert read.use_cpu == (config == "cpu")
    launched(config)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    assert os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") == "1"
    assert (os.environ.get("ACCELERATE_USE_FSDP") == "true") == (kind == "FSDP")
    if kind == "FSDP":
        plugin = FullyShardedDataParallelPlugin()
        distributed._refuse_fsdp_settings()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True and plugin.cpu_ram_efficient_loading is True


def test_two_machines(start, train, write_config, tmp_path):
    """Guards against ranks, addresses or an output folder that only fit one machine."""
    changes = {**TWO, "train__max_steps": 2, "train__learning_rate": 1e-3}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    file = write_config(**changes)
    options = ("--num_machines", "2", *TWO_PROCESSES, "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    machines = [start("multi_node", file, options=(*options, "--machine_rank", str(rank))) for rank in range(2)]
    for machine in machines:
        code, output = end_of(machine)
        assert code == 0, output[-3000:]
    assert "2 processes on cpu, FSDP2" in machines[0].output.read_text()
    assert_same_weights(weights(tmp_path / "run"), weights(train("one", **changes)), tolerance=1e-5, share=1e-2)
