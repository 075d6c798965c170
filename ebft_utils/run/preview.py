"""What a run would do, before it does it (--dry-run): data, anchors, steps, estimated memory, and three examples with their anchors marked.

No weights are read: the memory estimate needs the model's config alone.
"""

from dataclasses import dataclass
from itertools import chain

import torch
from accelerate import Accelerator, DistributedType
from transformers import PreTrainedTokenizerBase

from ..config.data import MIX_BLOCK
from ..config.modes import Config
from ..data.documents import Document, first_anchor
from ..data.rows import MixedRows, Rows, StreamedRows, load_rows, rows_of_step
from ..models import load_tokenizer
from .distributed import main_process_first
from .memory import GB, IN_TURN, in_words, memory_estimate, shape_of, ways_to_save

NUM_EXAMPLES, SHOWN_TOKENS = 3, 200
ANCHOR, START, END = "▸", "⟦", "⟧"


def preview(config: Config, accelerator: Accelerator) -> str:
    """The whole text."""
    tokenizer = load_tokenizer(config.model)
    rows, held_out = main_process_first(accelerator, lambda: load_rows(config, tokenizer))
    shown, found = rows_of_step(rows, 0, NUM_EXAMPLES), count(config, rows)
    largest = (
        (config.longest_sequence[0], 1)
        if config.mode == "structured"
        else (max(counts.longest for counts in found), max(counts.most for counts in found))
    )
    parts = [
        f"dry run: {config.mode} mode, {config.model.name_or_path}",
        *count_lines(config, rows, found, held_out),
        *_memory_lines(config, accelerator, largest),
        *(
            f"example {number + 1} ({ANCHOR} an anchor, {START} {END} what is learnt):\n{marked(config, tokenizer, rows[row])}"
            for number, row in enumerate(shown)
        ),
    ]
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Counts


def anchors_in(config: Config, spans: list[tuple[int, int]]) -> list[range]:
    """Where rollouts start in each span of a document: tokens before each of them."""
    if config.mode == "structured":
        return [range(spans[0][0], spans[0][0] + 1)]
    ebft = config.ebft
    return [
        range(
            first_anchor(span, ebft.context_length, ebft.min_completion_prefix),
            span[1] - ebft.generate_max_len + 1,
            ebft.stride,
        )
        for span in spans
    ]


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
            sizes = (
                [(len(document.tokens), document.spans) for document in row] for block in source.blocks for row in block
            )
        else:
            columns = source.documents.select_columns(["num_tokens", "spans"])[:]
            documents = [
                (length, list(zip(spans[::2], spans[1::2], strict=True)))
                for length, spans in zip(columns["num_tokens"], columns["spans"], strict=True)
            ]
            sizes = ([documents[member] for member in members] for members in source.members)
        for row in sizes:
            tokens, anchors = (
                sum(length for length, _ in row),
                sum(len(places) for _, spans in row for places in anchors_in(config, spans)),
            )
            counts.rows, counts.documents, counts.tokens, counts.anchors = (
                counts.rows + 1,
                counts.documents + len(row),
                counts.tokens + tokens,
                counts.anchors + anchors,
            )
            counts.learnt += sum(end - max(start, 1) for _, spans in row for start, end in spans)
            counts.longest, counts.most = max(counts.longest, tokens), max(counts.most, anchors)
        found.append(counts)
    return found


def count_lines(config: Config, rows, found: list[Counts], held_out: Rows | None) -> list[str]:
    """The counts in words."""
    train, ebft = config.train, config.ebft
    samples, length = (
        (ebft.n_samples_per_prompt, ebft.generate_max_len)
        if config.mode == "strided"
        else (ebft.num_generations, ebft.max_completion_length)
    )
    mixed, up_to = isinstance(rows, MixedRows), "" if config.mode == "strided" else "up to "
    shares = [number / MIX_BLOCK for number in rows.counts] if mixed else [1.0]
    per_row, tokens_per_row = (
        sum(share * getattr(counts, name) / counts.rows for share, counts in zip(shares, found, strict=True))
        for name in ("anchors", "tokens")
    )
    documents, num_rows, tokens, learnt, anchors = (
        sum(getattr(counts, name) for counts in found) for name in ("documents", "rows", "tokens", "learnt", "anchors")
    )
    what = "read so far (a stream is not counted)" if config.data.streaming else "to train on"
    epochs = "" if config.data.streaming or mixed else f"; {train.max_steps * train.batch_size / num_rows:.2f} epochs"
    lines = [
        f"{documents:,} documents in {num_rows:,} rows {what}: {tokens:,} tokens, {learnt:,} of them learnt; {0 if held_out is None else len(held_out):,} held out",
        f"{anchors:,} anchors (groups), {per_row:.1f} a row; {samples} rollouts of {up_to}{length} tokens at each",
        f"{train.max_steps:,} steps of {train.batch_size} rows: {per_row * train.batch_size:.0f} groups, {up_to}{per_row * train.batch_size * samples * length:,.0f} rollout tokens and "
        f"{tokens_per_row * train.batch_size:,.0f} document tokens a step{epochs}",
    ]
    if mixed:
        lines.append(
            "rows by weight: "
            + ", ".join(
                f"{source.dataset} {100 * share:g} %" for source, share in zip(config.data.mix, shares, strict=True)
            )
        )
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
    text = "".join(
        marks.get(first, "") + tokenizer.decode(document.tokens[first:last])
        for first, last in zip(cuts, cuts[1:], strict=False)
    )
    return f"{'..' if begin else ''}{text}{marks.get(stop, '')}{'..' if stop < len(document.tokens) else ''}"


# ---------------------------------------------------------------------------------------------------------------------------------------
# Memory


def _memory_lines(config: Config, accelerator: Accelerator, largest: tuple[int, int]) -> list[str]:
    device, shape = accelerator.device, shape_of(config)
    where = *largest, accelerator.num_processes, accelerator.distributed_type == DistributedType.FSDP, device
    found = memory_estimate(config, shape, *where)
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in found.items() if name != "peak" and size > 0)
    has = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    turns = {2: " (the last two in turn)", 3: " (the last three in turn)"}.get(
        sum(found[name] > 0 for name in IN_TURN), ""
    )
    lines = [
        f"{shape.parameters:,} weights, {shape.trained:,} trained; largest row: {largest[0]:,} tokens, {largest[1]:,} anchors",
        f"estimated memory of a process, GB (to a third, without the libraries' own 1): peak {found['peak'] / GB:.1f} = {parts}"
        f"{turns}{'' if has is None else f'; {device} has {has / GB:.0f} GB'}",
    ]
    if has is not None and found["peak"] > has:
        lines.append(f"this does not fit; {in_words(found['peak'], ways_to_save(config, shape, *where))}")
    return lines
