"""Documents as tokenised tables: a whole dataset is tokenised once, and read from the cache from then on."""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import transformers
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ..config.modes import Config
from ..config.settings import UserError
from .documents import Document, Tokenizing
from .sources import UNREADABLE, Source, load_table, reading_fault

SUMS_FILE, LOCK_FILE = "SHA256SUMS", ".lock"
COLUMNS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "spans": datasets.List(datasets.Value("int32")),  # start, end, start, end, ..
        "num_tokens": datasets.Value("int32"),
        "digest": datasets.Value("int64"),  # of the tokens alone: finds copies of held-out texts, whatever is learnt
        "problem": datasets.Value("string"),  # why the row cannot be used
        "piece": datasets.Value("int32"),  # this and the next two: see Document
        "unused": datasets.Value("int64"),
        "lost_ends": datasets.Value("int32"),
    }
)


def documents_from(columns: dict[str, list]) -> list[Document]:
    """Rows of a tokenised table as documents."""
    names = ("input_ids", "spans", "piece", "unused", "lost_ends")
    return [
        Document(tokens, list(zip(spans[::2], spans[1::2], strict=True)), *numbers)
        for tokens, spans, *numbers in zip(*(columns[name] for name in names), strict=True)
    ]


def table_of(documents: list[Document]) -> datasets.Dataset:
    """Documents as a tokenised table in memory."""
    rows = [_row_of(document) for document in documents]
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in COLUMNS}, features=COLUMNS)


def _row_of(document: Document | None, problem: str = "") -> dict:
    if document is None:
        empty = {"input_ids": [], "spans": [], "num_tokens": 0, "digest": 0, "piece": 0, "unused": 0, "lost_ends": 0}
        return {**empty, "problem": problem}
    tokens = document.tokens
    return {
        "input_ids": tokens,
        "spans": list(itertools.chain.from_iterable(document.spans)),
        "num_tokens": len(tokens),
        "digest": digest_of(document),
        "problem": "",
        "piece": document.piece,
        "unused": document.unused,
        "lost_ends": document.lost_ends,
    }


