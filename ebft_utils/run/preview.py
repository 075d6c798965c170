"""The dry run (--dry-run): data, anchors, steps, estimated memory, and three examples with their anchors marked.

No weights are read, because the memory estimate needs the model's config alone. (A GGUF file is unpacked first, once.)
"""

from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from accelerate import Accelerator, DistributedType
from transformers import PreTrainedTokenizerBase

from ..config.data import MIX_BLOCK
from ..config.modes import Config
from ..data.documents import Document, first_anchor
from ..data.rows import MixedRows, Rows, load_rows, rows_of_step
from ..data.sources import check_sources
from ..data.streams import StreamedRows
from ..models import load_tokenizer
from .distributed import main_process_first
from .memory import GB, IN_TURN, advice, memory_estimate, shape_of

NUM_EXAMPLES, SHOWN_TOKENS = 3, 200
ANCHOR, START, END = "▸", "⟦", "⟧"


def preview(config: Config, accelerator: Accelerator) -> str:
    """What a run would do, in words."""
    check_sources(config)
    tokenizer = load_tokenizer(config.model)
    rows, held_out = main_process_first(accelerator, lambda: load_rows(config, tokenizer))
    shown, found = rows_of_step(rows, 0, NUM_EXAMPLES), count(config, rows)
    largest = max(counts.longest for counts in found), max(counts.most for counts in found)
    if config.mode == "structured":
        largest = config.longest_sequence[0], 1
    lines = [
        f"dry run: {config.mode} mode, {config.model.name_or_path}",
        *count_lines(config, rows, found, held_out),
        *_memory_lines(config, accelerator, largest),
    ]
    for number, row in enumerate(shown, start=1):
        lines.append(f"example {number} ({ANCHOR} an anchor, {START} {END} what is learnt):")
        lines.append(marked(config, tokenizer, rows[row]))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Counts


def anchors_in(config: Config, spans: list[tuple[int, int]]) -> list[range]:
    """Where rollouts start in each span of a document: the number of tokens before each."""
    if config.mode == "structured":
        return [range(spans[0][0], spans[0][0] + 1)]
    ebft = config.ebft
    first = [first_anchor(span, ebft.context_length, ebft.min_completion_prefix) for span in spans]
    ends = [end - ebft.generate_max_len + 1 for _, end in spans]
    return [range(*bounds, ebft.stride) for bounds in zip(first, ends, strict=True)]


@dataclass
class Counts:
    """Counts of some rows.

    documents: the pieces of a long text are one; learnt: tokens in the cross-entropy (not the first of a raw text);
    longest, most: tokens and anchors of the largest row.
    """

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    learnt: int = 0
    anchors: int = 0
    longest: int = 0
    most: int = 0


def count(config: Config, rows) -> list[Counts]:
    """Counts the rows of each source. Of a stream it counts those that have been read."""
    found = []
    for source in rows.sources if isinstance(rows, MixedRows) else [rows]:
        counts = Counts()
        if isinstance(source, StreamedRows):
            stream_rows = chain.from_iterable(source.blocks)
            sizes = ([(len(found.tokens), found.spans, found.piece) for found in row] for row in stream_rows)
        else:
            columns = source.documents.select_columns(["num_tokens", "spans", "piece"])[:]
            all_spans = [list(zip(spans[::2], spans[1::2], strict=True)) for spans in columns["spans"]]
            documents = list(zip(columns["num_tokens"], all_spans, columns["piece"], strict=True))
            sizes = ([documents[member] for member in members] for members in source.members)
        for row in sizes:
            tokens = sum(length for length, _, _ in row)
            anchors = sum(len(places) for _, spans, _ in row for places in anchors_in(config, spans))
            counts.rows += 1
            counts.documents += sum(piece == 0 for _, _, piece in row)
            counts.tokens += tokens
            counts.anchors += anchors
            counts.learnt += sum(end - max(start, 1) for _, spans, _ in row for start, end in spans)
            counts.longest, counts.most = max(counts.longest, tokens), max(counts.most, anchors)
        found.append(counts)
    return found


