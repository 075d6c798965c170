"""Documents -> rows, and which rows each optimizer step trains on.

A row is what the model sees in one line of a batch: one document, or several with `data.packing`. Each piece of a long
raw text (data.long_documents) is a document there; it is held out, or left out as a copy, with all others of its text.
Rows form an endless series. Which of them make up an optimizer step depends only on (seed, step), so a run resumes
where it stopped, and the number of processes does not matter.

    Rows          documents that are all there: epoch after epoch, each in its own order
    StreamedRows  documents of a stream (streams.py), in blocks of data.shuffle_buffer rows, each in its own order
    MixedRows     several of these, by weight
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import datasets
import numpy as np
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ..config.data import MIX_BLOCK
from ..config.modes import Config
from ..config.settings import UserError
from .documents import Document
from .sources import Noted, Source, evaluation_source, training_sources
from .streams import Stream, StreamedRows
from .tables import documents_from, load_documents, share_of, table_of, text_numbers

DEFAULT_EVALUATION = 64  # held-out documents; also at most a tenth of the data, unless it is a stream of unknown size
LARGE_SHARE = 0.2  # of the documents; when more are held out, the run says so


class Rows(Noted):
    """Rows of documents that are all there.

    Args:
        documents: a tokenised table. members: the documents of each row.
        seed: of the order; several numbers for the sources of a mixture.
        form: what rows[i] makes of the row's documents.
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
        """The row at a position of the endless series: every row once in each epoch, in a new order."""
        epoch, index = divmod(position, len(self))
        return int(_epoch_order(len(self), self.seed, epoch)[index])

    def fingerprint(self) -> str:
        """Differs between different data: the number of rows, and a digest of up to 64 of them."""
        digest = hashlib.sha256()
        for row in range(0, len(self), -(-len(self) // 64)):
            digest.update(repr(self[row]).encode())
        return f"{len(self)} rows, {digest.hexdigest()[:12]}"

    def go_on_from(self, places: list, position: int) -> None:
        """Does nothing: all rows are there."""


# A step reads one epoch of a source, or two at its end. Shuffling millions of rows at every step would be slower than
# the step itself.
@lru_cache(maxsize=16)
def _epoch_order(num_rows: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    return np.random.default_rng([*seed, epoch]).permutation(num_rows)


class MixedRows(Noted):
    """Rows of several sources, each with its exact share of every MIX_BLOCK rows. A row is (source, its row)."""

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
        """Brings each source to where it is at that position."""
        block, index = divmod(position, MIX_BLOCK)
        turns = _mixed_turns(tuple(self.counts), self.seed, block)[:index]
        for number, (source, own) in enumerate(zip(self.sources, places, strict=True)):
            source.go_on_from(own, block * int(self.counts[number]) + int((turns == number).sum()))


@lru_cache(maxsize=4)
def _mixed_turns(counts: tuple[int, ...], seed: int, block: int) -> np.ndarray:
    return np.random.default_rng([seed, block]).permutation(np.repeat(np.arange(len(counts)), counts))


def rows_of_step(rows: Rows | StreamedRows | MixedRows, step: int, rows_per_step: int) -> list:
    """The rows of the global batch of an optimizer step (counted from 0): the next ones of the endless series.

    No row is dropped at the end of an epoch: a batch may hold the last rows of one epoch and the first of the next.
    """
    return [rows.row_at(position) for position in range(step * rows_per_step, (step + 1) * rows_per_step)]


def one_a_row(num_documents: int) -> np.ndarray:
    """One document a row. (An array, because millions of lists would take a hundred bytes each.)"""
    return np.arange(num_documents)[:, None]


def pack_documents(lengths: list[int], sequence_length: int, seed) -> list[list[int]]:
    """The documents of each row: whole documents in a shuffled order, up to sequence_length tokens a row.

    A new row begins when the next document does not fit.
    """
    members, room = [], 0
    for document in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        if lengths[document] > room:
            members.append([])
            room = sequence_length
        members[-1].append(document)
        room -= lengths[document]
    return members


# ----------------------------------------------------------------------------------------------------------------------
# What a run trains and evaluates on


def load_rows(
    config: Config, tokenizer: PreTrainedTokenizerBase, form: Callable = list
) -> tuple[Rows | StreamedRows | MixedRows, Rows | None]:
    """Rows to train on, and held-out rows, of which no copy is trained on.

    Held-out rows hold one document each, of a long text its first piece. They are None when eval.num_documents is 0.
    """
    sources = training_sources(config)
    judged = sources if config.eval.dataset is None else [evaluation_source(config)]
    load = _streams if config.data.streaming else _tables
    train, held_out = load(config, tokenizer, sources, judged, form)
    held_out = None if held_out is None else Rows(held_out, one_a_row(len(held_out)), form=form)
    rows = train[0]
    if config.data.mix is not None:
        rows = MixedRows(train, [source.weight for source in sources], config.train.seed)
    rows.read_from = tuple(sources) if judged is sources else (*sources, *judged)
    return rows, held_out


def _order_seed(config: Config, number: int) -> tuple[int, ...]:
    return (config.train.seed,) if config.data.mix is None else (config.train.seed, number)


def _packs(config: Config) -> bool:
    return config.mode == "strided" and config.data.packing


def _shares(sources: list[Source], number: int) -> list[int]:
    """A number of documents, divided over the sources by weight."""
    weights = [source.weight for source in sources]
    return np.diff(np.floor(np.cumsum([0.0, *weights]) / sum(weights) * number + 0.5).astype(int)).tolist()


def _tables(config: Config, tokenizer, sources: list[Source], judged: list[Source], form: Callable):
    """Rows of each source, and the documents for evaluation (None: no evaluation). judged: where those come from."""
    train = [load_documents(config, tokenizer, source) for source in sources]
    train, held_out = hold_out(config, tokenizer, sources, judged, train)
    rows = []
    for number, documents in enumerate(train):
        members = one_a_row(len(documents))
        if _packs(config):
            members = pack_documents(documents["num_tokens"][:], config.data.sequence_length, config.train.seed)
        rows.append(Rows(documents, members, _order_seed(config, number), form))
    return rows, held_out


def hold_out(
    config: Config, tokenizer, sources: list[Source], judged: list[Source], train: list[datasets.Dataset]
) -> tuple[list[datasets.Dataset], datasets.Dataset | None]:
    """Documents of each source to train on, and the documents for evaluation (None: no evaluation).

    The latter are those of eval.dataset, or are taken out of the sources by their weights. Of a long text the first
    piece is evaluated, and no other one is trained on.
    """
    evaluation = config.eval
    taken_out = judged is sources
    pools = train if taken_out else [load_documents(config, tokenizer, source) for source in judged]
    firsts = [np.flatnonzero(np.array(pool["piece"][:]) == 0) for pool in pools]
    total, wanted = sum(map(len, firsts)), evaluation.num_documents
    if wanted is None:
        limits = [len(first) // 10 if taken_out else len(first) for first in firsts]
        numbers = _shares(judged, min(DEFAULT_EVALUATION, total // 10 if taken_out else total))
        numbers = [min(pair) for pair in zip(numbers, limits, strict=True)]
        PartialState().print(f"data: {sum(numbers)} of {total} documents are for evaluation (eval.num_documents)")
    else:
        numbers = _shares(judged, wanted)
    spare = taken_out and not evaluation.only  # something must be left to train on
    for source, first, number in zip(judged, firsts, numbers, strict=True):
        if number > len(first) - spare:
            share = f", of which {number}," if len(pools) > 1 else ""
            rest, instead = (" and leave any to train on", ", or set eval.dataset") if spare else ("", "")
            raise UserError(
                f"eval.num_documents: {wanted}{share} cannot be taken out of the {len(first)} usable documents of "
                f"{source}{rest}; lower it{instead}"
            )
        if spare and number > LARGE_SHARE * len(first):
            source.note(
                f"data: {number} of {len(first)} documents of {source} ({share_of(number, len(first))}) are held out "
                "and not trained on (eval.num_documents); a tenth is usually enough"
            )
    if sum(numbers) == 0:
        return train, None
    seeds = [evaluation.seed if len(pools) == 1 else [evaluation.seed, number] for number in range(len(pools))]
    orders = [np.random.default_rng(seed).permutation(len(first)) for seed, first in zip(seeds, firsts, strict=True)]
    chosen = [np.sort(order[:number]) for order, number in zip(orders, numbers, strict=True)]
    cut = list(zip(pools, firsts, chosen, strict=True))
    held_out = datasets.concatenate_datasets([pool.select(first[texts]) for pool, first, texts in cut])
    if not evaluation.only and train:
        if taken_out:
            train = [pool.select(np.flatnonzero(~np.isin(text_numbers(pool), texts))) for pool, _, texts in cut]
        train = [_without_copies(documents, held_out, source) for documents, source in zip(train, sources, strict=True)]
    return train, held_out


def _without_copies(documents: datasets.Dataset, held_out: datasets.Dataset, source: Source) -> datasets.Dataset:
    """The documents that differ in some token from every held-out one. Datasets often hold a text twice.

    A text is left out with all its pieces when one of them is a copy.
    """
    texts = text_numbers(documents)
    copies = np.unique(texts[np.isin(documents["digest"][:], held_out["digest"][:])])
    kept = np.flatnonzero(~np.isin(texts, copies))
    if not len(kept):
        same = f"every other document of {source} is a copy of a held-out one"
        raise UserError(f"eval.num_documents: {same}: nothing is left to train on")
    if len(copies):
        source.note(f"data: {len(copies)} documents of {source} left out of training: copies of held-out ones")
    return documents.select(kept)


def _streams(config: Config, tokenizer, sources: list[Source], judged: list[Source], form: Callable):
    """The same for streams. Their first usable documents are held out when eval.dataset is null."""
    evaluation, data = config.eval, config.data
    held_out, taken = None, [0] * len(sources)
    streams = [Stream(config, tokenizer, source) for source in sources]
    if evaluation.dataset is not None:
        _, held_out = hold_out(config, tokenizer, sources, judged, [])
    elif evaluation.num_documents != 0:
        wanted = DEFAULT_EVALUATION if evaluation.num_documents is None else evaluation.num_documents
        shares = _shares(sources, wanted)
        found = [stream.first(share) for stream, share in zip(streams, shares, strict=True)]
        held_out = table_of([document for documents, _ in found for document in documents])
        taken = [number for _, number in found]
    copies = set() if held_out is None else set(held_out["digest"][:])
    if evaluation.only:  # nothing is trained on, so held-out documents are not kept apart
        taken, copies = [0] * len(sources), set()
    pack = _pack_block(config)
    keep = 2 * config.train.batch_size  # completions are written a step ahead (ebft.async_prefetch)
    rows = []
    for number, stream in enumerate(streams):
        stream.begin, stream.copies = taken[number], copies
        name, seed = f"{stream.source.key}: {stream.source}", _order_seed(config, number)
        open_at, make = stream.open_at, stream.documents
        rows.append(StreamedRows(name, open_at, make, pack, data.shuffle_buffer, seed, keep, form))
    return rows, held_out


def _pack_block(config: Config) -> Callable:
    def pack(documents: list[Document], seed: list[int]) -> list[list[Document]]:
        if _packs(config):
            lengths = [len(document.tokens) for document in documents]
            members = pack_documents(lengths, config.data.sequence_length, seed)
        else:
            members = np.random.default_rng(seed).permutation(len(documents))[:, None].tolist()
        return [[documents[document] for document in row] for row in members]

    return pack
