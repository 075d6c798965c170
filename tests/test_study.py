"""The study: its runs are the scripts' runs, and its measurements are what they say.

Its report is that of the results beside it.
"""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from helpers import ROOT, evaluations, logged
from real_vllm import prompts_file

sys.path.insert(0, str(ROOT / "examples" / "study"))

import estimates
import grid
import measure
import report
import study
import train_strided
import train_structured
from ebft_utils.algorithm.rewards import eq94_baseline
from ebft_utils.config.modes import load_config
from ebft_utils.data.rows import load_rows
from ebft_utils.models import load_causal_lm


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """30 documents of the licence, some of them with room for rollouts of 64 tokens."""
    text = " ".join((ROOT / "LICENSE").read_text().split())
    path = tmp_path_factory.mktemp("long") / "documents.jsonl"
    documents = [text[index * 300 :][: 60 + 40 * (index * 7 % 13)] for index in range(30)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def tiny(write_config, monkeypatch, tmp_path):
    """tiny("train.seed=1", ..) -> (run, trained): the study on the tiny model.

    Its base file is a small configuration of its own.
    """

    def make(*overrides: str, **changes):
        file = write_config(**{"data__sequence_length": 110, "eval__num_documents": 8, **changes})
        monkeypatch.setattr(grid, "HERE", file.parent)
        monkeypatch.setattr(grid, "ROOT", tmp_path)
        monkeypatch.setattr(grid, "RESULTS", tmp_path / "results")
        run = grid.Run("tiny-seed0", file.name, overrides, "held_out")
        return run, measure.Trained(run.config(*overrides))

    return make


def test_a_run_of_the_study_is_a_run_of_the_script(tiny, train):
    """Guards against a study of another program: the same steps, to the last bit, and the same evaluation."""
    overrides, lora = ("train.learning_rate=1e-2", "ebft.ce_coef=0.1"), {"r": 4, "alpha": 8.0}
    run, trained = tiny(*overrides, lora=lora)
    log = [trained.take_step(step) | {"train/grad_norm": trained.grad_norm} for step in range(3)]
    folder = train("run", *overrides, lora=lora, data__sequence_length=110, eval__num_documents=8)
    entries = [entry for entry in logged(folder) if "train/loss" in entry]
    assert len(entries) == 3 and all(entry["train/grad_norm"] > 0 for entry in entries)
    for ours, script in zip(log, entries, strict=True):
        del ours["tokens"]  # which the script does not log
        assert {name: value for name, value in script.items() if name in ours} == ours
    assert len(trained.validation) == len(trained.test) == 4
    halves = [measure.held_out(trained, run, rows) for rows in (trained.validation, trained.test)]
    totals, weights = (sum(sum(half["cross_entropy"][index]) for half in halves) for index in (0, 1))
    assert totals / weights == pytest.approx(evaluations(folder)[-1]["eval/cross_entropy"], rel=1e-5)


def test_a_structured_run_of_the_study_is_a_run_of_the_script(monkeypatch, tmp_path, model_folder):
    """The same of train_structured.py."""
    prompts = prompts_file(tmp_path / "rows.jsonl")
    tree = {
        "model": {"name_or_path": str(model_folder)},
        "data": {"dataset": str(prompts), "max_prompt_length": 64},
        "ebft": {"num_generations": 3, "max_completion_length": 24, "use_vllm": False},
        "train": {"output_dir": str(tmp_path / "script"), "max_steps": 2, "learning_rate": 1e-2, "save_steps": 0},
        "eval": {"num_documents": 4},
        "lora": {"r": 4, "alpha": 8.0},
    }
    tree["ebft"]["embed_method"] = "completion_mean"
    tree["train"] |= {"batch_size": 4, "per_device_batch_size": 2}
    (tmp_path / "structured.yaml").write_text(yaml.safe_dump(tree))
    for name in ("HERE", "ROOT"):
        monkeypatch.setattr(grid, name, tmp_path)
    run = grid.Run("tiny-seed0", "structured.yaml", (), "held_out")
    trained = measure.Trained(run.config())
    log = [trained.take_step(step) for step in range(2)]
    found = [measure.held_out(trained, run, rows) for rows in (trained.validation, trained.test)]
    AcceleratorState._reset_state(True)
    train_structured.main(["--cfg", str(tmp_path / "structured.yaml")])
    entries = [entry for entry in logged(tmp_path / "script") if "train/loss" in entry]
    names = ("ebft/mean_reward", "ebft/ce_loss", "ebft/cfm_loss", "rollout/length")
    assert [[entry[name] for name in names] for entry in log] == [[entry[name] for name in names] for entry in entries]
    totals, weights = (sum(sum(half["cross_entropy"][index]) for half in found) for index in (0, 1))
    assert totals / weights == pytest.approx(evaluations(tmp_path / "script")[-1]["eval/cross_entropy"], rel=1e-5)


def test_validation_and_test_documents_are_apart(tiny):
    """Guards against learning rates that are chosen on the test documents.

    And against training on either half of the held-out documents.
    """
    _, trained = tiny()
    validation, test, training = (
        {tuple(rows[index][0].tokens) for index in range(len(rows))}
        for rows in (trained.validation, trained.test, trained.rows)
    )
    assert validation and test and training and not validation & test and not (validation | test) & training


def test_cfm_by_length(tiny):
    """Guards against another ruler: at the full length it is the evaluation's own CFM.

    Shorter ones are of the first tokens of the same rollouts.
    """
    run, trained = tiny("train.learning_rate=0.1", "train.warmup_ratio=0", lora={"r": 4, "alpha": 8.0})
    before = measure.cfm_by_length(trained, run)
    trained.take_step(0)
    found = measure.cfm_by_length(trained, run)
    assert found["cfm_unbiased@64"] != before["cfm_unbiased@64"]  # it is the trained policy that writes
    assert list(found) == [f"{name}@{length}" for length in (8, 16, 32, 64) for name in ("cfm_unbiased", "cfm_loss")]
    places = ("ebft.context_length=32", "ebft.stride=32", "ebft.generate_max_len=64")
    config = run.config(*places, "eval.per_device_batch_size=4")
    models, pad_token_id = (trained.accelerator, trained.policy, trained.network), trained.tokenizer.pad_token_id
    with measure.StopSignals() as signals:
        table = train_strided.evaluate(config, *models, trained.test, pad_token_id, signals)
    for name in ("cfm_unbiased", "cfm_loss"):
        assert sum(found[f"{name}@64"][1]) > 0
        torch.testing.assert_close(torch.tensor(found[f"{name}@64"]), table[name].float(), atol=1e-4, rtol=1e-4)
    assert found["cfm_unbiased@8"] != found["cfm_unbiased@64"]


def test_human_eval_is_scored_as_transformers_does(tiny):
    """Guards against a cross-entropy over prompts or padding."""
    run, trained = tiny("train.learning_rate=0.1", "train.warmup_ratio=0", "ebft.rl_coef=0", "ebft.ce_coef=1")
    trained.take_step(0)
    totals, weights = measure.human_eval(trained, run, num_problems=12)["human_eval_cross_entropy"]
    documents = ("eval.dataset=human_eval", "eval.transform=prompt_completion", "eval.num_documents=12")
    config = run.config(*documents, "data.sequence_length=512", "eval.only=true")
    _, problems = load_rows(config, trained.tokenizer)
    model = load_causal_lm(config.model, torch.float32)
    model.load_state_dict(trained.policy.causal_lm.state_dict())
    model.set_attn_implementation("eager")
    for number in (0, 5, 11):
        (document,) = problems[number]
        ids, ((first, end),) = torch.tensor(document.tokens)[None], document.spans
        with torch.no_grad():
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert weights[number] == end - first > 0
        assert totals[number] == pytest.approx(-logps[first - 1 : end - 1].sum().item(), rel=1e-4)


def test_gradients_are_those_of_single_documents(tiny):
    """Guards against gradients that add up over documents, or are of other settings than they say."""
    run, trained = tiny(*grid.METHODS["ebft_0"], *grid.ONE_DOCUMENT, lora={"r": 4, "alpha": 8.0})
    measured = measure.gradients(trained, run, num_documents=3)
    parameters = [parameter for parameter in trained.policy.parameters() if parameter.requires_grad]
    vectors = {}
    for name, config in (("own", trained.config), ("sft", run.config(*grid.METHODS["sft"], *grid.ONE_DOCUMENT))):
        for document in range(3):
            pad_token_id = trained.tokenizer.pad_token_id
            batches = train_strided.step_batches(config, trained.accelerator, trained.rows, document, pad_token_id)
            train_strided.train_step(config, trained.accelerator, trained.policy, trained.network, batches)
            gradient = torch.cat([parameter.grad.flatten().clone() for parameter in parameters])
            vectors.setdefault(name, []).append(gradient)
            trained.optimizer.zero_grad()
    for name, (left, right) in {"own": ("own", "own"), "with_sft": ("own", "sft"), "sft": ("sft", "sft")}.items():
        products = torch.tensor([[(one @ other).item() for other in vectors[right]] for one in vectors[left]])
        sums = [products.sum(1), products.sum(0), products.diagonal(), products.square().sum(1)]
        expected = torch.stack(sums)
        torch.testing.assert_close(torch.tensor(measured[name]), expected, rtol=1e-4, atol=1e-6)
    assert measured["own"][2] != measured["sft"][2]


def test_signal_and_noise():
    """Guards against a signal with a document's own noise in it, and a wrong jackknife: by loops over pairs."""
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    other = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1
    matrices = {"own": vectors @ vectors.T, "with_sft": vectors @ other.T, "sft": other @ other.T}
    measured = {
        name: [matrix.sum(1).tolist(), matrix.sum(0).tolist(), matrix.diagonal().tolist()]
        for name, matrix in matrices.items()
    }
    found = estimates.gradient_noise({"measured": measured})

    def by_loops(kept: list[int]) -> tuple[float, ...]:
        pairs = [(i, j) for i in kept for j in kept if i != j]
        signal, of_sft, common = (
            sum((one[i] @ another[j]).item() for i, j in pairs) / len(pairs)
            for one, another in ((vectors, vectors), (other, other), (vectors, other))
        )
        noise = vectors[kept].var(dim=0).sum().item()  # the trace of the sample covariance
        return signal, noise, noise / signal, common / math.sqrt(signal * of_sft)

    values = by_loops(list(range(7)))
    left_out = [by_loops([document for document in range(7) if document != gone]) for gone in range(7)]
    left_out = torch.tensor(left_out, dtype=torch.float64)
    errors = (6 / 7 * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    assert [value for value, _ in found.values()] == pytest.approx(values)
    assert [error for _, error in found.values()] == pytest.approx(errors.tolist())
    assert list(found) == ["signal", "noise", "documents", "cosine"]


@pytest.mark.parametrize("samples", [3, 4, 8])
def test_the_naive_baseline_is_a_smaller_diversity_coefficient(samples):
    """The ablation naive_baseline: reward minus the plain mean reward of the siblings.

    That is the corrected advantage with the diversity weighted (N - 2) / (N - 1).
    """
    alignment, diversity = torch.randn(2, 5, samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward = alignment - 0.7 * diversity
    baselines = [sum(reward[:, k] for k in range(samples) if k != j) / (samples - 1) for j in range(samples)]
    naive = reward - torch.stack(baselines, dim=1)
    less = 0.7 * (samples - 2) / (samples - 1)
    advantages = alignment - less * diversity - eq94_baseline(alignment, diversity, 1.0, less)
    torch.testing.assert_close(advantages, naive)
    (setting,) = grid.ABLATIONS["naive_baseline"]
    assert float(setting.partition("=")[2]) == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("shift", "ours", "jackknife"), [(0.5, (0.9, 1.1), (1.05, 1.2)), (0.0, (1.0, 1.5), (1.85, 2.1))]
)
def test_the_error_of_a_mean_over_pairs(shift, ours, jackknife):
    """Guards against an error that is too small, or not there: its square against the variance of simulated signals.

    Without any signal the jackknife's square is twice the variance.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2000, 24, 6, generator=generator, dtype=torch.float64) + shift
    products = vectors @ vectors.mT
    signals = products.sum((1, 2)) - products.diagonal(dim1=1, dim2=2).sum(1)
    variance = (signals / (24 * 23)).var().item()
    found = {3: [], 4: []}  # rows of the file: the jackknife's before there were sums of squares, and ours
    for matrix in products:
        rows = torch.stack([matrix.sum(1), matrix.sum(0), matrix.diagonal(), matrix.square().sum(1)])
        for kept, errors in found.items():
            measured = dict.fromkeys(("own", "with_sft", "sft"), rows[:kept].tolist())
            errors.append(estimates.gradient_noise({"measured": measured})["signal"][1])
    assert min(found[4]) > 0
    for (low, high), errors in zip((jackknife, ours), found.values(), strict=True):
        assert low < sum(error**2 for error in errors) / len(errors) / variance < high


def test_statistics_by_hand():
    """Guards against a standard deviation of the wrong kind, and differences that are not paired."""
    assert estimates.over_seeds([1.0, 2.0, 3.0]) == (2.0, 1.0)

    def run(*totals: float) -> dict:
        """Of three documents, of which the third does not count."""
        shares = [[0.1, 0.5, 0.6], [1.0, 1.0, 1.0]]
        return {"name": "a run", "measured": {"m": [[*totals, 50.0], [1.0, 1.0, 1.0]], "copied_share": shares}}

    mean, error, spread = estimates.difference([run(1.0, 11.0), run(3.0, 13.0)], [run(0.0, 10.0)], "m")
    # documents differ by 10, the two methods by 2 on each of them: all of the error is that of the seeds, 1 and 3
    assert (mean, error, spread) == pytest.approx((2.0, 1.0, math.sqrt(2)))
    mean, error, spread = estimates.difference([run(1.0, 13.0)], [run(0.0, 10.0)], "m")
    assert mean == 2.0 and error == pytest.approx(1.0) and math.isnan(spread)
    other = run(1.0, 2.0)
    other["measured"]["m"][1] = [2.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="different documents"):
        estimates.difference([run(1.0, 2.0)], [other], "m")
    assert report.shown_change(-2.0, 1.0) == "**-2.0000 ± 1.0000**"  # from two standard errors on
    assert report.shown_change(1.99, 1.0, 0.5) == "+1.9900 ± 1.0000 (0.5000)"
    # of 10 completions 2 pass, and none: pass@1 is (0.2 + 0) / 2, and one of all 10 passes in one of two problems
    counts = {"measured": {"human_eval_passed": [[2.0, 0.0], [10.0, 10.0]]}}
    passed = report.passed(SimpleNamespace(runs={"pass_at_k-base": counts, "main-lora-sft-seed0": {}}))
    assert passed[3:] == ["| base | 0.1000 | 0.5000 |", ""]
    for k in (1, 2, 5):
        by_binomials = [1 - math.comb(10 - correct, k) / math.comb(10, k) for correct in (0, 1, 6)]
        assert report.estimate_pass_at_k([10.0] * 3, [0.0, 1.0, 6.0], k) == pytest.approx(by_binomials)


def test_copied_documents_do_not_count(tiny):
    """Guards against a gain on templates that stand in training documents: the share of windows, by loops."""
    _, trained = tiny()
    shares, ones = measure.copied_share(trained.rows, trained.test, width=4)
    training = [list(trained.rows[row][0].tokens) for row in range(len(trained.rows))]
    windows = [tokens[start : start + 4] for tokens in training for start in range(len(tokens))]
    for row, share in enumerate(shares):
        tokens = list(trained.test[row][0].tokens)
        found = [tokens[start : start + 4] in windows for start in range(len(tokens) - 3)]
        assert share == pytest.approx(sum(found) / len(found))
    assert ones == [1.0] * len(shares) and 0 < sum(shares) < len(shares)


def test_the_learning_rate_is_chosen_by_validation(monkeypatch, tmp_path):
    """Guards against a criterion other than each method's own objective, reward / 8 - ce_coef * cross-entropy.

    A missing run is named.
    """
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    for run in grid.sweep():
        of_method = run.name.rpartition("-")[0]
        place = [other.name for other in grid.sweep() if other.name.rpartition("-")[0] == of_method].index(run.name)
        # cross-entropy falls with the rate; reward is best at the first; it is the opposite in what does not count
        measured = {  # of two documents, of which the second does not count
            "cross_entropy": [[3.0 - place, 10.0 * place], [1.0, 1.0]],
            "mean_reward": [[0.8 - 0.4 * place, 5.0 * place], [1.0, 1.0]],
            "copied_share": [[0.0, 0.9], [1.0, 1.0]],
        }
        if run.name.startswith("sweep-lora"):
            run.file.write_text(json.dumps({"base": run.base, "overrides": run.overrides, "measured": measured}))
    assert grid.chosen_rate("lora", "sft") == grid.RATES["lora"]["sft"][-1]
    assert grid.chosen_rate("lora", "ebft_0") == grid.RATES["lora"]["ebft_0"][0]
    assert grid.chosen_rate("lora", "ebft_0.03") == grid.RATES["lora"]["ebft_0.1"][-1]  # -0.4 / 8 < 0.1 * 1
    with pytest.raises(study.UserError, match="sweep-full-sft-1e-05.json is missing"):
        grid.chosen_rate("full", "sft")
    structured, larger = ("structured-", grid.STRUCTURED), ("larger-", grid.LARGER)
    for runs, (_, kinds) in ((grid.structured_sweep(), structured), (grid.larger_sweep(), larger)):
        for run in runs:
            place = kinds["lora"][run.name.split("-")[3]].index(float(run.overrides[-3].partition("=")[2]))
            measured = {
                "cross_entropy": [[3.0 - 0.2 * place], [1.0]],
                "mean_reward": [[0.8 - 0.4 * place], [1.0]],
                "copied_share": [[0.0], [1.0]],
            }
            run.file.write_text(json.dumps({"base": run.base, "overrides": run.overrides, "measured": measured}))
    # -0.4 / 48 + 0.1 * 0.2 > 0, and -0.4 / 8 + 0.1 * 0.2 < 0
    assert grid.chosen_rate("lora", "ebft_0.1", *structured) == grid.STRUCTURED["lora"]["ebft_0.1"][-1]
    assert grid.chosen_rate("lora", "ebft_0.1", *larger) == grid.LARGER["lora"]["ebft_0.1"][0]


def test_every_run_of_the_study_is_a_valid_configuration():
    """Guards against a grid that stops in the middle of the night. (The learning rates are those that were chosen.)"""
    runs = [run for part in grid.PARTS.values() for run in part()]
    assert len({run.name for run in runs}) == len(runs) > 60
    for run in runs:
        load_config(str(ROOT / "examples" / "study" / run.base), run.overrides, grid.config_class(run.base))
        assert run.measure in measure.MEASURES


def test_the_page_is_that_of_the_results():
    """Guards against a table that nobody can make again."""
    results = estimates.Results(grid.RESULTS)
    page = report.PAGE.read_text()
    assert report.with_tables(page, report.tables(results)) == page, "run: python examples/study/report.py"
    assert {name for name, lines in report.tables(results).items() if not lines} == {"pass_at_k"}  # not run yet
    with pytest.raises(ValueError, match="no place for the table changes"):
        report.with_tables(page.replace(report.BEGIN.format(name="changes"), ""), report.tables(results))
    for name, run in results.runs.items():
        assert run["name"] == name and run["measured"]
        assert all(math.isfinite(value) for entry in run["log"] for value in entry.values())


def test_results_are_written_whole_and_once(tiny, monkeypatch):
    """One run from its configuration to its file, and the second call that finds it."""
    run, _ = tiny("train.max_steps=2")
    study.run_one(run)
    result = json.loads(run.file.read_text())
    assert result["documents"] == 4 and len(result["log"]) == 2 and result["overrides"] == ["train.max_steps=2"]
    assert set(result["measured"]) == {*train_strided.EVALUATED, "copied_share"}
    monkeypatch.setattr(grid, "PARTS", {"one": lambda: [run]})
    monkeypatch.setattr(study, "run_one", lambda run: pytest.fail("run again"))
    monkeypatch.setattr(study.subprocess, "run", lambda *arguments, **how: None)
    study.main(["one"])
    monkeypatch.setattr(grid, "PARTS", {"one": lambda: [replace(run, overrides=("train.max_steps=3",))]})
    words = "holds the result of train.max_steps=2, and tiny-seed0 is now train.max_steps=3"
    with pytest.raises(study.UserError, match=words):
        study.main(["one"])


def test_a_run_that_breaks_off_leaves_no_result(tiny, monkeypatch):
    """Guards against half a result that counts as done."""
    run, _ = tiny("train.max_steps=1")

    def breaks(trained, run):
        raise MemoryError

    monkeypatch.setitem(measure.MEASURES, "held_out", breaks)
    with pytest.raises(MemoryError):
        study.run_one(run)
    assert not run.file.exists()


def test_a_run_that_was_stopped_goes_on(tiny, monkeypatch):
    """Guards against a run that goes on with other weights, another order of the data, or a forgotten optimizer."""
    monkeypatch.setattr(study, "SAVE_EVERY", 2)
    run = replace(tiny("train.max_steps=5", "train.learning_rate=1e-2")[0], on_the_way=("held_out", 2))
    study.run_one(run)
    whole = json.loads(run.file.read_text())
    assert list(whole["on_the_way"]) == ["2", "4"] and not run.unfinished.exists()
    run.file.unlink()
    take_step = measure.Trained.take_step
    monkeypatch.setattr(measure.Trained, "take_step", lambda self, step: take_step(self, step) if step < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        study.run_one(run)
    steps = []
    monkeypatch.setattr(measure.Trained, "take_step", lambda self, step: steps.append(step) or take_step(self, step))
    study.run_one(run)
    assert steps == [2, 3, 4] and not run.unfinished.exists()
    again = json.loads(run.file.read_text())
    for result in (whole, again):
        del result["seconds"]
        result["log"] = [
            {name: value for name, value in entry.items() if "seconds" not in name} for entry in result["log"]
        ]
    assert again == whole


def test_a_run_that_is_not_finite_is_no_result(tiny):
    """Guards against NaN in the tables."""
    _, trained = tiny()
    before = [parameter.clone() for parameter in trained.policy.parameters()]
    with pytest.raises(grid.UserError, match="loss nan, .* not finite at train.learning_rate 0.001"):
        trained.update(math.nan)
    assert all(torch.equal(left, right) for left, right in zip(before, trained.policy.parameters(), strict=True))


def test_completions_are_cut_where_they_end(tiny, monkeypatch):
    """Guards against text behind a stop token, and against a completion that goes on with another function."""
    run, trained = tiny("lora=null")
    tokenizer, (stop,) = trained.tokenizer, measure.stop_token_ids(trained.policy.causal_lm, trained.tokenizer)
    texts = ["  return 1\n  x = 2\ndef f", "  return 3"]
    tokens = [tokenizer(text).input_ids for text in texts]
    width = max(map(len, tokens)) + 4
    written = torch.tensor([[(ids + [stop] + [tokens[0][0]] * width)[:width] for ids in tokens]])
    seen = []

    def generate(self, *, document_ids, **others):
        return written.expand(len(document_ids), -1, -1).unsqueeze(1)

    def execute(command, **how):
        seen.extend(json.loads(line) for line in open(command[-1]).read().splitlines())
        passed = json.dumps({sample["task_id"]: [True, False] for sample in seen})
        return measure.subprocess.CompletedProcess(command, 0, passed)

    monkeypatch.setattr(type(trained.policy), "generate", generate)
    monkeypatch.setattr(measure.subprocess, "run", execute)
    assert measure.pass_at_k(trained, run, num_problems=3, num_samples=2)["human_eval_passed"] == [[1.0] * 3, [2.0] * 3]
    assert [sample["completion"] for sample in seen] == ["  return 1\n  x = 2", "  return 3"] * 3
    assert sorted(sample["task_id"] for sample in seen) == [f"HumanEval/{number}" for number in (0, 0, 1, 1, 2, 2)]


def test_the_executor_only_runs_when_asked(capsys):
    """Guards against model output that is executed without anybody having said so."""
    with pytest.raises(SystemExit):
        study.main(["pass_at_k"])
    assert "--execute" in capsys.readouterr().err


def test_the_executor_tells_right_from_wrong(tmp_path):
    """Guards against an executor that passes everything, hangs, or lets a completion take all memory."""
    file = tmp_path / "samples.jsonl"
    written = ["    return number % 1.0", "    return 0.0", "    while True: pass", "    return bytearray(2**36)"]
    file.write_text("".join(json.dumps({"task_id": "HumanEval/2", "completion": text}) + "\n" for text in written))
    command = [sys.executable, "-I", str(ROOT / "examples" / "study" / "execute.py"), str(file)]
    output = study.subprocess.run(command, capture_output=True, text=True, env={}, timeout=120)
    assert json.loads(output.stdout) == {"HumanEval/2": [True, False, False, False]}, output.stderr
