"""What a run would do, before it does it (--dry-run): data, anchors, steps, estimated memory, and three examples with their anchors marked.

No weights are read: the memory estimate needs the model's config alone.
"""

from dataclasses import dataclass
from itertools import chain

import torch
from accelerate import Accelerator, DistributedType
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from .config import Config, UserError
from .data import MixedRows, Rows, StreamedRows, load_rows, rows_of_step
from .data_config import MIX_BLOCK
from .distributed import main_process_first
from .documents import Document, first_anchor
from .features import cut_decoder, layer_indices
from .losses import LOGITS_PER_CHUNK
from .models import DTYPES, LOADING_ERRORS, base_causal_lm, first_line, load_tokenizer, refuse_short_context, refuse_unsupported, resolve_source, with_adapter
from .strided import QUERIES_PER_BLOCK

GB = 2**30
NUM_EXAMPLES, SHOWN_TOKENS = 3, 200
ANCHOR, START, END = "▸", "⟦", "⟧"


def preview(config: Config, accelerator: Accelerator) -> str:
    """The whole text."""
    tokenizer = load_tokenizer(config.model)
    rows, held_out = main_process_first(accelerator, lambda: load_rows(config, tokenizer))
    shown, found = rows_of_step(rows, 0, NUM_EXAMPLES), count(config, rows)
    largest = (config.longest_sequence[0], 1) if config.mode == "structured" else (max(counts.longest for counts in found), max(counts.most for counts in found))
    parts = [
        f"dry run: {config.mode} mode, {config.model.name_or_path}",
        *count_lines(config, rows, found, held_out),
        *_memory_lines(config, accelerator, largest),
        *(f"example {number + 1} ({ANCHOR} an anchor, {START} {END} what is learnt):\n{marked(config, tokenizer, rows[row])}" for number, row in enumerate(shown)),
    ]
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Counts


def anchors_in(config: Config, spans: list[tuple[int, int]]) -> list[range]:
    """Where rollouts start in each span of a document: tokens before each of them."""
    if config.mode == "structured":
        return [range(spans[0][0], spans[0][0] + 1)]
    ebft = config.ebft
    return [range(first_anchor(span, ebft.context_length, ebft.min_completion_prefix), span[1] - ebft.generate_max_len + 1, ebft.stride) for span in spans]


