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
    }
)


def documents_from(columns: dict[str, list]) -> list[Document]:
    """Rows of a tokenised table as documents."""
    return [
        Document(tokens, list(zip(spans[::2], spans[1::2], strict=True)))
        for tokens, spans in zip(columns["input_ids"], columns["spans"], strict=True)
    ]


def table_of(documents: list[Document]) -> datasets.Dataset:
    """Documents as a tokenised table in memory."""
    rows = [_row_of(document) for document in documents]
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in COLUMNS}, features=COLUMNS)


def _row_of(document: Document | None, problem: str = "") -> dict:
    if document is None:
        return {"input_ids": [], "spans": [], "num_tokens": 0, "digest": 0, "problem": problem}
    tokens = document.tokens
    digest = hashlib.blake2b(np.array(tokens, dtype=np.int32).tobytes(), digest_size=8).digest()
    return {
        "input_ids": tokens,
        "spans": list(itertools.chain.from_iterable(document.spans)),
        "num_tokens": len(tokens),
        "digest": int.from_bytes(digest, "little", signed=True),
        "problem": "",
    }


def load_documents(config: Config, tokenizer: PreTrainedTokenizerBase, source: Source) -> datasets.Dataset:
    """The usable documents of a source (columns: COLUMNS), from the cache where they were made before.

    Raises UserError when there are none.
    """
    table, tokenizing = columns_read(load_table(source), source), Tokenizing(config, tokenizer, source)
    key = cache_key(config, tokenizer, source, table)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ebft" / key

    def tokenize(columns: dict, numbers: list[int]) -> dict:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        made = tokenizing.documents(rows, numbers)
        found = [_row_of(None, result) if isinstance(result, str) else _row_of(result) for result in made]
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
    kept = np.flatnonzero(lengths)
    if len(kept) < len(lengths):
        left_out = LeftOut(source)
        left_out.add(documents.select(np.flatnonzero(lengths == 0))["problem"][:])
        words = left_out.text(f"of {len(lengths)}")
        if len(kept) == 0:
            raise UserError(f"{source.key}: {source} has no row that can be used. {words}")
        PartialState().print(words)
    return documents.select(kept)


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


class LeftOut:
    """Counts the rows of a source that are left out, by the kind of their problem."""

    def __init__(self, source: Source):
        self.source, self.number, self.kinds, self.examples = source, 0, Counter(), {}

    def add(self, problems: list[str]) -> None:
        """problems: why each row is left out; "" where the transform did that."""
        for problem in problems:
            # the kind: the problem without what belongs to this row, such as numbers and quoted text
            kind = re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "", problem).partition("; text")[0]
            example = f"like {problem}" if problem else f"by the transform {self.source.transform.name}"
            self.number += 1
            self.kinds[kind] += 1
            self.examples.setdefault(kind, example)

    def text(self, of: str) -> str:
        """How many rows, and why: one example of each of the commonest kinds."""
        common = self.kinds.most_common(4)
        reasons = [f"{count} {self.examples[kind]}" for kind, count in common]
        others = self.number - sum(count for _, count in common)
        if others:
            reasons.append(f"{others} for other reasons")
        return f"data: {self.number} {of} rows of {self.source} left out: {'; '.join(reasons)}"


def cache_key(config: Config, tokenizer: PreTrainedTokenizerBase, source: Source, table: datasets.Dataset) -> str:
    """The name of a tokenised table in the cache. It is equal for equal content, settings, tokenizer and code.

    The content is the table's fingerprint in `datasets`: paths and modification times of files, the revision on the
    hub, the text itself for text in memory.
    """
    data, ebft = config.data, config.ebft
    if config.mode == "strided":
        limits = [data.sequence_length, data.append_eos]
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
