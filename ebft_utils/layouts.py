"""The run's layout and attention: what the configuration asks for, as far as the model is proved to bear it."""

from dataclasses import replace

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from .algorithm.architecture import decoder_of
from .algorithm.attention import STRIDED_BLOCKS
from .algorithm.flex import STRIDED_FLEX, prove_flex_attention, why_not_flex
from .config.modes import Config
from .config.settings import UserError
from .model_files import first_line
from .models import DTYPES, RunLayout, base_causal_lm
from .proof import Setting, Verdict, prove


def choose_layout(config: Config, accelerator: Accelerator, model: PreTrainedModel | PeftModel) -> RunLayout:
    """Sets a model's attention, and proves (proof.py) that the run's layout gives right numbers with it.

    Strided mode needs the packed layout. Structured mode takes rows where ebft.layout says so, or where it is auto and
    the packed layout fails. All processes take the same. Raises UserError where none is left.
    """
    asked, reason = "packed" if config.mode == "strided" else config.ebft.layout, None
    if asked != "rows":
        reason = _counts_places(config, model) or set_attention(config, model, accelerator.device)
        verdict = Verdict(reason) if reason else _agreed(config, accelerator, model, "packed")
        causal_lm, free = base_causal_lm(model), config.model.attn_implementation == "auto"
        free = free and not config.model.compile_decoding  # which only flex_attention has
        if verdict.reason and free and decoder_of(causal_lm).config._attn_implementation == STRIDED_FLEX:
            accelerator.print(f"model.attn_implementation: auto takes sdpa here: with flex_attention {verdict.reason}")
            causal_lm.set_attn_implementation(STRIDED_BLOCKS)
            verdict = _agreed(config, accelerator, model, "packed")
        if verdict.reason is None:
            return _said(accelerator, "packed", verdict)
        reason = verdict.reason
        if asked == "packed":
            raise UserError(_not_packed(config, accelerator, model, reason))
    _refuse_packed_settings(config, reason)
    if reason is not None:
        accelerator.print(f"ebft.layout: auto takes rows, one for each completion: {reason}")
    for implementation in ("eager",) if config.model.attn_implementation == "eager" else ("sdpa", "eager"):
        try:
            base_causal_lm(model).set_attn_implementation(implementation)
        except ValueError as error:  # this architecture has no such attention
            verdict = Verdict(first_line(error))
        else:
            verdict = _agreed(config, accelerator, model, "rows")
        if verdict.reason is None:
            return _said(accelerator, "rows", verdict)
        if implementation == "sdpa":
            accelerator.print(f"model.attn_implementation: eager is tried, because with sdpa {verdict.reason}")
    raise UserError(_not_at_all(config, accelerator, model, verdict.reason))


def _agreed(config: Config, accelerator: Accelerator, model: PreTrainedModel | PeftModel, layout: str) -> Verdict:
    """The verdict on the layout of all processes: that of one where it fails, if there is one."""
    verdict = prove(base_causal_lm(model), setting_of(config, accelerator, model, layout), accelerator.device)
    verdicts = gather_object([verdict]) if accelerator.num_processes > 1 else [verdict]
    return next((one for one in verdicts if one.reason is not None), verdicts[0])


def _counts_places(config: Config, model: PreTrainedModel | PeftModel) -> str | None:
    """Llama 4 scales attention by a token's place in the row, not its position, from floor_scale places on."""
    settings = decoder_of(base_causal_lm(model)).config.to_dict()
    (longest, _), ebft = config.longest_sequence, config.ebft
    if config.mode == "structured":
        most = longest * (1 + ebft.num_generations)
    else:
        # of many short packed documents, each with an anchor, or of a long one
        anchors = longest // min(ebft.stride, config.first_anchor + ebft.generate_max_len)
        rollouts = anchors * ebft.n_samples_per_prompt * ebft.generate_max_len
        most = min(longest + rollouts, ebft.max_packed_tokens or longest + rollouts)
    if settings.get("attn_temperature_tuning") and most >= settings["floor_scale"]:
        return (
            f"from place {settings['floor_scale']} of a row on it scales attention, and packed rows have up to {most}"
        )
    return None


def setting_of(config: Config, accelerator: Accelerator, model: PreTrainedModel | PeftModel, layout: str) -> Setting:
    """How the run uses a model whose attention is set."""
    return Setting(
        layout,
        decoder_of(base_causal_lm(model)).config._attn_implementation,
        DTYPES[config.model.dtype],
        autocast=accelerator.distributed_type != DistributedType.FSDP,
        writes=config.mode == "strided" or not config.ebft.use_vllm,
    )


def _said(accelerator: Accelerator, layout: str, verdict: Verdict) -> RunLayout:
    if verdict.whole:
        accelerator.print("feature network: this architecture cannot be cut after a layer, so all layers run")
    return RunLayout(layout, verdict.whole)


