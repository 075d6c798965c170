"""The study: its runs are the scripts' runs, its measurements are what they say, and its report is that of the results beside it."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT, evaluations, logged

sys.path.insert(0, str(ROOT / "examples" / "study"))
pytest.importorskip("matplotlib", reason="the study's report needs matplotlib")

import report
import study
import train_strided
from ebft_utils.config import load_config
from ebft_utils.data import load_rows
from ebft_utils.models import load_causal_lm
from ebft_utils.rewards import rloo_advantages


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """30 documents of the licence, some of them with room for rollouts of 64 tokens."""
    text = " ".join((ROOT / "LICENSE").read_text().split())
    path = tmp_path_factory.mktemp("long") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text[index * 300 :][: 60 + 40 * (index * 7 % 13)]}) + "\n" for index in range(30)))
    return path


@pytest.fixture
def tiny(write_config, monkeypatch, tmp_path):
    """tiny("train.seed=1", ..) -> (run, trained): the study on the tiny model, its base file a small configuration of its own."""

    def make(*overrides: str, measure: str = "held_out", **changes):
        file = write_config(**{"data__sequence_length": 110, "eval__num_documents": 8, **changes})
        monkeypatch.setattr(study, "HERE", file.parent)
        monkeypatch.setattr(study, "ROOT", tmp_path)
        monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
        run = study.Run("tiny-seed0", file.name, overrides, measure)
        return run, study.Trained(run.config(*overrides))

    return make


def test_a_run_of_the_study_is_a_run_of_the_script(tiny, train):
    """Guards against a study of another program: the same steps, to the last bit, and the same evaluation."""
    run, trained = tiny("train.learning_rate=1e-2", "ebft.ce_coef=0.1", lora={"r": 4, "alpha": 8.0})
    log = [trained.take_step(step) | {"train/grad_norm": trained.grad_norm} for step in range(3)]
    folder = train("run", "train.learning_rate=1e-2", "ebft.ce_coef=0.1", lora={"r": 4, "alpha": 8.0}, data__sequence_length=110, eval__num_documents=8)
    entries = [entry for entry in logged(folder) if "train/loss" in entry]
    assert len(entries) == 3 and all(entry["train/grad_norm"] > 0 for entry in entries)
    for ours, script in zip(log, entries, strict=True):
        assert {name: value for name, value in script.items() if name in ours} == {name: value for name, value in ours.items() if name != "tokens"}
    assert len(trained.validation) == len(trained.test) == 4
    halves = [study.held_out(trained, run, rows) for rows in (trained.validation, trained.test)]
    totals, weights = (sum(sum(half["cross_entropy"][index]) for half in halves) for index in (0, 1))
    assert totals / weights == pytest.approx(evaluations(folder)[-1]["eval/cross_entropy"], rel=1e-5)


def test_validation_and_test_documents_are_apart(tiny):
    """Guards against learning rates that are chosen on the documents that the results are of, and against training on either."""
    _, trained = tiny()
    documents = [[tuple(rows[index][0].tokens) for index in range(len(rows))] for rows in (trained.validation, trained.test, trained.rows)]
    validation, test, training = map(set, documents)
    assert validation and test and training and not validation & test and not (validation | test) & training


def test_cfm_by_length(tiny):
    """Guards against another ruler: at the full length it is the evaluation's own CFM, and shorter ones are of the same rollouts' first tokens."""
    run, trained = tiny(data__sequence_length=110, ebft__n_samples_per_prompt=3)
    found = study.cfm_by_length(trained, run)
    assert list(found) == [f"{name}@{length}" for length in (8, 16, 32, 64) for name in ("cfm_unbiased", "cfm_loss")]
    config = run.config("ebft.context_length=32", "ebft.stride=32", "ebft.generate_max_len=64", "eval.per_device_batch_size=4")
    with study.StopSignals() as signals:
        table = train_strided.evaluate(config, trained.accelerator, trained.policy, trained.network, trained.test, trained.tokenizer.pad_token_id, signals)
    for name in ("cfm_unbiased", "cfm_loss"):
        assert sum(found[f"{name}@64"][1]) > 0
        torch.testing.assert_close(torch.tensor(found[f"{name}@64"]), table[name].float(), atol=1e-4, rtol=1e-4)
    assert found["cfm_unbiased@8"] != found["cfm_unbiased@64"]


def test_human_eval_is_scored_as_transformers_does(tiny):
    """Guards against a cross-entropy over prompts or padding."""
    run, trained = tiny("model.dtype=float32", "lora=null")
    totals, weights = study.human_eval(trained, run, num_problems=12)["human_eval_cross_entropy"]
    config = run.config("eval.dataset=human_eval", "eval.transform=prompt_completion", "eval.num_documents=12", "data.sequence_length=512", "eval.only=true")
    _, problems = load_rows(config, trained.tokenizer)
    model = load_causal_lm(config.model, torch.float32)
    model.set_attn_implementation("eager")
    for number in (0, 5, 11):
        (document,) = problems[number]
        ids, ((first, end),) = torch.tensor(document.tokens)[None], document.spans
        with torch.no_grad():
            logps = model(ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert weights[number] == end - first > 0
        assert totals[number] == pytest.approx(-logps[first - 1 : end - 1].sum().item(), rel=1e-4)


def test_gradients_are_those_of_single_documents(tiny):
    """Guards against gradients that add up over documents, and against a signal or noise that is another than it says: by loops over pairs."""
    run, trained = tiny(*study.METHODS["ebft_0"], *study.ONE_DOCUMENT, lora={"r": 4, "alpha": 8.0})
    measured = study.gradients(trained, run, num_documents=5)
    parameters = [parameter for parameter in trained.policy.parameters() if parameter.requires_grad]
    batches = train_strided.step_batches(trained.config, trained.accelerator, trained.rows, 3, trained.tokenizer.pad_token_id)
    train_strided.train_step(trained.config, trained.accelerator, trained.policy, trained.network, batches)
    assert measured["own"][3][3] == pytest.approx(sum(parameter.grad.square().sum().item() for parameter in parameters), rel=1e-4)

    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    other = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1
    fake = {"measured": {"own": (vectors @ vectors.T).tolist(), "with_sft": (vectors @ other.T).tolist()}}
    found = report.gradient_noise(fake, {"measured": {"own": (other @ other.T).tolist()}})
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    signal = sum((vectors[i] @ vectors[j]).item() for i, j in pairs) / 42
    of_sft = sum((other[i] @ other[j]).item() for i, j in pairs) / 42
    common = sum((vectors[i] @ other[j]).item() for i, j in pairs) / 42
    noise = vectors.var(dim=0).sum().item()  # the trace of the sample covariance
    assert found["signal"][0] == pytest.approx(signal) and found["noise"][0] == pytest.approx(noise)
    assert found["documents"][0] == pytest.approx(noise / signal) and found["cosine"][0] == pytest.approx(common / math.sqrt(signal * of_sft))
    assert all(error > 0 for _, error in found.values())


@pytest.mark.parametrize("samples", [3, 4, 8])
def test_the_naive_baseline_is_a_smaller_diversity_coefficient(samples):
    """The ablation naive_baseline: reward minus the siblings' plain mean reward is the corrected advantage with the diversity weighted (N - 2) / (N - 1)."""
    alignment, diversity = torch.randn(2, 5, samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward = alignment - 0.7 * diversity
    naive = torch.stack([reward[:, j] - sum(reward[:, k] for k in range(samples) if k != j) / (samples - 1) for j in range(samples)], dim=1)
    torch.testing.assert_close(rloo_advantages(alignment, diversity, 1.0, 0.7 * (samples - 2) / (samples - 1)), naive)
    (setting,) = study.ABLATIONS["naive_baseline"]
    assert float(setting.partition("=")[2]) == pytest.approx(2 / 3, abs=1e-6)


def test_statistics_by_hand():
    """Guards against a standard deviation of the wrong kind, and differences that are not paired."""
    assert report.over_seeds([1.0, 2.0, 3.0]) == (2.0, 1.0)
    run = lambda *totals: {"measured": {"m": [list(totals), [1.0, 1.0]]}}
    mean, error = report.difference([run(1.0, 11.0), run(3.0, 13.0)], [run(0.0, 10.0)], "m")
    assert (mean, error) == (2.0, 0.0)  # documents differ by 10, the two methods by 2 on each of them
    mean, error = report.difference([run(1.0, 13.0)], [run(0.0, 10.0)], "m")
    assert mean == 2.0 and error == pytest.approx(1.0)


def test_the_learning_rate_is_chosen_by_validation(monkeypatch, tmp_path):
    """Guards against the wrong criterion: SFT's is cross-entropy, EBFT's the unbiased CFM; a missing run is named."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for method, rates in study.RATES["lora"].items():
        for place, rate in enumerate(rates):
            measured = {"cross_entropy": [[3.0 - place], [1.0]], "cfm_unbiased": [[1.0 if place == 1 else 2.0], [1.0]]}
            (tmp_path / f"sweep-lora-{method}-{rate:g}.json").write_text(json.dumps({"measured": measured}))
    assert study.chosen_rate("lora", "sft") == study.RATES["lora"]["sft"][-1]
    assert study.chosen_rate("lora", "ebft_0.03") == study.RATES["lora"]["ebft_0.1"][1]
    with pytest.raises(SystemExit, match="sweep-full-sft-1e-05.json is missing"):
        study.chosen_rate("full", "sft")


def test_every_run_of_the_study_is_a_valid_configuration():
    """Guards against a grid that stops in the middle of the night. (The learning rates are those that were chosen.)"""
    runs = [run for part in study.PARTS.values() for run in part()]
    assert len({run.name for run in runs}) == len(runs) > 60
    for run in runs:
        load_config(str(ROOT / "examples" / "study" / run.base), run.overrides, study.StructuredConfig if run.base == "structured.yaml" else study.StridedConfig)
        assert run.measure in study.MEASURES


def test_the_report_is_that_of_the_results():
    """Guards against a table that nobody can make again."""
    results = report.Results(study.RESULTS)
    assert (ROOT / "examples" / "study" / "results.md").read_text() == report.report(results)
    for name, run in results.runs.items():
        assert run["name"] == name and run["measured"] and all(math.isfinite(value) for entry in run["log"] for value in entry.values())


def test_results_are_written_whole_and_once(tiny, monkeypatch):
    """One run from its configuration to its file, and the second call that finds it."""
    run, _ = tiny("train.max_steps=2")
    study.run_one(run)
    result = json.loads(run.file.read_text())
    assert result["documents"] == 4 and len(result["log"]) == 2 and result["overrides"] == ["train.max_steps=2"]
    assert set(result["measured"]) == set(train_strided.EVALUATED)
    monkeypatch.setattr(study, "PARTS", {"one": lambda: [run]})
    monkeypatch.setattr(study, "run_one", lambda run: pytest.fail("run again"))
    monkeypatch.setattr(study.subprocess, "run", lambda *arguments, **how: None)
    study.main(["one"])


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
    output = study.subprocess.run([sys.executable, "-I", str(ROOT / "examples" / "study" / "execute.py"), str(file)], capture_output=True, text=True, env={}, timeout=120)
    assert json.loads(output.stdout) == {"HumanEval/2": [True, False, False, False]}, output.stderr
