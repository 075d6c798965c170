"""Makes what the study of a small model begins with: data, tokenizer, and a model with random weights.

    python examples/study/small/make.py

It writes into runs/small/ (the same bytes for the same Python):
    base.jsonl, base_held_out.jsonl          one half of the standard library's modules: the base model learns from it
    train.jsonl, validation.jsonl, test.jsonl   the other half: the methods are compared on it
    start/                                   tokenizer (trained on base.jsonl) and random weights

A module belongs to the one place that a hash of its path says. Training files have a whole module a row. Held-out
files have up to four pieces of a module, each beginning with a statement at the module's top level, so that a piece is
a program as far as it goes. Pieces that are mostly copies of training text are left out.
"""

import ast
import hashlib
import json
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ebft_utils.data.sources import stdlib_files

FOLDER = ROOT / "runs" / "small"
TABLES = {"encodings", "pydoc_data"}  # packages of tables and prose, not of programs
# hash of a path, modulo 20 -> file; even: half of the base model, odd: half of the comparison
PLACES = {place: "train" if place % 2 else "base" for place in range(20)}
PLACES |= {0: "base_held_out", 1: "validation", 3: "test", 5: "test"}
HELD_OUT = {"base_held_out": 64, "validation": 96, "test": 176}  # file -> its documents
PIECES = 4  # most pieces of a held-out module
LENGTH = 256  # tokens of a piece
WINDOW, MOST_COPIED = 16, 0.5  # left out: pieces with more of their 16-token windows in training text
VOCABULARY = 2048
# a token never goes over one of these: a line's end with the next line's indentation, a word, a digit, marks, spaces
PARTS = r"\n\s*| ?[^\W\d]+| ?\d| ?[^\s\w]+|[^\S\n]+|."
MODEL = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)


def place_of(path: str) -> str:
    """The file that a module belongs to."""
    return PLACES[int(hashlib.sha256(path.encode()).hexdigest(), 16) % len(PLACES)]


def modules() -> dict[str, dict[str, str]]:
    """File -> path of a module -> its text."""
    root, found = Path(sysconfig.get_path("stdlib")), {name: {} for name in PLACES.values()}
    for file in stdlib_files():
        path = file.relative_to(root)
        text = file.read_text(encoding="utf-8-sig")
        if text.strip() and path.parts[0] not in TABLES and not path.name.startswith("_sysconfigdata"):
            found[place_of(path.as_posix())][path.as_posix()] = text
    return found


def make_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE. Text, tokens, text: the same text."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PARTS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    kind = dict(eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kind)


def pieces(text: str, tokenizer, length: int = LENGTH) -> list[str]:
    """Parts of a module that begin with a statement at its top level, each with more than `length` tokens.

    The first `length` tokens of one do not reach into the next.
    """
    starts = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))])
    found, free = [], 0
    for node in ast.parse(text).body:
        first_line = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
        start = int(starts[first_line - 1])
        part = text[start : start + 8 * length]
        if start >= free and len(ids := tokenizer(part).input_ids) > length:
            found.append(part)
            free = start + len(tokenizer.decode(ids[:length]))
    return found


def evenly(found: list, number: int) -> list:
    """At most that many of them, evenly spread."""
    return [found[index] for index in np.linspace(0, len(found) - 1, min(number, len(found))).round().astype(int)]


def windows(tokens: list[int], width: int = WINDOW) -> np.ndarray:
    """A number for each window of that many tokens; different windows have different ones, but for a rare chance."""
    powers = np.array([pow(1_000_003, index, 2**64) for index in range(width)], dtype=np.uint64)
    if len(tokens) < width:
        return np.zeros(0, dtype=np.uint64)
    view = np.lib.stride_tricks.sliding_window_view(np.array(tokens, dtype=np.uint64) + np.uint64(1), width)
    return (view * powers).sum(axis=1, dtype=np.uint64)


def write(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder: Path, found: dict[str, dict[str, str]], model: dict = MODEL) -> dict[str, int]:
    """Writes all of it. Returns counts."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, counts, known = make_tokenizer(list(found["base"].values()), model["vocab_size"]), {}, set()
    for name in ("base", "train"):
        write(folder, name, [{"module": path, "text": text} for path, text in found[name].items()])
        tokens = [tokenizer(text).input_ids for text in found[name].values()]
        known.update(*(windows(ids).tolist() for ids in tokens))
        counts |= {f"{name} modules": len(tokens), f"{name} tokens": sum(map(len, tokens))}
    for name, number in HELD_OUT.items():
        rows = []
        for path, text in found[name].items():
            for piece in evenly(pieces(text, tokenizer), PIECES):
                own = windows(tokenizer(piece).input_ids[:LENGTH]).tolist()
                if sum(window in known for window in own) <= MOST_COPIED * len(own):
                    rows.append({"module": path, "text": piece})
        rows = evenly(rows, number)
        write(folder, name, rows)
        counts |= {f"{name} modules": len({row["module"] for row in rows}), f"{name} documents": len(rows)}
    torch.manual_seed(0)
    causal_lm = LlamaForCausalLM(LlamaConfig(**model))
    causal_lm.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    return {**counts, "parameters": causal_lm.num_parameters()}


def main() -> None:
    for name, count in make(FOLDER, modules()).items():
        print(f"{name}: {count:,}")


if __name__ == "__main__":
    main()