def _not_packed(config: Config, accelerator: Accelerator, model: PreTrainedModel | PeftModel, reason: str) -> str:
    """The refusal, with what is possible instead."""
    name = f"{config.model.name_or_path!r} ({base_causal_lm(model).config.model_type})"
    ways, strided = [], config.mode == "strided"
    if _bears(model, "rows", accelerator):
        ways.append(
            "train_structured.py can train it, on prompts and completions" if strided else "ebft.layout=rows can"
        )
    places, eager = _counts_places(config, model), config.model.attn_implementation == "eager"
    if not places and not eager and _bears(model, "packed", accelerator):
        ways.append("model.attn_implementation=eager can, with all scores in memory")
    instead = f"; {' and '.join(ways)}" if ways else ""
    wrong = f"model.name_or_path: {name} cannot be trained in strided mode"
    wrong = wrong if strided else f"ebft.layout: packed is not possible with {name}"
    return f"{wrong}: {reason}{instead}"


def _bears(model: PreTrainedModel | PeftModel, layout: str, accelerator: Accelerator) -> bool:
    """Whether a model is right in a layout with eager attention, on rollouts that it does not write itself."""
    causal_lm = base_causal_lm(model)
    causal_lm.set_attn_implementation("eager")
    setting = Setting(layout, "eager", causal_lm.dtype, writes=layout == "packed")
    return prove(causal_lm, setting, accelerator.device).reason is None


def _refuse_packed_settings(config: Config, reason: str | None) -> None:
    """Refuses what only the packed layout has."""
    needs = f"ebft.layout packed, which is not possible here: {reason}" if reason else "ebft.layout packed"
    if config.model.attn_implementation == "flex_attention":
        raise UserError(f"model.attn_implementation: flex_attention needs {needs}; leave it out")
    if config.model.compile_decoding:
        raise UserError(f"model.compile_decoding: true needs {needs}; leave it out")


def _not_at_all(config: Config, accelerator: Accelerator, model: PreTrainedModel | PeftModel, reason: str) -> str:
    setting, hint = setting_of(config, accelerator, model, "rows"), ""
    if (
        setting.writes
        and prove(base_causal_lm(model), replace(setting, writes=False), accelerator.device).reason is None
    ):
        hint = "; with completions from a vLLM server (ebft.use_vllm=true) it can"
    if config.lora is not None:
        hint += f" (tried with its adapter, lora.target_modules: {config.lora.target_modules})"
    name = f"{config.model.name_or_path!r} ({base_causal_lm(model).config.model_type})"
    return f"model.name_or_path: {name} cannot be trained: {reason}{hint}"


# ----------------------------------------------------------------------------------------------------------------------
# Attention of the packed layout


def attention_heads(settings: PretrainedConfig) -> tuple[int, int, int]:
    """Number of query heads, number of key and value heads, and width of a head, from a model's (text) config.

    Of a model without attention: one head as wide as the model.
    """
    known = settings.to_dict()
    heads = known.get(settings.attribute_map.get("num_attention_heads", "num_attention_heads")) or 1
    return heads, known.get("num_key_value_heads") or heads, known.get("head_dim") or settings.hidden_size // heads


def set_attention(config: Config, model: PreTrainedModel | PeftModel, device: torch.device) -> str | None:
    """Makes a model attend over packed rollouts, as the configuration says.

    Returns why the architecture does not let itself be told how, or None. Raises UserError where the device cannot what
    is asked for.
    """
    asked, dtype, compiled = config.model.attn_implementation, config.model.dtype, config.model.compile_decoding
    model = base_causal_lm(model)
    try:
        model.set_attn_implementation("eager" if asked == "eager" else STRIDED_BLOCKS)
    except ValueError as error:
        return first_line(error)
    # auto takes no flex_attention in float32: its kernels then work on 16 x 16 cells
    if asked in ("sdpa", "eager") or (asked == "auto" and (device.type != "cuda" or dtype == "float32")):
        if compiled:
            raise UserError(
                f"model.compile_decoding: true needs flex_attention, and auto takes sdpa on {device} in {dtype}; "
                "leave it out, or ask for flex_attention"
            )
        return None
    backward, (*heads, width) = not config.eval.only, attention_heads(model.config.get_text_config())
    reason = why_not_flex(width, device, backward)
    reason = reason or prove_flex_attention(*heads, width, DTYPES[dtype], device, backward)
    if reason is None:
        model.set_attn_implementation(STRIDED_FLEX)
    elif asked == "flex_attention":
        fix = "set it to sdpa" + " and leave model.compile_decoding out" * compiled
        raise UserError(f"model.attn_implementation: flex_attention cannot run on {device}: {reason}; {fix}")
    elif compiled:
        raise UserError(
            f"model.compile_decoding: true needs flex_attention, which cannot run on {device}: {reason}; leave it out"
        )
    else:
        PartialState().print(f"model.attn_implementation: auto takes sdpa here: flex_attention cannot run: {reason}")
    return None
