"""The final model: written under a temporary name, and renamed when it is complete."""

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from huggingface_hub import ModelCardData
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..config.modes import Config
from ..config.settings import UserError
from ..data.sources import is_local
from ..model_files import resolve_source
from ..models import DTYPES, load_causal_lm
from ..text_decoders import card_of_adapter, save_adapter, with_saved_adapter
from .checkpoint import free_space
from .folders import writing

HUB_ID = r"[\w.-]+/[\w.-]+"


def whole_state(config: Config, policy: torch.nn.Module) -> dict[str, Tensor]:
    """The trained weights by the names of transformers and peft, whole, on the main process.

    Under FSDP2 the other processes get none. Tied weights appear under each of their names.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=config.lora is not None)
    state = get_model_state_dict(policy, options=options)
    return {name.removeprefix("causal_lm."): tensor for name, tensor in state.items()}


def export_final(config: Config, accelerator: Accelerator, policy: torch.nn.Module, tokenizer, card: str) -> Path:
    """Writes <output_dir>/final: what `from_pretrained` loads, with tokenizer, configuration and model card.

    That is the model, or the adapter of a LoRA run. With lora.merge it is the model with the adapter merged into its
    weights (in float32, then rounded to model.dtype), and final/adapter is the adapter alone. The base of an adapter is
    named in it, so a GGUF file, which peft cannot load an adapter onto, is always merged.
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
                if merges(config):
                    _export_merged(config, causal_lm, weights, temporary)
                elif isinstance(causal_lm, PeftModel):
                    _export_adapter(config, causal_lm, weights, temporary)
                    card = card_of_adapter(causal_lm, card)
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


def merges(config: Config) -> bool:
    """Whether final/ is the model with its adapter merged in. Raises UserError where the adapter alone is of no use."""
    if config.lora is None:
        return False
    is_gguf = resolve_source(config.model.name_or_path)[1] is not None
    if is_gguf and config.lora.merge is False:
        raise UserError(
            f"lora.merge: false with the GGUF file of {config.model.name_or_path!r}: nothing can load an adapter onto "
            "it; leave lora.merge out"
        )
    return is_gguf if config.lora.merge is None else config.lora.merge


def _export_adapter(config: Config, causal_lm: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes an adapter. It names its base as the configuration does: a hub id, not a path of this machine's cache."""
    source = resolve_source(config.model.name_or_path)
    name = source[0] if source[1] is None else config.model.name_or_path
    causal_lm.peft_config["default"].base_model_name_or_path = name
    causal_lm.peft_config["default"].revision = config.model.revision
    save_adapter(causal_lm, weights, folder)
    (folder / "README.md").unlink()  # peft's own card, which is empty


def _export_merged(config: Config, causal_lm: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    _export_adapter(config, causal_lm, weights, folder / "adapter")
    bars = redirect_stderr(io.StringIO())  # they were shown when the policy was read
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"), bars:
        base = load_causal_lm(config.model, torch.float32)
        merged = with_saved_adapter(base, folder / "adapter", causal_lm).merge_and_unload()
    merged.to(DTYPES[config.model.dtype]).save_pretrained(folder)


def model_card(config: Config, results: dict[int, dict[str, float]], num_steps: int, notes: Sequence[str] = ()) -> str:
    """README.md of the exported model: what it is, how it was trained, held-out metrics, how to load and publish it.

    results: step -> metrics; num_steps: those that were trained; notes: what was cut or left out of the data.
    """
    name, merged = config.model.name_or_path, merges(config)
    adapter = config.lora is not None and not merged
    kind = "LoRA adapter" if adapter else "LoRA, merged" if merged else "full fine-tuning"
    on_hub = re.fullmatch(HUB_ID, name) and not Path(name).expanduser().exists()
    datasets = [source.dataset for source in config.data.mix or [config.data]]
    of_hub = [dataset for dataset in datasets if re.fullmatch(HUB_ID, dataset) and not is_local(dataset)]
    metadata = ModelCardData(
        base_model=name if on_hub else None,
        datasets=of_hub or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["ebft"],
    )
    described = name if on_hub else Path(name).name
    split = f" (`{config.data.split}`)" if config.data.mix is None else ""
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        f"# {described}, energy-based fine-tuning ({kind})",
        "",
        f"Trained for {num_steps} steps on `{config.data.described}`{split} with {config.mode} EBFT",
        f"(arXiv 2603.12248): rl_coef {config.ebft.rl_coef}, ce_coef {config.ebft.ce_coef}, "
        f"learning rate {config.train.learning_rate}.",
        "The whole configuration is in `training_config.yaml`.",
        *[f"- {note}" for note in notes],
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer" + "  # and pip install peft" * adapter,
        "",
        'folder = "."  # this folder, or its id on the hub',
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)",
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        "```",
        "",
        "Publish it: `hf upload your-name/your-model .`",
    ]
    if results:
        names = [name for name in next(iter(results.values())) if not name.endswith(("_se", "_change"))]
        table = [["metric", *(f"step {step}" for step in results)], ["---"] * (1 + len(results))]
        for name in names:
            cells = [
                f"{metrics[name]:.4f} ± {metrics[name + '_se']:.4f}" if name in metrics else ""
                for metrics in results.values()
            ]
            table.append([name.removeprefix("eval/"), *cells])
        lines += ["", "Held-out documents, mean ± standard error over documents:", ""]
        lines += [f"| {' | '.join(row)} |" for row in table]
    return "\n".join(lines) + "\n"
