"""The study of a small model: its halves are apart, its metrics are what they say, and one command runs it."""

import json
import sys

import pytest
import torch

from helpers import ROOT, TINY

sys.path[:0] = [str(ROOT / "examples" / "study" / "small"), str(ROOT / "examples" / "study")]

import downstream
import estimates
import grid
import make
import measure
import report
import run as command
import runs
import tables
from ebft_utils.config.modes import StridedConfig, load_config

SOURCE = '''"""A module."""
import os


def first(a, b):
    """Says

    something."""
    return (a
            + b)


@property
def second(self):
    return [self.x for x in range(3)]
'''


@pytest.fixture(scope="module")
def modules():
    return make.modules()


def test_the_halves_are_apart_and_always_the_same(modules):
    """Guards against a held-out module that is trained on, and against halves that depend on the order of files."""
    paths = [path for found in modules.values() for path in found]
    assert len(paths) == len(set(paths)) > 400 and all(modules.values())
    assert make.place_of("ast.py") == "base" and make.place_of("argparse.py") == "test"
    assert not any(path.startswith(("encodings/", "pydoc_data/", "test/")) for path in paths)
    sizes = {name: len(found) / len(paths) for name, found in modules.items()}
    assert 0.4 < sizes["base"] + sizes["base_held_out"] < 0.6 and 0.03 < sizes["validation"] < sizes["test"] < 0.15


@pytest.fixture(scope="module")
def tokenizer(modules):
    return make.make_tokenizer(list(modules["base"].values())[:20], 600)


def test_the_tokenizer_loses_nothing(tokenizer):
    """Guards against text that comes back changed, and against a line's end inside of a token."""
    text = SOURCE + "  \t\n\n x = 'é λ \x0c'\r\n# 12 + 3456 __name__"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and len(tokenizer) == 600
    tokens = [tokenizer.decode([token]) for token in ids]
    assert all("\n" not in token or not token.strip() and token[0] in "\r\n \t" for token in tokens)


def test_pieces_are_programs(tokenizer):
    """Guards against pieces that overlap, that begin in the middle of a statement, or without their decorators."""
    text = "\x0c\n" + SOURCE * 3
    found = make.pieces(text, tokenizer, length=25)
    assert len(found) > 3 and any(piece.startswith("@property") for piece in found)
    assert all(downstream.is_valid_so_far(piece) for piece in found)
    free = 0
    for piece in found:
        start = text.index(piece, free)
        free = start + len(tokenizer.decode(tokenizer(piece).input_ids[:25]))
    assert make.evenly(list(range(9)), 3) == [0, 4, 8] and make.evenly([], 3) == [] and make.evenly([5], 3) == [5]


def test_windows_tell_copies_from_other_text():
    """Guards against windows that are equal for other tokens, or in another order."""
    tokens = list(range(40))
    found = make.windows(tokens, 4).tolist()
    assert len(found) == len(set(found)) == 37 and make.windows([1, 2], 4).size == 0
    assert set(make.windows(tokens[5:15], 4).tolist()) <= set(found)
    assert not set(make.windows(tokens[::-1], 4).tolist()) & set(found)
    assert make.windows([0, 0, 1], 3) != make.windows([0, 1], 2)


@pytest.mark.parametrize(
    ("written", "valid"),
    [
        ("\n    return x\n", True),
        ("\n    if x:\n", True),  # a block may be open
        ("\n    y = f(x,\n", True),  # and a bracket
        ('\n    """What\n', True),  # and a string
        ("\n    return x\nde", True),  # the line that is not whole is not read
        ("\n    try:\n        pass\n", True),  # its except may come
        ("\n    return x)\n", False),
        ("\n  return x\n     y\n", False),
        ("\nx = = 1\n", False),
        ("\nreturn 1\n", False),  # outside of the function
        ("\n    x = 'a\n", False),
        ("\n    return x", False),  # no whole line
        ("\n\n", False),
        (" + 1", False),
    ],
)
def test_valid_python(written, valid):
    """Guards against continuations that count because they add nothing, or fail only because they are cut off."""
    assert downstream.is_valid_continuation("def f(x):\n    z = x", written) is valid


def test_next_line_and_edit_similarity():
    """By hand, and against the recursive definition."""
    assert downstream.next_line("\n\n    return x  \ny") == "    return x"
    assert downstream.next_line("\n") == downstream.next_line("") == ""
    assert downstream.next_line(" + 1\nz") == " + 1"  # it goes on with the line

    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    for a, b in (("", ""), ("abc", "abc"), ("kitten", "sittin"), ("abc", ""), ("xa", "ax"), ("flaw", "lawn")):
        expected = 1 - distance(a, b) / max(len(a), len(b), 1)
        assert downstream.edit_similarity(a, b) == pytest.approx(expected)


