"""Documents -> rows -> batches.

A row is what the model sees in one line of a batch: one document, or several with `data.packing`. Rows form an endless series; which of them make up an
optimizer step is a function of (seed, step) alone, so a run resumes where it stopped and does not depend on the number of processes.

    Rows          of documents that are all there: epoch after epoch, each in an order of its own
    StreamedRows  of a stream, in blocks of data.shuffle_buffer rows, each in an order of its own
    MixedRows     of several of these, by weight

Axis legend: B rows, S tokens of a row (right-padded), A anchors, N rollouts at an anchor, G tokens of a rollout.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import datasets
import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..algorithm.strided import find_anchors
from ..config.data import MIX_BLOCK
from ..config.modes import Config
from ..config.settings import UserError
from .documents import Document, LeftOut, Tokenizing, columns_read, documents_from, load_documents, table_of
from .sources import Source, evaluation_source, load_table, training_sources

STREAM_EVALUATION = 64  # held-out documents of a stream, of which a tenth is not known


# ---------------------------------------------------------------------------------------------------------------------------------------
# Rows


class Rows:
    """Rows of documents that are all there.

    Args:
        documents: a tokenised table; members: the documents of each row; seed: of the order (several numbers, for the sources of a mixture).
        form: what rows[i] gives of the row's documents.
    """

    def __init__(
        self,
        documents: datasets.Dataset,
        members: Sequence[Sequence[int]],
        seed: tuple[int, ...] = (0,),
        form: Callable = list,
    ):
        self.documents, self.members, self.seed, self.form = documents, members, seed, form
        self.places: list = []  # see StreamedRows

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, row: int):
        return self.form(documents_from(self.documents[self.members[row]]))

    def row_at(self, position: int) -> int:
        """The row at a place of the endless series: every row once in each epoch, in a new order."""
        epoch, index = divmod(position, len(self))
        return int(_epoch_order(len(self), self.seed, epoch)[index])

    def fingerprint(self) -> str:
        """Tells other data from the same: the number of rows, and a digest of up to 64 of them."""
        digest = hashlib.sha256()
        for row in range(0, len(self), -(-len(self) // 64)):
            digest.update(repr(self[row]).encode())
        return f"{len(self)} rows, {digest.hexdigest()[:12]}"

    def go_on_from(self, places: list, position: int) -> None:
        """Nothing to look for: all rows are there."""


@lru_cache(
    maxsize=16
)  # a step reads one epoch of a source, or two at its end; shuffling millions of rows at every step would cost more than the step
def _epoch_order(num_rows: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    return np.random.default_rng([*seed, epoch]).permutation(num_rows)


class StreamedRows:
    """Rows of a stream, read when they are asked for. rows[position] is the row at a place of the endless series.

    The stream is cut into blocks of block_size rows as they come; the usable documents of a block are packed and shuffled. When it ends it begins
    again, its blocks in other orders.

    Args:
        name: for messages. open_at(number): the stream's rows from that one on, as an iterator of dicts. make(rows, number of the first): their usable documents.
        pack(documents, seed): the documents of each row. keep: how far back of the newest position rows are still asked for.
    """

    def __init__(
        self,
        name: str,
        open_at: Callable,
        make: Callable,
        pack: Callable,
        block_size: int,
        seed: tuple[int, ...],
        keep: int,
        form: Callable = list,
    ):
        self.name, self.open_at, self.make, self.pack = name, open_at, make, pack
        self.block_size, self.seed, self.keep, self.form = block_size, seed, keep, form
        self.places: list[
            list[int]
        ] = []  # [epoch, block, position of its first row] of the blocks in memory: a checkpoint holds them
        self.blocks: deque[list[list[Document]]] = deque()
        self._restart(0, 0, 0)
        digest = hashlib.sha256(repr(self[0]).encode())  # reads the first block, or says what is wrong with it
        for row in self.blocks[-1][1:64]:
            digest.update(repr(self.form(row)).encode())
        self.first_rows = digest.hexdigest()[:12]

    def _restart(self, epoch: int, block: int, position: int) -> None:
        self.epoch, self.block, self.end = epoch, block, position
        self.epoch_begin = position if block == 0 else -1
        self.places.clear()
        self.blocks.clear()
        self.stream = self.open_at(block * self.block_size)

    def row_at(self, position: int) -> int:
        """The position itself."""
        return position

    def __getitem__(self, position: int):
        while position >= self.end:
            self._read_block(position)
        index = max(index for index, (_, _, first) in enumerate(self.places) if first <= position)
        return self.form(self.blocks[index][position - self.places[index][2]])

    def _read_block(self, position: int) -> None:
        rows, first = list(islice(self.stream, self.block_size)), self.block * self.block_size
        if not rows:
            if self.end == self.epoch_begin:
                raise UserError(f"{self.name} has no row that can be used")
            self.epoch, self.block, self.epoch_begin, self.stream = self.epoch + 1, 0, self.end, self.open_at(0)
            return
        packed = self.pack(self.make(rows, first), [*self.seed, self.epoch, self.block])
        while self.places and self.places[0][2] + len(self.blocks[0]) <= position - self.keep:
            self.places.pop(0)
            self.blocks.popleft()
        self.places.append([self.epoch, self.block, self.end])
        self.blocks.append(packed)
        self.block, self.end = self.block + 1, self.end + len(packed)

    def fingerprint(self) -> str:
        """Tells another stream from the same, by its first rows."""
        return f"a stream, {self.first_rows}"

    def go_on_from(self, places: list, position: int) -> None:
        """Goes to the block of a position, without making documents of what comes before it. places: as a checkpoint holds them."""
        self._restart(
            *max((place for place in places if place[2] <= position), key=lambda place: place[2], default=(0, 0, 0))
        )


class MixedRows:
    """Rows of several sources, each with its exact share in every MIX_BLOCK rows. A row is (source, its row)."""

    def __init__(self, sources: list[Rows | StreamedRows], weights: list[float], seed: int):
        self.sources, self.seed = sources, seed
        shares = np.array(weights) / sum(weights) * MIX_BLOCK
        self.counts = np.floor(shares).astype(int)
        largest_remainders = np.argsort(self.counts - shares, kind="stable")[: MIX_BLOCK - self.counts.sum()]
        self.counts[largest_remainders] += 1

    def row_at(self, position: int) -> tuple[int, int]:
        """The source whose turn it is, and its next row."""
        block, index = divmod(position, MIX_BLOCK)
        turns = _mixed_turns(tuple(self.counts), self.seed, block)
        source = int(turns[index])
        before = block * int(self.counts[source]) + int((turns[:index] == source).sum())
        return source, self.sources[source].row_at(before)

    def __getitem__(self, row: tuple[int, int]):
        source, index = row
        return self.sources[source][index]

    @property
    def places(self) -> list:
        """Those of the sources."""
        return [source.places for source in self.sources]

    def fingerprint(self) -> str:
        """Those of the sources."""
        return " + ".join(source.fingerprint() for source in self.sources)

    def go_on_from(self, places: list, position: int) -> None:
        """Each source where it is at that position."""
        block, index = divmod(position, MIX_BLOCK)
        turns = _mixed_turns(tuple(self.counts), self.seed, block)[:index]
        for number, (source, own) in enumerate(zip(self.sources, places, strict=True)):
            source.go_on_from(own, block * int(self.counts[number]) + int((turns == number).sum()))


@lru_cache(maxsize=4)
def _mixed_turns(counts: tuple[int, ...], seed: int, block: int) -> np.ndarray:
    return np.random.default_rng([seed, block]).permutation(np.repeat(np.arange(len(counts)), counts))


def rows_of_step(rows: Rows | StreamedRows | MixedRows, step: int, rows_per_step: int) -> list:
    """The rows of the whole global batch of an optimizer step (counted from 0): the next ones of the endless series.

    No row is dropped at an epoch's end: a batch may hold the last rows of one epoch and the first of the next.
    """
    return [rows.row_at(position) for position in range(step * rows_per_step, (step + 1) * rows_per_step)]


def one_a_row(num_documents: int) -> np.ndarray:
    """The documents of each row: one. (Millions of lists would take a hundred bytes each.)"""
    return np.arange(num_documents)[:, None]


def pack_documents(lengths: list[int], sequence_length: int, seed) -> list[list[int]]:
    """Fills rows of sequence_length with whole documents, in a shuffled order, a new row when the next document does not fit. The documents of each row."""
    members, room = [], 0
    for document in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        if lengths[document] > room:
            members.append([])
            room = sequence_length
        members[-1].append(document)
        room -= lengths[document]
    return members


# ---------------------------------------------------------------------------------------------------------------------------------------
# What a run trains and evaluates on


def load_rows(
    config: Config, tokenizer: PreTrainedTokenizerBase, form: Callable = list
) -> tuple[Rows | StreamedRows | MixedRows, Rows | None]:
    """Rows to train on, and held-out rows (always one document a row; None when eval.num_documents is 0), of which no copy is trained on."""
    sources = training_sources(config)
    load = _streams if config.data.streaming else _tables
    train, held_out = load(config, tokenizer, sources, form)
    held_out = None if held_out is None else Rows(held_out, one_a_row(len(held_out)), form=form)
    return (
        train[0]
        if config.data.mix is None
        else MixedRows(train, [source.weight for source in sources], config.train.seed)
    ), held_out


def _order_seed(config: Config, number: int) -> tuple[int, ...]:
    return (config.train.seed,) if config.data.mix is None else (config.train.seed, number)


def _packs(config: Config) -> bool:
    return config.mode == "strided" and config.data.packing


def _tables(
    config: Config, tokenizer, sources: list[Source], form: Callable
) -> tuple[list[Rows], datasets.Dataset | None]:
    """Rows of each source, and the documents for evaluation."""
    train = [load_documents(config, tokenizer, source) for source in sources]
    train, held_out = hold_out(config, tokenizer, sources, train)
    rows = []
    for number, documents in enumerate(train):
        lengths = documents["num_tokens"][:]
        members = (
            pack_documents(lengths, config.data.sequence_length, config.train.seed)
            if _packs(config)
            else one_a_row(len(lengths))
        )
        rows.append(Rows(documents, members, _order_seed(config, number), form))
    return rows, held_out


def _shares(weights: list[float], number: int) -> list[int]:
    """A number of documents, divided by weight."""
    return np.diff(np.floor(np.cumsum([0.0, *weights]) / sum(weights) * number + 0.5).astype(int)).tolist()


def hold_out(
    config: Config, tokenizer, sources: list[Source], train: list[datasets.Dataset]
) -> tuple[list[datasets.Dataset], datasets.Dataset | None]:
    """Documents of each source to train on, and those for evaluation: of eval.dataset, or taken out of the sources by their weights."""
    evaluation = config.eval
    own = None if evaluation.dataset is None else evaluation_source(config)
    pools = train if own is None else [load_documents(config, tokenizer, own)]
    spare = own is None and not evaluation.only  # something must be left to train on
    total = sum(map(len, pools))
    wanted, from_sources = evaluation.num_documents, sources if own is None else [own]
    numbers = _shares(
        [source.weight for source in from_sources],
        min(64, total // 10 if own is None else total) if wanted is None else wanted,
    )
    if wanted is None:
        numbers = [
            min(number, len(pool) // 10 if own is None else len(pool))
            for number, pool in zip(numbers, pools, strict=True)
        ]
        PartialState().print(f"data: {sum(numbers)} of {total} documents are for evaluation (eval.num_documents)")
    for source, pool, number in zip(from_sources, pools, numbers, strict=True):
        if number > len(pool) - spare:
            raise UserError(
                f"eval.num_documents: {wanted}{f', of which {number},' if len(pools) > 1 else ''} cannot be taken out of the {len(pool)} usable documents of {source}"
                f"{' and leave any to train on' if spare else ''}; lower it{', or set eval.dataset' if spare else ''}"
            )
    if sum(numbers) == 0:
        return train, None
    seeds = [evaluation.seed if len(pools) == 1 else [evaluation.seed, number] for number in range(len(pools))]
    orders = [np.random.default_rng(seed).permutation(len(pool)) for seed, pool in zip(seeds, pools, strict=True)]
    held_out = datasets.concatenate_datasets(
        [pool.select(np.sort(order[:number])) for pool, order, number in zip(pools, orders, numbers, strict=True)]
    )
    if not evaluation.only and train:
        if own is None:
            train = [
                pool.select(np.sort(order[number:])) for pool, order, number in zip(pools, orders, numbers, strict=True)
            ]
        train = [_without_copies(documents, held_out, source) for documents, source in zip(train, sources, strict=True)]
    return train, held_out


def _without_copies(documents: datasets.Dataset, held_out: datasets.Dataset, source: Source) -> datasets.Dataset:
    """The documents that are not token for token one of the held-out ones. Data sets often hold a text twice."""
    kept = np.flatnonzero(~np.isin(documents["digest"][:], held_out["digest"][:]))
    if not len(kept):
        raise UserError(
            f"eval.num_documents: every other document of {source} is a copy of a held-out one: nothing is left to train on"
        )
    if len(kept) < len(documents):
        PartialState().print(
            f"data: {len(documents) - len(kept)} documents of {source} left out of training: copies of held-out ones"
        )
    return documents.select(kept)


def _streams(
    config: Config, tokenizer, sources: list[Source], form: Callable
) -> tuple[list[StreamedRows], datasets.Dataset | None]:
    """The same of streams, whose first usable documents are for evaluation when eval.dataset is null."""
    evaluation, data = config.eval, config.data
    held_out, taken = None, [0] * len(sources)
    streams = [_Stream(config, tokenizer, source) for source in sources]
    if evaluation.dataset is not None:
        _, held_out = hold_out(config, tokenizer, sources, [])
    elif evaluation.num_documents != 0:
        wanted = STREAM_EVALUATION if evaluation.num_documents is None else evaluation.num_documents
        found = [
            stream.first(share)
            for stream, share in zip(streams, _shares([source.weight for source in sources], wanted), strict=True)
        ]
        held_out, taken = (
            table_of([document for documents, _ in found for document in documents]),
            [number for _, number in found],
        )
    if evaluation.only:  # then they are not kept apart
        taken = [0] * len(sources)
    copies = set() if held_out is None or evaluation.only else set(held_out["digest"][:])
    keep = 2 * config.train.batch_size  # completions are written a step ahead (ebft.async_prefetch)
    rows = []
    for number, stream in enumerate(streams):
        stream.begin, stream.copies = taken[number], copies
        name = f"{stream.source.key}: {stream.source}"
        rows.append(
            StreamedRows(
                name,
                stream.open_at,
                stream.documents,
                _pack_block(config),
                data.shuffle_buffer,
                _order_seed(config, number),
                keep,
                form,
            )
        )
    return rows, held_out


def _pack_block(config: Config) -> Callable:
    def pack(documents: list[Document], seed: list[int]) -> list[list[Document]]:
        if _packs(config):
            members = pack_documents(
                [len(document.tokens) for document in documents], config.data.sequence_length, seed
            )
        else:
            members = [[document] for document in np.random.default_rng(seed).permutation(len(documents)).tolist()]
        return [[documents[document] for document in row] for row in members]

    return pack


class _Stream:
    """A source that is read row after row. begin: rows at its beginning that are for evaluation; copies: digests of documents that are not trained on."""

    def __init__(self, config: Config, tokenizer, source: Source):
        self.table, self.source, self.tokenizing = (
            columns_read(load_table(source, streaming=True), source),
            source,
            Tokenizing(config, tokenizer, source),
        )
        self.begin, self.copies, self.left_out, self.furthest, self.said = 0, set(), LeftOut(source), -1, 1

    def open_at(self, number: int):
        """The rows for training from that one on."""
        return self._reading(iter(self.table.skip(self.begin + number)))

    def documents(self, rows: list[dict], first: int) -> list[Document]:
        """The usable documents of some rows. first: number of the first of them."""
        numbers = [self.begin + first + index for index in range(len(rows))]
        found = self.tokenizing.documents(rows, numbers)
        if numbers[-1] > self.furthest:  # not counted again in a second epoch
            self.furthest = numbers[-1]
            self.left_out.add([problem for problem in found if isinstance(problem, str)])
            if self.left_out.number >= self.said:  # each time twice as many
                self.said = 2 * self.left_out.number
                PartialState().print(self.left_out.text(f"of the first {numbers[-1] + 1}"))
        documents = [document for document in found if isinstance(document, Document)]
        if not self.copies or not documents:
            return documents
        digests = table_of(documents)["digest"][:]
        return [document for document, digest in zip(documents, digests, strict=True) if digest not in self.copies]

    def first(self, number: int) -> tuple[list[Document], int]:
        """The first usable documents, and how many rows they took."""
        stream, documents, taken = self._reading(iter(self.table)), [], 0
        for row in stream if number else ():
            documents += [
                document for document in self.tokenizing.documents([row], [taken]) if isinstance(document, Document)
            ]
            taken += 1
            if len(documents) == number:
                return documents, taken
        if number:
            raise UserError(
                f"eval.num_documents: {number} cannot be taken out of the {len(documents)} usable documents of {self.source}; lower it, or set eval.dataset"
            )
        return documents, taken

    def _reading(self, stream):
        try:
            yield from stream
        except Exception as error:  # network, file system, decompression, parsers: nothing else happens here
            raise UserError(
                f"{self.source.key}: {self.source} cannot be read on: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            ) from None


# ---------------------------------------------------------------------------------------------------------------------------------------
# Batches of strided mode


@dataclass(frozen=True)
class Batch:
    """One forward's worth of rows.

    row_ids: which rows; keys: what each row's random numbers are keyed by (see `rollout_uniforms`); document_ids, segment_ids, completion_ids (B, S): token ids; the number of the
    document in its row, -1 for padding; the number of the part to be learnt in its row, -1 for what is only read; anchors, valid (B, A).
    """

    row_ids: list
    keys: list[int]
    document_ids: Tensor
    segment_ids: Tensor
    completion_ids: Tensor
    anchors: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        return Batch(
            self.row_ids,
            self.keys,
            *(
                tensor.to(device)
                for tensor in (self.document_ids, self.segment_ids, self.completion_ids, self.anchors, self.valid)
            ),
        )


def make_batch(
    rows,
    row_ids: list,
    keys: list[int],
    pad_token_id: int,
    *,
    context_length: int,
    min_completion_prefix: int,
    stride: int,
    num_generated: int,
) -> Batch:
    """Collates rows: right padding up to the longest, anchors of each row (`strided.find_anchors`)."""
    contents = [rows[row] for row in row_ids]
    length = max(sum(len(document.tokens) for document in documents) for documents in contents)
    document_ids = torch.full((len(contents), length), pad_token_id)
    segment_ids, completion_ids = torch.full((len(contents), length), -1), torch.full((len(contents), length), -1)
    for index, documents in enumerate(contents):
        start, completion = 0, 0
        for segment, document in enumerate(documents):
            own = slice(start, start + len(document.tokens))
            document_ids[index, own], segment_ids[index, own] = torch.tensor(document.tokens), segment
            for first, end in document.spans:
                completion_ids[index, start + first : start + end] = completion
                completion += 1
            start = own.stop
    anchors, valid = find_anchors(
        segment_ids,
        completion_ids,
        context_length=context_length,
        min_completion_prefix=min_completion_prefix,
        stride=stride,
        num_generated=num_generated,
    )
    return Batch(row_ids, keys, document_ids, segment_ids, completion_ids, anchors, valid)


def rollout_uniforms(seed: int, keys: list[int], num_anchors: int, num_samples: int, num_generated: int) -> Tensor:
    """The uniform numbers that rollouts are drawn with: a function of seed and each row's key, whichever process runs the row. (B, A, N, G)."""
    shape = (num_anchors, num_samples, num_generated)
    return torch.from_numpy(
        np.stack(
            [np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, key]))).random(shape) for key in keys]
        )
    )
