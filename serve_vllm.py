"""Starts the rollout server of train_structured.py: vLLM's own OpenAI server, configured by the same file.

    python serve_vllm.py --cfg examples/structured.yaml

It prints the command and replaces itself by it (--dry-run: only prints the arguments). None of this repository's code
runs in the server. What it adds to a plain `vllm serve`:
    log-probs at the sampling temperature       --logprobs-mode processed_logprobs
    no sampling defaults from the model         --generation-config vllm
    with a lora section, adapters               --enable-lora --max-lora-rank, VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
    weights that can be replaced                VLLM_SERVER_DEV_MODE=1; --weight-transfer-config with
                                                vllm.weight_sync: nccl
Of a GGUF file it serves the ordinary copy that the trainer reads too (model_files.plain_source), so both have the same
weights.

Whoever reaches the server's address can load other weights into it, without a key. So it listens on 127.0.0.1 unless
vllm.host says otherwise.
"""

import importlib.util
import json
import os
import shlex
import sys

from ebft_utils.config.command import check_command_line
from ebft_utils.config.modes import StructuredConfig, parse_command_line

if __name__ == "__main__":
    check_command_line(StructuredConfig, __doc__)  # before the imports that take seconds

from ebft_utils.config.settings import UserError
from ebft_utils.model_files import plain_source

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank allows
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def server_arguments(config: StructuredConfig, model: str) -> list[str]:
    """The arguments of vLLM's server. Raises UserError for an adapter that vLLM cannot serve."""
    vllm = config.vllm
    arguments = {
        "--model": model,
        "--served-model-name": config.model.name_or_path,
        "--host": vllm.host,
        "--port": vllm.port,
        "--dtype": vllm.dtype or config.model.dtype,
        "--max-model-len": vllm.max_model_len or config.longest_sequence[0],
        "--tensor-parallel-size": vllm.tensor_parallel_size,
        "--data-parallel-size": vllm.data_parallel_size,
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
    }
    if vllm.gpu_memory_utilization is not None:
        arguments["--gpu-memory-utilization"] = vllm.gpu_memory_utilization
    if config.model.revision is not None:
        arguments["--revision"] = config.model.revision
    if config.model.tokenizer is not None:
        arguments["--tokenizer"] = plain_source(config.model.tokenizer, "model.tokenizer")
    if vllm.weight_sync == "nccl":
        arguments["--weight-transfer-config"] = json.dumps({"backend": "nccl"})
    flags = ["--enforce-eager"] if vllm.enforce_eager else []
    if config.lora is not None:
        ranks = [rank for rank in ADAPTER_RANKS if rank >= config.lora.r]
        if not ranks:
            raise UserError(f"lora.r: {config.lora.r} is more than vLLM serves; allowed: up to {ADAPTER_RANKS[-1]}")
        arguments |= {"--max-lora-rank": ranks[0], "--max-loras": 1}
        flags.append("--enable-lora")
    return [str(part) for pair in arguments.items() for part in pair] + flags + vllm.extra_args


def main(argv: list[str]) -> None:
    """Becomes the server of a configuration."""
    config, dry_run = parse_command_line(argv, __doc__, StructuredConfig)
    if config is None:
        return
    model = plain_source(config.model.name_or_path)
    if dry_run:
        print(shlex.join(["vllm", "serve", *server_arguments(config, model)]))
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vllm is not installed here: pip install vllm==0.32.0 (on a machine without a GPU: see examples/README.md, "
            "'Structured mode with a vLLM server')"
        )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *server_arguments(config, model)]
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if config.lora is not None:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    # not an argument: everybody on the machine can read those
    secret = {"VLLM_API_KEY": config.vllm.api_key} if config.vllm.api_key else {}
    shown = [f"{name}={value}" for name, value in environment.items()] + [f"{name}=..." for name in secret]
    print(" ".join([*shown, shlex.join(command)]), flush=True)
    if config.vllm.host not in LOOPBACK:
        guarded = ", and use the model: no vllm.api_key is set"
        if secret or "VLLM_API_KEY" in os.environ:
            guarded = "; vllm.api_key guards only the endpoints under /v1"
        print(
            f"WARNING: vllm.host {config.vllm.host} is not this machine alone. Everybody who reaches port "
            f"{config.vllm.port} can replace the model's weights, load files as adapters and call the workers' methods"
            f"{guarded}. Let only the trainer through the firewall.",
            flush=True,
        )
    os.execve(command[0], command, {**os.environ, **environment, **secret})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