def test_line_ends():
    """Guards against continuations inside of docstrings, or of empty lines."""
    texts = ["def f():", "\n    ", '"""', "a", "\n    ", "b", '"""', "\n", "    ", "x", "\n\n", "y", "\n"]
    assert downstream.line_ends(texts, 0, 12) == [1, 7, 10, 12]
    assert downstream.line_ends(texts, 2, 11) == [7, 10]


def test_calibration_by_loops():
    """Against the definition, bin by bin; and the jackknife against leaving out each row."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(6, 50, generator=generator)
    confidence[0, 0] = 1.0
    correct = torch.rand(6, 50, generator=generator) < confidence**2
    gaps = torch.tensor([downstream.confidence_gaps(c, right) for c, right in zip(confidence, correct, strict=True)])
    counts = torch.full((6,), 50.0)

    def error(rows: list[int]) -> float:
        total, pairs = 0.0, [(c.item(), r.item()) for row in rows for c, r in zip(confidence[row], correct[row])]  # noqa: B905
        for number in range(10):
            own = [(c, r) for c, r in pairs if min(int(c * 10), 9) == number]
            if own:
                means = sum(c for c, _ in own) / len(own), sum(r for _, r in own) / len(own)
                total += len(own) / len(pairs) * abs(means[0] - means[1])
        return total

    found, spread = downstream.calibration_error(gaps, counts)
    assert found == pytest.approx(error(list(range(6))), abs=1e-5)
    left_out = torch.tensor([error([row for row in range(6) if row != gone]) for gone in range(6)])
    assert spread == pytest.approx((5 / 6 * (left_out - left_out.mean()).square().sum()).sqrt().item(), abs=1e-5)


def test_modules_are_added_up():
    table = {"a": torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 3.0]])}
    assert runs.by_module(table, ["y", "x", "y"]) == {"a": [[5.0, 2.0], [4.0, 1.0]]}


@pytest.fixture
def tiny_study(tmp_path, monkeypatch, modules):
    """The whole study with a tiny model, a few modules and two steps a run."""
    few = {name: dict(list(found.items())[:6]) for name, found in modules.items()}
    monkeypatch.setattr(make, "HELD_OUT", {"base_held_out": 2, "validation": 4, "test": 4})
    folder = tmp_path / "runs" / "small"
    make.make(folder, few, {**TINY, "vocab_size": 400})
    (folder / "base").mkdir()
    (folder / "start").rename(folder / "base" / "final")
    (folder / "start").mkdir()
    entry = {"step": 0, "eval/cross_entropy": 3.0, "eval/cross_entropy_se": 0.1}
    (folder / "base" / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    (tmp_path / "small").mkdir()
    text = (ROOT / "examples" / "study" / "small" / "small.yaml").read_text()
    changes = {
        "max_steps": (200, 2),
        " batch_size": (34, 2),
        "num_documents": (176, 4),
        "per_device_batch_size": (17, 2),
    }
    for key, (old, new) in changes.items():
        assert f"{key}: {old}" in text
        text = text.replace(f"{key}: {old}", f"{key}: {new}", 1)
    (tmp_path / "small" / "small.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)  # and back again, wherever the command goes
    monkeypatch.setattr(grid, "HERE", tmp_path)
    monkeypatch.setattr(grid, "ROOT", tmp_path)  # or the study's own unfinished runs would be taken for these
    monkeypatch.setattr(grid, "SEEDS", (0,))
    changed = {"RESULTS": tmp_path / "results", "ON_THE_WAY": ("held_out_modules", 1), "SWEEP_STEPS": 1}
    for name, value in changed.items():
        monkeypatch.setattr(runs, name, value)
    monkeypatch.setattr(runs, "RATES", {"sft": (1e-3,), "ebft_0.1": (1e-3,)})
    monkeypatch.setattr(grid, "METHODS", {name: grid.METHODS[name] for name in ("sft", "ebft_0.1")})
    monkeypatch.setattr(runs, "VALIDATION", ("eval.dataset=runs/small/validation.jsonl", "eval.num_documents=4"))
    monkeypatch.setattr(runs, "for_the_time", lambda: [])
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "FOLDER", folder)
    page = tmp_path / "README.md"
    page.write_text((ROOT / "examples" / "study" / "small" / "README.md").read_text())
    monkeypatch.setattr(tables, "PAGE", page)
    return tmp_path


def test_one_command_runs_it(tiny_study, capsys):
    """From nothing to the page: every run has its file, the second call runs nothing, and the numbers are finite."""
    command.main([])
    names = {file.stem for file in (tiny_study / "results").glob("*.json")}
    of_methods = {name.format(method) for name in ("sweep-{}-0.001", "main-{}-seed0") for method in ("sft", "ebft_0.1")}
    assert names == {"base", "validation-base", "base-training", *of_methods}
    done = json.loads((tiny_study / "results" / "main-ebft_0.1-seed0.json").read_text())
    assert list(done["on_the_way"]) == ["1"] and len(done["log"]) == 2 and done["documents"] == 4
    measured = done["measured"]
    for name in (*tables.LEVELS, *estimates.BY_LENGTH, "valid_truth"):
        totals, weights = measured[name]
        assert len(totals) == len(weights) == len(measured["cross_entropy"][0]) and sum(weights) > 0
    for name in ("valid_python", "next_line_exact", "next_line_similarity", "accuracy"):
        assert all(0 <= total <= weight for total, weight in zip(*measured[name], strict=True))
    truth, weights = measured["valid_truth"]
    assert sum(truth) > 0.8 * sum(weights)
    assert (tiny_study / "runs" / "small" / "models" / "main-sft-seed0" / "model.safetensors").is_file()
    page = tables.PAGE.read_text()
    assert "| EBFT, ce_coef 0.1 | 1 | 2 | 4 |" in page
    before = {name: (tiny_study / "results" / f"{name}.json").stat().st_mtime_ns for name in names}
    command.main([])
    assert before == {name: (tiny_study / "results" / f"{name}.json").stat().st_mtime_ns for name in names}
    assert tables.PAGE.read_text() == page
    capsys.readouterr()
    command.main(["--list"])
    assert capsys.readouterr().out == ""


def test_confidence_is_that_of_the_cross_entropy(tiny_study, monkeypatch):
    """Guards against another model or other tokens in the calibration: its logits give the scripts' cross-entropy."""
    monkeypatch.chdir(tiny_study)
    run = runs.Run("x", runs.BASE, (), "held_out_modules")
    trained = measure.Trained(run.config("lora=null"))
    rows, modules = runs.documents_of(trained)
    assert len(rows) == len(modules) == 4
    table = measure.evaluated(trained, run, rows)
    expected = []
    for row in range(len(rows)):
        ids = torch.tensor(rows[row][0].tokens)[None]
        model = trained.policy.causal_lm
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        expected.append(-logps.gather(-1, ids[0, 1:, None]).sum())
        best = (logps.argmax(-1) == ids[0, 1:]).sum()
        found = runs.calibration(trained, rows)
        assert found["accuracy"][:, row].tolist() == [float(best), float(len(logps))]
        gap = logps.exp().amax(-1).double().sum() - best
        assert found["confidence_gaps"][:, row].sum().item() == pytest.approx(gap.item(), abs=1e-4)
    torch.testing.assert_close(table["cross_entropy"][0].float(), torch.stack(expected), rtol=1e-4, atol=1e-3)


