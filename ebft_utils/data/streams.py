"""Rows of a dataset that is read while training (data.streaming), block after block."""

import hashlib
from collections import deque
from collections.abc import Callable
from itertools import islice

import numpy as np
from accelerate import PartialState

from ..config.modes import Config
from ..config.settings import UserError
from .documents import Document, Tokenizing
from .sources import Noted, Source, load_table, reading_fault
from .tables import Tally, columns_read, digest_of

ENOUGH_ROWS = 100  # of a stream, from which the share of bad ones is judged


class StreamedRows(Noted):
    """Rows of a stream, read when they are asked for. rows[position] is the row at a position of the endless series.

    The stream is cut into blocks of block_size dataset rows. The usable documents of a block, with all pieces of
    its texts, are packed and shuffled.
    When the stream ends it begins again, with its blocks in other orders.

    Args:
        name: for messages.
        open_at(number): the stream's rows from that one on, an iterator of dicts.
        make(rows, number of the first): their usable documents.
        pack(documents, seed): the documents of each row.
        keep: how many positions before the newest one can still be asked for.
        form: what rows[position] makes of the row's documents.
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
        # [epoch, block, position of its first row] of each block in memory. A checkpoint saves them.
        self.places: list[list[int]] = []
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
        """The row at a position of the endless series: the position itself."""
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
        """Differs between streams whose first rows differ."""
        return f"a stream, {self.first_rows}"

    def go_on_from(self, places: list, position: int) -> None:
        """Goes to the block of a position without tokenising what comes before it. places: as in a checkpoint."""
        before = (place for place in places if place[2] <= position)
        self._restart(*max(before, key=lambda place: place[2], default=(0, 0, 0)))


class Stream:
    """A source that is read row after row.

    begin: how many of its first rows are held out for evaluation; copies: digests of documents that are not trained on.
    """

    def __init__(self, config: Config, tokenizer, source: Source):
        self.table = columns_read(load_table(source, streaming=True), source)
        self.source, self.tokenizing = source, Tokenizing(config, tokenizer, source)
        self.begin, self.copies = 0, set()
        self.tally, self.furthest, self.say_at = Tally(config, source, "the first "), -1, 1
        self.notes_before = list(source.notes)

    def open_at(self, number: int):
        """The rows for training from that one on. A resumed run counts from there."""
        if self.begin + number > self.furthest + 1:
            self.tally, self.furthest = Tally(self.tokenizing.config, self.source), self.begin + number - 1
        return self._reading(iter(self.table.skip(self.begin + number)))

    def documents(self, rows: list[dict], first: int) -> list[Document]:
        """The usable documents of some rows. first: the number of the first row."""
        numbers = [self.begin + first + index for index in range(len(rows))]
        found = self.tokenizing.documents(rows, numbers)
        texts = [pieces for pieces in found if not isinstance(pieces, str)]
        new = numbers[-1] > self.furthest
        if new:  # a second epoch is not counted again
            self.furthest = numbers[-1]
            self._count([problem for problem in found if isinstance(problem, str)], texts)
        if not new or len(rows) < self.tokenizing.config.data.shuffle_buffer or self.tally.rows >= ENOUGH_ROWS:
            self.tally.check()  # all rows have been read, or enough
        if self.copies:
            texts = [pieces for pieces in texts if not self.copies & set(map(digest_of, pieces))]
        return [document for pieces in texts for document in pieces]

    def _count(self, problems: list[str], texts: list[list[Document]]) -> None:
        """Counts what is not trained on, and says it whenever it has doubled."""
        tally, documents = self.tally, [document for pieces in texts for document in pieces]
        columns = [(len(found.tokens), found.piece, found.unused, found.lost_ends) for found in documents]
        tally.add_problems(problems)
        if documents:
            tally.add(*np.array(columns).T)
        notes = tally.notes()
        self.source.notes[:] = [*self.notes_before, *notes]
        number = tally.left + tally.long_texts + tally.long_answers
        if number >= self.say_at:
            self.say_at = 2 * number
            PartialState().print("\n".join(notes))

    def first(self, number: int) -> tuple[list[Document], int]:
        """The first usable documents, of each its first piece, and how many rows they took."""
        stream, documents, taken = self._reading(iter(self.table)), [], 0
        for row in stream if number else ():
            (found,) = self.tokenizing.documents([row], [taken])
            documents += [] if isinstance(found, str) else found[:1]
            taken += 1
            if len(documents) == number:
                return documents, taken
        if number:
            raise UserError(
                f"eval.num_documents: {number} cannot be taken out of the {len(documents)} usable documents of "
                f"{self.source}; lower it, or set eval.dataset"
            )
        return documents, taken

    def _reading(self, stream):
        try:
            yield from stream
        except Exception as error:  # network, file system, decompression, parsers: nothing else runs in here
            raise UserError(f"{self.source.key}: {reading_fault(error, self.source, 'read on')}") from None
