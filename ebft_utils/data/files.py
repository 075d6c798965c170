"""Local files that are not what their names say: what is wrong with one, in words, and what to do about it.

The first bytes of every file are looked at before anything reads it. The rest is looked at when reading it has failed,
or before that where such files are left out: a file of 100 GB is not read twice.
"""

import codecs
import csv
import gzip
import itertools
import json
import zlib
from pathlib import Path

TEXT_KINDS = (".jsonl", ".json", ".csv", ".txt")
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
CHUNK = 2**22  # bytes that are decoded at a time
AGAIN = "copy or download it again"
ENCODINGS = {  # how other encodings begin
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def fault_of(file: Path, kind: str, whole: bool) -> str | None:
    """Why a file cannot be what its name says, and the remedy. None: it can.

    kind: the suffix without .gz; whole: look at all of it, not only at its beginning.
    """
    packed = file.suffix == ".gz"
    with file.open("rb") as stream:
        start = stream.read(4)
    if packed and start[:2] != b"\x1f\x8b":
        return f"{file} is named .gz and is no gzip file; rename it to {file.stem}, or compress it"
    if not packed and start[:2] == b"\x1f\x8b" and kind in TEXT_KINDS:
        return f"{file} is a gzip file; rename it to {file.name}.gz, or unpack it"
    if kind == ".parquet":
        return _fault_of_parquet(file)
    return _fault_of_text(file, kind, packed, whole) if kind in TEXT_KINDS else None


def _fault_of_parquet(file: Path) -> str | None:
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 4))
        end = stream.read(4)
    if start != b"PAR1":
        return f"{file} is no Parquet file; name it after what it is ({', '.join(TEXT_KINDS)})"
    return f"{file} is cut off: the end of a Parquet file is missing; {AGAIN}" if end != b"PAR1" else None


def _fault_of_text(file: Path, kind: str, packed: bool, whole: bool) -> str | None:
    decoder, place, start = codecs.getincrementaldecoder("utf-8-sig")(), 0, None
    try:
        with gzip.open(file, "rb") if packed else file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                start = start or chunk[:4096]
                waiting = len(decoder.getstate()[0])  # bytes of a character that the last chunk began
                decoder.decode(chunk)
                place += len(chunk)
                if not whole:
                    break
            else:
                decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        found = next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), None)
        convert = f"iconv -f {found or 'latin1'} -t utf-8 {file.name} > new{''.join(file.suffixes).removesuffix('.gz')}"
        guess = f"it is {found}; convert it" if found else "convert it, for example from Latin-1"
        if packed:
            guess = f"{guess}, unpacked"
        return f"{file} is not UTF-8 text (byte {place - waiting + error.start}); {guess}: {convert}"
    except (OSError, EOFError, zlib.error) as error:
        return f"{file} cannot be unpacked: {error}; {AGAIN}"
    first = (start or b"").decode("utf-8", "replace").lstrip("\ufeff").partition("\n")[0]
    other = next((mark for mark in (";", "\t") if kind == ".csv" and mark in first and "," not in first), None)
    if other is None:
        return None
    return (
        f"{file} separates its columns with {other!r}, and a .csv file is read with ','; save it with commas, "
        "or as .jsonl"
    )


def is_blank(file: Path, kind: str) -> bool:
    """Whether a file that has no fault holds nothing, or white space alone."""
    if kind not in TEXT_KINDS:
        return file.stat().st_size == 0
    with _opened(file) as stream:
        return not any(line.strip() for line in stream)


def broken_line(file: Path, kind: str) -> str | None:
    """The first line of a file that is not of the form that its name says, and the remedy. None: there is none."""
    if kind not in (".jsonl", ".json", ".csv"):
        return None
    with _opened(file) as stream:
        if kind == ".csv":
            return _broken_row(file, stream)
        first = next((line for line in stream if line.strip()), "")
        stream.seek(0)
        if first.lstrip()[:1] == "[" or (kind == ".json" and not _is_object(first)):  # one value, in several lines
            try:
                json.load(stream)
            except ValueError as error:
                return f"{file} is not valid JSON: {error}; mend it, or {AGAIN}"
            return None
        for number, line in enumerate(stream, 1):
            if not line.strip() or _is_object(line):
                continue
            try:
                json.loads(line)
            except ValueError as error:
                return f"{file}, line {number}, is not valid JSON: {error}; mend it, or take it out"
            return f"{file}, line {number}, is no object {{column: value, ..}}; mend it, or take it out"
    return None


def _broken_row(file: Path, stream) -> str | None:
    rows = csv.reader(stream)
    header = next(rows, [])
    for row in rows:
        if len(row) > len(header):
            where = f"{file}, line {rows.line_num}, has {len(row)} columns, and the first line {len(header)}"
            return f"{where}; write quotes around a text with commas"
    return None


def _opened(file: Path):
    return gzip.open(file, "rt", encoding="utf-8-sig") if file.suffix == ".gz" else file.open(encoding="utf-8-sig")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def wrapped_rows(file: Path, kind: str, columns: list[str]) -> list[str]:
    """The keys under which a .json file keeps its rows: {"data": [..]}, or {"train": [..], "test": [..]}.

    Empty for a list of rows, for rows that stand one in a line, and for an object that is a row itself: one that has
    one of the columns that are read.
    """
    if kind != ".json":
        return []
    with _opened(file) as stream:
        lines = list(itertools.islice((line for line in stream if line.strip()), 2))
        if not lines or lines[0].lstrip()[:1] != "{" or (len(lines) == 2 and _is_object(lines[0])):
            return []
        stream.seek(0)
        try:
            whole = json.load(stream)
        except ValueError:
            return []
    if any(column in whole for column in columns):
        return []
    named = [name for name in whole if name in (*SPLITS, "data")]
    return [name for name in named if isinstance(whole[name], list) and _all_objects(whole[name])]


def _all_objects(rows: list) -> bool:
    return all(isinstance(row, dict) for row in rows)
