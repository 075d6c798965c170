"""The final model: written under a temporary name, and renamed when it is complete."""

import io
from contextlib import redirect_stderr
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..config.modes import Config
from ..config.settings import UserError
from ..models import DTYPES, load_causal_lm, resolve_source
from .checkpoint import free_space
from .folders import writing


def whole_state(config: Config, policy: torch.nn.Module) -> dict[str, Tensor]:
    """The trained weights by the names of transformers and peft, whole, on the main process.

    Under FSDP2 the other processes get none. Tied weights appear under each of their names.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=config.lora is not None)
    state = get_model_state_dict(policy, options=options)
    return {name.removeprefix("causal_lm."): tensor for name, tensor in state.items()}


def export_final(config: Config, accelerator: Accelerator, policy: torch.nn.Module, tokenizer, card: str) -> Path:
    """Writes <output_dir>/final: the model (or adapter) for `from_pretrained`, tokenizer, configuration, model card.

    The adapter of a GGUF model gets an ordinary copy of that model (final/base_model), because peft cannot load the
    adapter onto the file. With lora.merge there is also final/merged, the model with the adapter merged in (in float32,
    then rounded to model.dtype).
    """
    target = Path(config.train.output_dir).expanduser().resolve() / "final"
    weights = whole_state(config, policy)
    causal_lm = accelerator.unwrap_model(policy).causal_lm
    if accelerator.is_main_process:
        unique = dict(causal_lm.named_parameters())
        tied = dict(causal_lm.named_parameters(remove_duplicate=False)).keys() - unique.keys()
        weights = {name: tensor for name, tensor in weights.items() if name not in tied}
        try:
            with writing(target) as temporary:
                if isinstance(causal_lm, PeftModel):
                    _export_adapter(config, causal_lm, weights, tokenizer, temporary, target)
                else:
                    causal_lm.save_pretrained(temporary, state_dict=weights)
                tokenizer.save_pretrained(temporary)
                (temporary / "training_config.yaml").write_text(config.to_yaml())
                (temporary / "README.md").write_text(card)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{target} could not be written: {error} ({free_space(target.parent)}); "
                "the checkpoints are whole: train.resume=latest writes it again"
            ) from None
    accelerator.wait_for_everyone()
    return target


def _export_adapter(
    config: Config, causal_lm: PeftModel, weights: dict[str, Tensor], tokenizer, folder: Path, target: Path
) -> None:
    """Writes an adapter into a folder, which will be renamed to target."""
    is_gguf = resolve_source(config.model.name_or_path)[1] is not None
    if is_gguf:
        causal_lm.peft_config["default"].base_model_name_or_path = str(target / "base_model")
    causal_lm.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    if not is_gguf and not config.lora.merge:
        return
    bars = redirect_stderr(io.StringIO())  # those of a GGUF file were shown when the policy was read
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"), bars:
        base = load_causal_lm(config.model, torch.float32)
    if is_gguf:
        base.to(DTYPES[config.model.dtype]).save_pretrained(folder / "base_model")
        tokenizer.save_pretrained(folder / "base_model")
        base.float()
    if config.lora.merge:
        merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
        merged.to(DTYPES[config.model.dtype]).save_pretrained(folder / "merged")
        tokenizer.save_pretrained(folder / "merged")