def digest_of(document: Document) -> int:
    """The same for equal tokens."""
    digest = hashlib.blake2b(np.array(document.tokens, dtype=np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def text_numbers(documents: datasets.Dataset) -> np.ndarray:
    """For each document of a table the number of the text that it is a piece of, from 0."""
    return np.cumsum(np.array(documents["piece"][:]) == 0) - 1


def load_documents(config: Config, tokenizer: PreTrainedTokenizerBase, source: Source) -> datasets.Dataset:
    """The usable documents of a source (columns: COLUMNS), from the cache where they were made before.

    The pieces of a text stand one after the other. What is left out and cut is said (Source.notes). Raises UserError
    when no row can be used, or fewer than data.max_skipped allows.
    """
    table, tokenizing = columns_read(load_table(source), source), Tokenizing(config, tokenizer, source)
    key = cache_key(config, tokenizer, source, table)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ebft" / key

    def tokenize(columns: dict, numbers: list[int]) -> dict:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        made = tokenizing.documents(rows, numbers)
        found = []
        for result in made:
            found += [_row_of(None, result)] if isinstance(result, str) else map(_row_of, result)
        return {name: [row[name] for row in found] for name in COLUMNS}

    def tokenised() -> datasets.Dataset:
        return table.map(
            tokenize,
            batched=True,
            with_indices=True,
            remove_columns=table.column_names,
            features=COLUMNS,
            num_proc=config.data.num_proc if config.data.num_proc > 1 else None,
            cache_file_name=str(folder / "tokens.arrow"),
            new_fingerprint=key,
            desc=f"tokenising {source.dataset}",
        )

    try:
        documents = cached(folder, tokenised)
    except UnicodeDecodeError as error:  # a file in another encoding, beyond its beginning
        raise UserError(f"{source.key}: {reading_fault(error, source, 'read')}") from None
    lengths = np.array(documents["num_tokens"][:])
    kept, tally = np.flatnonzero(lengths), Tally(config, source)
    tally.add_problems(documents.select(np.flatnonzero(lengths == 0))["problem"][:])
    documents = documents.select(kept)
    tally.add(*(np.array(documents[name][:], dtype=int) for name in ("num_tokens", "piece", "unused", "lost_ends")))
    if len(kept) == 0:
        raise UserError(f"{source.key}: {source} has no row that can be used. {tally.left_out()}")
    tally.check()
    for note in tally.notes():
        source.note(note)
    return documents


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def cached(folder: Path, make: Callable[[], datasets.Dataset]) -> datasets.Dataset:
    """The table of a folder of the cache, made where it is not there. make() writes it, or reads what is there.

    The files' checksums lie beside them in SHA256SUMS, written last. Files that do not have them are damaged, or left
    by a run that was killed: they are named, thrown away and made again. Only the first process of a machine looks,
    because the others come after it.
    """
    if not PartialState().is_local_main_process or (folder.is_dir() and _damage_of(folder) is None):
        return make()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        damage = _damage_of(folder)
        if damage is None:  # another run has made it meanwhile
            return make()
        leftovers = [path for path in folder.iterdir() if path.name != LOCK_FILE]
        if leftovers:
            print(f"data: the cache of tokens {folder} is damaged ({damage}): thrown away, and tokenised again")
        for path in leftovers:
            path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
        documents = make()
        sums = "".join(f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.arrow")))
        if sums:  # a table without rows has no file
            temporary = folder / f"{SUMS_FILE}.tmp"
            temporary.write_text(sums)
            os.replace(temporary, folder / SUMS_FILE)
        return documents


def _damage_of(folder: Path) -> str | None:
    """What is wrong with the files of a table, None when they are as written."""
    files = {path.name: path for path in folder.glob("*.arrow")}
    try:
        if not (folder / SUMS_FILE).is_file():
            return "it is not whole"
        expected = dict(reversed(line.split("  ", 1)) for line in (folder / SUMS_FILE).read_text().splitlines())
        if not expected or expected.keys() != files.keys():
            return "its files are not those of its checksums"
        wrong = [name for name in expected if not files[name].is_file() or _sha256(files[name]) != expected[name]]
    except (OSError, ValueError) as error:  # ValueError: no list of checksums
        return f"{SUMS_FILE} or a file that it names cannot be read: {type(error).__name__}"
    return f"{wrong[0]} is not what was written" if wrong else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _alone(folder: Path):
    """Keeps other runs from making the same table at the same time. The lock ends with the process."""
    with (folder / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"data: another run is at work on the same tokens, in {folder}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def columns_read(table, source: Source):
    """A table or stream with only the columns that the transform reads: an image would be decoded for nothing."""
    if table.column_names is None:
        return table
    names = source.transform.columns_read(source.columns, table.column_names)
    hidden = [name for name in table.column_names if name == UNREADABLE and name not in names]
    return table.select_columns([*names, *hidden])


class Tally:
    """Counts what of a source is not trained on: rows that are left out, and documents that are too long.

    first: before the numbers of rows and documents, for a stream "the first ".
    """

    def __init__(self, config: Config, source: Source, first: str = ""):
        self.config, self.source, self.first = config, source, first
        self.left, self.kinds, self.examples = 0, Counter(), {}
        self.documents, self.tokens = 0, 0
        self.long_texts, self.text_rows, self.unused_of_texts = 0, 0, 0
        self.long_answers, self.lost_ends, self.unused_of_answers = 0, 0, 0

    def add_problems(self, problems: list[str]) -> None:
        """problems: why each row is left out; "" where the transform did that."""
        for problem in problems:
            # the kind: the problem without what belongs to this row, such as numbers and quoted text
            kind = re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "", problem).partition("; text")[0]
            example = f"like {problem}" if problem else f"by the transform {self.source.transform.name}"
            self.left += 1
            self.kinds[kind] += 1
            self.examples.setdefault(kind, example)

    def add(self, num_tokens: np.ndarray, piece: np.ndarray, unused: np.ndarray, lost_ends: np.ndarray) -> None:
        """Columns of usable documents, as in COLUMNS. The pieces of a text stand one after the other."""
        firsts = np.flatnonzero(piece == 0)
        pieces, unused, lost_ends = np.diff([*firsts, len(piece)]), unused[firsts], lost_ends[firsts]
        cut_answers = lost_ends > 0
        long_texts = ((unused > 0) | (pieces > 1)) & ~cut_answers
        self.documents += len(firsts)
        self.tokens += int(num_tokens.sum() + unused.sum())
        self.long_texts += int(long_texts.sum())
        self.text_rows += int(pieces[long_texts].sum())
        self.unused_of_texts += int(unused[long_texts].sum())
        self.long_answers += int(cut_answers.sum())
        self.lost_ends += int(lost_ends.sum())
        self.unused_of_answers += int(unused[cut_answers].sum())

    @property
    def rows(self) -> int:
        """How many rows of the dataset have been counted."""
        return self.left + self.documents

    def check(self) -> None:
        """Raises UserError when more than data.max_skipped of the rows are bad.

        Rows that the transform leaves out are not bad, and do not count.
        """
        rows, limit = self.rows - self.kinds[""], self.config.data.max_skipped
        bad = self.left - self.kinds[""]
        if bad > limit * rows:
            raise UserError(
                f"{self.source.key}: {bad} of {self.first}{rows} rows of {self.source} are bad: "
                f"{share_of(bad, rows)}, and data.max_skipped is {limit:g}: {self._reasons()}; mend them or the "
                "settings that they name, or raise data.max_skipped where so many are expected"
            )

    def _reasons(self) -> str:
        common = self.kinds.most_common(4)
        reasons = [f"{count} {self.examples[kind]}" for kind, count in common]
        others = self.left - sum(count for _, count in common)
        return "; ".join([*reasons, f"{others} for other reasons"] if others else reasons)

    def left_out(self) -> str:
        """How many rows are left out, and why: one example of each of the commonest kinds."""
        return f"data: {self.left} of {self.first}{self.rows} rows of {self.source} left out: {self._reasons()}"

    def notes(self) -> list[str]:
        """What is not trained on, in a sentence for each kind. Empty when everything is."""
        data, found = self.config.data, [self.left_out()] if self.left else []

        def longer(number: int) -> str:
            of = f"data: {number} of {self.first}{self.documents} documents of {self.source}"
            are = "is" if number == 1 else "are"
            return f"{of} {are} longer than data.sequence_length {data.sequence_length}"

        if self.long_texts:
            unused = f"{share_of(self.unused_of_texts, self.tokens)} of the tokens are not used"
            if self.source.key == "eval":
                how = "the beginning of each is evaluated"
            elif data.long_documents == "cut":
                how = f"cut, {unused} (data.long_documents: split would use them)"
            else:
                how = f"split into {self.text_rows} rows, {unused} (last pieces without room for an anchor)"
            found.append(f"{longer(self.long_texts)}: {how}")
        if self.long_answers:
            ends = f"{self.lost_ends} answer{'s' if self.lost_ends > 1 else ''} lost the end"
            unused = f"{share_of(self.unused_of_answers, self.tokens)} of the tokens are not used"
            found.append(f"{longer(self.long_answers)}: cut, {ends}, {unused}; raise data.sequence_length to keep them")
        return found


def share_of(number: int, total: int) -> str:
    """A share in percent: 0 % and 100 % stand for none and all alone."""
    percent = 100 * number / total if total else 0.0
    if 0 < number < total:
        percent = min(max(percent, 0.1), 99.9)
    return f"{percent:.0f} %" if 10 <= percent < 99 or number in (0, total) else f"{percent:.1f} %"


def cache_key(config: Config, tokenizer: PreTrainedTokenizerBase, source: Source, table: datasets.Dataset) -> str:
    """The name of a tokenised table in the cache. It is equal for equal content, settings, tokenizer and code.

    The content is the table's fingerprint in `datasets`: paths and modification times of files, the revision on the
    hub, the text itself for text in memory.
    """
    data, ebft = config.data, config.ebft
    if config.mode == "strided":
        limits = [data.sequence_length, data.append_eos, data.long_documents]
        limits += [ebft.context_length, ebft.min_completion_prefix, ebft.generate_max_len]
    else:
        limits = [data.max_prompt_length, ebft.max_completion_length, config.longest_sequence[0]]
    files = [Path(__file__).with_name(f"{name}.py") for name in ("tables", "documents", "templates", "control")]
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    transform = [source.transform.name, source.transform.version, vars(source.columns), source.apply_chat_template]
    settings = [data.enable_thinking, data.allow_control_tokens, config.mode, limits, data.on_bad_row]
    versions = [transformers.__version__, tokenizers.__version__]
    parts = [code, versions, table._fingerprint, len(table), transform, settings, tokenizer_digest(tokenizer)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Differs between tokenizers that make different tokens of some text."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # a call with truncation or padding leaves its setting behind
        tokenizer.backend_tokenizer.no_padding()
        inner = tokenizer.backend_tokenizer.to_str()
    else:
        inner = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    parts = [inner, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