@dataclass
class Counts:
    """Of some rows. learnt: tokens in the cross-entropy (all but a raw text's first); longest, most: tokens and anchors of the largest row."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    learnt: int = 0
    anchors: int = 0
    longest: int = 0
    most: int = 0


def count(config: Config, rows) -> list[Counts]:
    """Counts all rows of each source that are there; of a stream those that have been read."""
    found = []
    for source in rows.sources if isinstance(rows, MixedRows) else [rows]:
        counts = Counts()
        if isinstance(source, StreamedRows):
            sizes = ([(len(document.tokens), document.spans) for document in row] for block in source.blocks for row in block)
        else:
            columns = source.documents.select_columns(["num_tokens", "spans"])[:]
            documents = [(length, list(zip(spans[::2], spans[1::2], strict=True))) for length, spans in zip(columns["num_tokens"], columns["spans"], strict=True)]
            sizes = ([documents[member] for member in members] for members in source.members)
        for row in sizes:
            tokens, anchors = sum(length for length, _ in row), sum(len(places) for _, spans in row for places in anchors_in(config, spans))
            counts.rows, counts.documents, counts.tokens, counts.anchors = counts.rows + 1, counts.documents + len(row), counts.tokens + tokens, counts.anchors + anchors
            counts.learnt += sum(end - max(start, 1) for _, spans in row for start, end in spans)
            counts.longest, counts.most = max(counts.longest, tokens), max(counts.most, anchors)
        found.append(counts)
    return found


def count_lines(config: Config, rows, found: list[Counts], held_out: Rows | None) -> list[str]:
    """The counts in words."""
    train, ebft = config.train, config.ebft
    samples, length = (ebft.n_samples_per_prompt, ebft.generate_max_len) if config.mode == "strided" else (ebft.num_generations, ebft.max_completion_length)
    mixed, up_to = isinstance(rows, MixedRows), "" if config.mode == "strided" else "up to "
    shares = [number / MIX_BLOCK for number in rows.counts] if mixed else [1.0]
    per_row, tokens_per_row = (sum(share * getattr(counts, name) / counts.rows for share, counts in zip(shares, found, strict=True)) for name in ("anchors", "tokens"))
    documents, num_rows, tokens, learnt, anchors = (sum(getattr(counts, name) for counts in found) for name in ("documents", "rows", "tokens", "learnt", "anchors"))
    what = "read so far (a stream is not counted)" if config.data.streaming else "to train on"
    epochs = "" if config.data.streaming or mixed else f"; {train.max_steps * train.batch_size / num_rows:.2f} epochs"
    lines = [
        f"{documents:,} documents in {num_rows:,} rows {what}: {tokens:,} tokens, {learnt:,} of them learnt; {0 if held_out is None else len(held_out):,} held out",
        f"{anchors:,} anchors (groups), {per_row:.1f} a row; {samples} rollouts of {up_to}{length} tokens at each",
        f"{train.max_steps:,} steps of {train.batch_size} rows: {per_row * train.batch_size:.0f} groups, {up_to}{per_row * train.batch_size * samples * length:,.0f} rollout tokens and "
        f"{tokens_per_row * train.batch_size:,.0f} document tokens a step{epochs}",
    ]
    if mixed:
        lines.append("rows by weight: " + ", ".join(f"{source.dataset} {100 * share:g} %" for source, share in zip(config.data.mix, shares, strict=True)))
    return lines


def marked(config: Config, tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> str:
    """The first document of a row as text, with its anchors and what is learnt marked."""
    document = documents[0]
    marks = {}
    for start, end in document.spans:
        marks[start], marks[end] = marks.get(start, "") + START, END + marks.get(end, "")
    for anchor in chain.from_iterable(anchors_in(config, document.spans)):
        marks[anchor] = marks.get(anchor, "") + ANCHOR
    begin = 0 if document.spans[0][0] < SHOWN_TOKENS // 2 else document.spans[0][0] - SHOWN_TOKENS // 2
    stop = min(len(document.tokens), begin + SHOWN_TOKENS)
    cuts = sorted({begin, stop, *(place for place in marks if begin <= place <= stop)})
    text = "".join(marks.get(first, "") + tokenizer.decode(document.tokens[first:last]) for first, last in zip(cuts, cuts[1:], strict=False))
    return f"{'..' if begin else ''}{text}{marks.get(stop, '')}{'..' if stop < len(document.tokens) else ''}"


# ---------------------------------------------------------------------------------------------------------------------------------------
# Memory


@dataclass
class Shape:
    """What the estimate needs to know of a model. Parameters: all, trained, of the layers that the feature network keeps."""

    parameters: int
    trained: int
    kept: int
    layers: int
    hidden: int
    inner: int
    key_value: int
    vocabulary: int


def shape_of(config: Config) -> Shape:
    """Of the model that a configuration names. Raises UserError when its config cannot be read."""
    source, gguf_file = resolve_source(config.model.name_or_path)
    arguments = {"gguf_file": gguf_file} if gguf_file else {"revision": config.model.revision}
    try:
        settings = AutoConfig.from_pretrained(source, **arguments).get_text_config()
        refuse_unsupported(settings, config.model.name_or_path)
        refuse_short_context(settings, *config.longest_sequence, config.model.name_or_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
            cut_decoder(model.get_decoder(), 0)  # or it refuses
            policy = model if config.lora is None else with_adapter(config, model)
    except LOADING_ERRORS as error:
        raise UserError(f"model.name_or_path: {config.model.name_or_path!r} cannot be loaded: {first_line(error)}") from None
    decoder = base_causal_lm(policy).get_decoder()
    base = {name: parameter for name, parameter in policy.named_parameters() if "lora_" not in name}
    layer = sum(parameter.numel() for name, parameter in decoder.layers[0].named_parameters() if "lora_" not in name)
    deepest = max(layer_indices(config.ebft.feature_layers, len(decoder.layers)))
    embedding = base_causal_lm(policy).get_input_embeddings().weight
    heads = settings.num_attention_heads
    known = settings.to_dict()
    head = known.get("head_dim") or settings.hidden_size // heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in base.values()),
        trained=sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad),
        kept=embedding.numel() + deepest * layer,
        layers=len(decoder.layers),
        hidden=settings.hidden_size,
        inner=settings.intermediate_size,
        key_value=(known.get("num_key_value_heads") or heads) * head,
        vocabulary=embedding.shape[0],
    )


def memory_estimate(config: Config, shape: Shape, document_tokens: int, anchors: int, num_processes: int, sharded: bool) -> dict[str, float]:
    """Bytes of one process, by what they are for; the last entry is the peak: all that stays, and the larger of rollouts and training."""
    width = DTYPES[config.model.dtype].itemsize
    ebft, strided = config.ebft, config.mode == "strided"
    samples, length = (ebft.n_samples_per_prompt, ebft.generate_max_len) if strided else (ebft.num_generations, document_tokens - config.data.max_prompt_length)
    parts = num_processes if sharded else 1
    rows = config.train.per_device_batch_size
    rollout_tokens = anchors * samples * length if ebft.rl_coef > 0 else 0
    tokens = rows * (document_tokens + rollout_tokens)
    lora = config.lora is not None
    stays = {
        "weights": (shape.parameters * width + 4 * shape.trained if lora else 4 * shape.parameters) / parts,
        "gradients": 4 * shape.trained / parts,
        "optimizer": 8 * shape.trained / parts,
        "feature network": 0 if lora or ebft.rl_coef == 0 else shape.kept * width / (num_processes if config.feature_network.shard else 1),
    }
    # what stands beside the weights while they are used: FSDP2 gathers them, autocast casts them
    used = shape.parameters * width if sharded or (width < 4 and not lora) else 0
    # what autograd keeps of a token in a layer, counted (saved_tensors_hooks) for the Llama architecture; autocast has a float32 residual stream
    kept = 14 if width == 4 else 17 if lora or sharded else 22
    per_layer = width * (kept * shape.hidden + 4 * shape.inner)
    blocks = -(-rollout_tokens // QUERIES_PER_BLOCK)
    per_layer_keys = width * rows * 2 * shape.hidden * blocks * (document_tokens // 2 + QUERIES_PER_BLOCK)
    one_layer = tokens * per_layer + per_layer_keys
    activations = tokens * shape.hidden * width * shape.layers + one_layer if config.model.gradient_checkpointing else one_layer * shape.layers
    head = 3 * 4 * LOGITS_PER_CHUNK + tokens * shape.hidden * 4 + (4 * shape.vocabulary * shape.hidden if not lora else 0)
    writes_itself = ebft.rl_coef > 0 and (strided or not ebft.use_vllm)
    cache = tokens * 2 * shape.key_value * shape.layers * width + 6 * 4 * LOGITS_PER_CHUNK if writes_itself else 0
    moves = {"rollouts": cache + used, "forward and backward": activations + head + used}
    return {**stays, **moves, "peak": sum(stays.values()) + max(moves.values())}


def _memory_lines(config: Config, accelerator: Accelerator, largest: tuple[int, int]) -> list[str]:
    sharded = accelerator.distributed_type == DistributedType.FSDP
    shape = shape_of(config)
    found = memory_estimate(config, shape, *largest, accelerator.num_processes, sharded)
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in found.items() if name != "peak" and size > 0)
    have = f"; {accelerator.device} has {torch.cuda.get_device_properties(accelerator.device).total_memory / GB:.0f} GB" if accelerator.device.type == "cuda" else ""
    return [
        f"{shape.parameters:,} weights, {shape.trained:,} trained; largest row: {largest[0]:,} tokens, {largest[1]:,} anchors",
        f"estimated memory of a process, GB (to a third, without the libraries' own 1): peak {found['peak'] / GB:.1f} = {parts} (the last two in turn){have}",
    ]