def test_the_truth_is_judged_as_right(tiny_study):
    """Guards against continuations that are compared with another place of the document."""
    run = runs.Run("x", runs.BASE, (), "held_out_modules")
    trained = measure.Trained(run.config())
    rows, _ = runs.documents_of(trained)
    batch, place = measure.batch_of(trained, run.config(), rows, [0, 1, 2, 3])
    place = runs.with_places(batch, place, trained.tokenizer, 64)
    windows = (place["anchors"].unsqueeze(-1) + torch.arange(64)).flatten(1)
    truth = place["document_ids"].gather(1, windows).unflatten(1, (runs.ANCHORS, 64))
    starts = trained.tokenizer.convert_ids_to_tokens(truth[..., 0][place["valid"]].tolist())
    assert starts and all(token.startswith("\u010a") for token in starts)  # byte-level BPE's name of a line's end
    table = runs.judged(trained.tokenizer, place, truth.unsqueeze(2).expand(-1, -1, 2, -1))
    for name in ("next_line_exact", "next_line_similarity"):
        assert table[name].tolist() == [[2.0 * own.sum().item() for own in place["valid"]]] * 2
    assert table["valid_python"].tolist() == (2 * table["valid_truth"]).tolist()
    other = runs.judged(trained.tokenizer, place, truth.roll(1, 0).unsqueeze(2))
    assert other["next_line_exact"][0].sum() < other["next_line_exact"][1].sum()
    short = measure.cfm_of_first_tokens(trained, "completion_mean", place, truth.unsqueeze(2).expand(-1, -1, 2, -1))
    assert all(values[0].abs().max() < 1e-5 for name, values in short.items() if name.startswith("cfm_unbiased"))


def test_every_run_is_a_valid_configuration(monkeypatch):
    """Guards against a run that stops hours later."""
    monkeypatch.setattr(runs, "chosen_rate", lambda method: 1e-3)
    every = list(runs.every_run())
    assert len({run.name for run in every}) == len(every) > 20
    for run in every:
        load_config(str(ROOT / "examples" / "study" / run.base), run.overrides, StridedConfig)
        assert run.measure in measure.MEASURES


def test_the_page_is_that_of_the_results():
    """Guards against a table that nobody can make again."""
    page = tables.PAGE.read_text()
    found = tables.tables(estimates.Results(runs.RESULTS))
    assert report.with_tables(page, found) == page, "run: python examples/study/small/run.py --tables"
