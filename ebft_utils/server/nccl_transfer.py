"""Sends all weights to a vLLM server from GPU to GPU, with vLLM's own NCCL transfer.

It is imported only with vllm.weight_sync: nccl, because it needs vllm beside the trainer.
"""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.tensor import DTensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_ip, get_open_port

from ..text_decoders import served_name


class PolicySource(WeightSource):
    """The policy's weights under the names of its checkpoint, whole, in the server's precision.

    A tied head is sent under its own name too (weight_sync.py says why).
    """

    def __init__(self, causal_lm: torch.nn.Module, dtype: torch.dtype):
        parameters = causal_lm.named_parameters(remove_duplicate=False)
        self.parameters = [(served_name(causal_lm, name), parameter) for name, parameter in parameters]
        self.dtype = dtype

    def metadata(self) -> list[ParamMeta]:
        """Names, precision and shapes, in the order of iteration."""
        return [ParamMeta(name, self.dtype, tuple(parameter.shape)) for name, parameter in self.parameters]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters:
            whole = parameter.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()  # all processes together
            yield name, whole.to(self.dtype).contiguous()


def open_transfer(
    accelerator: Accelerator,
    causal_lm: torch.nn.Module,
    url: str,
    num_server_gpus: int,
    dtype: torch.dtype,
    timeout: float,
) -> TrainerWeightTransferEngine:
    """The connection. All processes call its send_weights().

    The trainer's first GPU is rank 0 of a group with the server's GPUs.
    """
    local = any(name in url for name in ("//127.0.0.1", "//localhost", "//[::1]"))
    address, port = broadcast_object_list(["127.0.0.1" if local else get_ip(), get_open_port()])
    init = NCCLTrainerInitInfo(
        rank=accelerator.process_index, master_address=address, master_port=port, world_size=num_server_gpus + 1
    )
    client = HTTPVLLMWeightSyncClient(url, timeout)
    return WeightTransferTrainerFactory.trainer_init(init, client=client, source=PolicySource(causal_lm, dtype))