def count_lines(config: Config, rows, found: list[Counts], held_out: Rows | None) -> list[str]:
    """The counts in words."""
    train, ebft = config.train, config.ebft
    if config.mode == "strided":
        samples, length, up_to = ebft.n_samples_per_prompt, ebft.generate_max_len, ""
    else:
        samples, length, up_to = ebft.num_generations, ebft.max_completion_length, "up to "
    mixed = isinstance(rows, MixedRows)
    shares = [number / MIX_BLOCK for number in rows.counts] if mixed else [1.0]
    of_sources = list(zip(shares, found, strict=True))
    anchors_per_row = sum(share * counts.anchors / counts.rows for share, counts in of_sources)
    groups = anchors_per_row * train.batch_size
    document_tokens = sum(share * counts.tokens / counts.rows for share, counts in of_sources) * train.batch_size
    documents, num_rows, tokens, learnt, anchors = (
        sum(getattr(counts, name) for counts in found) for name in ("documents", "rows", "tokens", "learnt", "anchors")
    )
    what = "read so far (a stream is not counted)" if config.data.streaming else "to train on"
    num_held_out = 0 if held_out is None else len(held_out)
    num_steps = train.total_steps(rows)
    epochs = "" if config.data.streaming or mixed else f"; {num_steps * train.batch_size / num_rows:.2f} epochs"
    lines = [
        f"{documents:,} documents in {num_rows:,} rows {what}: {tokens:,} tokens, "
        f"{learnt:,} of them learnt; {num_held_out:,} held out",
        f"{anchors:,} anchors (groups), {anchors_per_row:.1f} a row; "
        f"{samples} rollouts of {up_to}{length} tokens at each",
        f"{num_steps:,} steps of {train.batch_size} rows: {groups:.0f} groups, "
        f"{up_to}{groups * samples * length:,.0f} rollout tokens and {document_tokens:,.0f} document tokens a step"
        f"{epochs}",
    ]
    if mixed:
        names = [source.dataset for source in config.data.mix]
        by_weight = [f"{name} {100 * share:g} %" for name, share in zip(names, shares, strict=True)]
        lines.append(f"rows by weight: {', '.join(by_weight)}")
    return lines


def marked(config: Config, tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> str:
    """The first document of a row as text. Marked are its anchors and what is learnt."""
    document = documents[0]
    marks = {}
    for start, end in document.spans:
        marks[start], marks[end] = marks.get(start, "") + START, END + marks.get(end, "")
    for anchor in chain.from_iterable(anchors_in(config, document.spans)):
        marks[anchor] = marks.get(anchor, "") + ANCHOR
    begin = 0 if document.spans[0][0] < SHOWN_TOKENS // 2 else document.spans[0][0] - SHOWN_TOKENS // 2
    stop = min(len(document.tokens), begin + SHOWN_TOKENS)
    cuts = sorted({begin, stop, *(place for place in marks if begin <= place <= stop)})
    pieces = [marks.get(first, "") + tokenizer.decode(document.tokens[first:last]) for first, last in pairwise(cuts)]
    text = "".join(pieces)
    return f"{'..' if begin else ''}{text}{marks.get(stop, '')}{'..' if stop < len(document.tokens) else ''}"


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def _memory_lines(config: Config, accelerator: Accelerator, largest: tuple[int, int]) -> list[str]:
    device, shape = accelerator.device, shape_of(config)
    where = accelerator.num_processes, accelerator.distributed_type == DistributedType.FSDP, device
    found = memory_estimate(config, shape, *largest, *where)
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in found.items() if name != "peak" and size > 0)
    num_turns = sum(found[name] > 0 for name in IN_TURN)
    turns = {2: " (the last two in turn)", 3: " (the last three in turn)"}.get(num_turns, "")
    has = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    limit = "" if has is None else f"; {device} has {has / GB:.0f} GB"
    lines = [
        f"{shape.parameters:,} weights, {shape.trained:,} trained; "
        f"largest row: {largest[0]:,} tokens, {largest[1]:,} anchors",
        "estimated memory of a process, GB (to a third, without the libraries' own 1): "
        f"peak {found['peak'] / GB:.1f} = {parts}{turns}{limit}",
    ]
    if has is not None and found["peak"] > has:
        lines.append(f"this does not fit; {advice(config, *where)}")
    return lines
