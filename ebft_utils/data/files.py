"""Local files that are not what their names say: found before anything reads them, and named with a remedy."""

import codecs
import gzip
import json
import zlib
from pathlib import Path

from ..config.settings import UserError

TEXT_KINDS = (".jsonl", ".json", ".csv", ".txt")
CHUNK = 2**22  # bytes that are decoded at a time


def check_file(file: Path, kind: str, key: str) -> None:
    """Raises UserError, in one line, for a file that cannot be read as its name says.

    kind: the suffix without .gz; key: the setting that names it.
    """
    packed = file.suffix == ".gz"
    with file.open("rb") as stream:
        start = stream.read(4)
    if packed and start[:2] != b"\x1f\x8b":
        raise UserError(f"{key}: {file} is named .gz and is no gzip file; rename it to {file.stem}, or compress it")
    if not packed and start[:2] == b"\x1f\x8b" and kind in TEXT_KINDS:
        raise UserError(f"{key}: {file} is a gzip file; rename it to {file.name}.gz, or unpack it")
    if kind == ".parquet":
        _check_parquet(file, key)
    if kind in TEXT_KINDS:
        first = _check_text(file, packed, key)
        if kind == ".csv" and ";" in first and "," not in first:
            raise UserError(
                f"{key}: {file} separates its columns with ';', and a .csv file is read with ','; "
                "save it with commas, or as .jsonl"
            )


def _check_parquet(file: Path, key: str) -> None:
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 4))
        end = stream.read(4)
    if start != b"PAR1":
        raise UserError(f"{key}: {file} is no Parquet file; name it after what it is ({', '.join(TEXT_KINDS)})")
    if end != b"PAR1":
        raise UserError(f"{key}: {file} is cut off: the end of a Parquet file is missing; copy or download it again")


def _check_text(file: Path, packed: bool, key: str) -> str:
    """The first line of a file that is UTF-8 as a whole."""
    decoder, first, place = codecs.getincrementaldecoder("utf-8")(), None, 0
    try:
        with gzip.open(file, "rb") if packed else file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                text = decoder.decode(chunk)
                first = text.partition("\n")[0] if first is None else first
                place += len(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: {file} is not UTF-8 text (byte {place + error.start}); convert it, for example from Latin-1: "
            f"iconv -f latin1 -t utf-8 {file.name} > new{''.join(file.suffixes)}"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{key}: {file} cannot be unpacked: {error}; copy or download it again") from None
    return first or ""


def field_of(file: Path, kind: str, split: str, key: str) -> str | None:
    """The key under which a .json file keeps its rows: {"data": [..]}, or {"train": [..], "test": [..]} by split.

    None for a list of rows, and for rows that stand one in a line. Raises UserError for any other object.
    """
    if kind != ".json":
        return None
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        if stream.read(1024).lstrip()[:1] != "{":
            return None
        stream.seek(0)
        try:
            whole = json.load(stream)
        except ValueError:  # an object in each line
            return None
    lists = [name for name, value in whole.items() if isinstance(value, list)]
    rows = [name for name in lists if all(isinstance(row, dict) for row in whole[name])]
    for name in (split, "data"):
        if name in rows:
            return name
    if rows:
        raise UserError(
            f"{key}.split: {file} has rows under {', '.join(rows)}, and none under {split!r}; take one of them"
        )
    return None
