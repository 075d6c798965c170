"""The runs of the small study: what is trained, what is measured, and in which order. run.py runs them."""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

import grid
import measure
from downstream import confidence_gaps, edit_similarity, is_valid_continuation, line_ends, next_line
from ebft_utils.data.batches import rollout_uniforms
from ebft_utils.data.rows import Rows, one_a_row
from ebft_utils.models import base_causal_lm
from ebft_utils.run.distributed import precision
from make import evenly

RESULTS = HERE / "results"
MODELS = Path("runs/small/models")
BASE = "small/small.yaml"
# method -> learning rates that are tried, the likeliest first
RATES = {"sft": (3e-4, 1e-3, 1e-4), "ebft_0.1": (3e-4, 1e-3, 1e-4, 3e-5), "ebft_0": (3e-4, 1e-4, 3e-5)}
SWEEP_STEPS = 30
IN_ORDER = ("sft", "ebft_0.1", "ebft_0", "ebft_0.03")
ON_THE_WAY = ("held_out_modules", 50)  # measured every so many steps
STEPS_FOR_THE_TIME = 1600  # of SFT: as many seconds as EBFT takes for 200
VALIDATION = ("eval.dataset=runs/small/validation.jsonl", "eval.num_documents=96")
ANCHORS = 4  # most continuations of a document
AFTER = 32  # tokens of a document before the first of them


@dataclass(frozen=True)
class Run(grid.Run):
    """Of this study: its results lie beside it."""

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def unfinished(self) -> Path:
        return grid.ROOT / "runs" / "small" / "unfinished" / f"{self.name}.pt"


# ----------------------------------------------------------------------------------------------------------------------
# What is run


def sweep() -> list[Run]:
    """Short runs at several learning rates, the likeliest of all methods first."""
    runs = []
    for place in range(max(map(len, RATES.values()))):
        for method, rates in RATES.items():
            for rate in rates[place : place + 1]:
                settings = (*grid.METHODS[method], f"train.learning_rate={rate}", f"train.max_steps={SWEEP_STEPS}")
                overrides = (*settings, "train.seed=100", *VALIDATION)
                runs.append(Run(f"sweep-{method}-{rate:g}", BASE, overrides, "held_out_modules"))
    return runs


def chosen_rate(method: str) -> float | None:
    """The learning rate that is best for what the method is trained for; None: not all of them have a result."""
    reached, swept = {}, grid.SWEPT[method]
    for rate in RATES[swept]:
        file = RESULTS / f"sweep-{swept}-{rate:g}.json"
        if not file.is_file():
            return None
        reached[rate] = grid.trained_for(json.loads(file.read_text()))
    return max(reached, key=reached.get)


def comparison(seeds=grid.SEEDS) -> list[Run]:
    """The methods, seed by seed, as far as their learning rates are chosen."""
    runs = []
    for seed in seeds:
        for method in sorted(grid.METHODS, key=IN_ORDER.index):
            if (rate := chosen_rate(method)) is not None:
                overrides = (*grid.METHODS[method], f"train.learning_rate={rate}", f"train.seed={seed}")
                runs.append(Run(f"main-{method}-seed{seed}", BASE, overrides, "all_of_modules", ON_THE_WAY))
    return runs


def for_the_time() -> list[Run]:
    """SFT for about as long as EBFT takes."""
    runs, rate = [], chosen_rate("sft")
    for seed in grid.SEEDS if rate is not None else ():
        steps = (f"train.max_steps={STEPS_FOR_THE_TIME}", f"train.seed={seed}")
        overrides = (*grid.METHODS["sft"], f"train.learning_rate={rate}", *steps)
        runs.append(Run(f"time-sft-seed{seed}", BASE, overrides, "all_of_modules", ("held_out_modules", 400)))
    return runs


def every_run() -> Iterator[Run]:
    """In the order in which they say most. What follows a learning rate that is not chosen yet is left out."""
    yield Run("base", BASE, (), "all_of_modules")
    yield Run("validation-base", BASE, VALIDATION, "held_out_modules")
    yield from sweep()
    yield from comparison(grid.SEEDS[:1])
    yield from comparison(grid.SEEDS[1:])
    yield from for_the_time()


# ----------------------------------------------------------------------------------------------------------------------
# What is measured. A module is the independent unit: the pieces of one are added up.


def documents_of(trained: measure.Trained) -> tuple[Rows, list[str]]:
    """The held-out documents, and the module of each."""
    rows = [json.loads(line) for line in Path(trained.config.eval.dataset).read_text().splitlines()]
    documents = trained.test.documents
    if len(documents) != len(rows):
        raise ValueError(f"{trained.config.eval.dataset} has {len(rows)} documents, and {len(documents)} are used")
    return Rows(documents, one_a_row(len(documents))), [row["module"] for row in rows]


def by_module(table: dict[str, torch.Tensor], modules: list[str]) -> dict[str, list]:
    """name -> (2, documents) -> name -> (2, modules), in the order in which the modules come."""
    numbers = {module: number for number, module in enumerate(dict.fromkeys(modules))}
    index = torch.tensor([numbers[module] for module in modules])
    sums = {
        name: torch.zeros(len(values), len(numbers), dtype=torch.float64).index_add_(1, index, values.double().cpu())
        for name, values in table.items()
    }
    return {name: measure.rounded(values) for name, values in sums.items()}


def held_out_modules(trained: measure.Trained, run: Run) -> dict[str, list]:
    """Cross-entropy, CFM and reward."""
    rows, modules = documents_of(trained)
    return by_module(measure.evaluated(trained, run, rows), modules)


def all_of_modules(trained: measure.Trained, run: Run) -> dict[str, list]:
    """Also continuations of 64 tokens, and calibration. The model is kept, for what will be measured later."""
    folder = MODELS / run.name
    base_causal_lm(trained.policy.causal_lm).save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)
    rows, modules = documents_of(trained)
    table = {**continuations(trained, run, rows), **calibration(trained, rows)}
    return held_out_modules(trained, run) | by_module(table, modules)


def with_places(batch, place: dict, tokenizer, length: int) -> dict:
    """The forward's arguments, with anchors at up to ANCHORS line ends of each document instead of its own."""
    found = []
    for ids in batch.document_ids.tolist():
        texts = [tokenizer.decode([token]) for token in ids]
        found.append(evenly(line_ends(texts, AFTER, len(ids) - length), ANCHORS))
    valid = torch.tensor([[number < len(own) for number in range(ANCHORS)] for own in found])
    anchors = torch.tensor([[*own, *[AFTER] * (ANCHORS - len(own))] for own in found])
    device = batch.document_ids.device
    return {**place, "anchors": anchors.to(device), "valid": valid.to(device)}


@torch.no_grad()
def continuations(trained: measure.Trained, run: Run, rows: Rows, size: int = 16) -> dict[str, torch.Tensor]:
    """Of rollouts of 64 tokens at the ends of lines: CFM of their first tokens, and what they are as text."""
    config, tokenizer, parts = run.config(), trained.tokenizer, []
    policy = trained.accelerator.unwrap_model(trained.policy).eval()
    length, samples = max(grid.LENGTHS), config.ebft.n_samples_per_prompt
    for start in range(0, len(rows), size):
        row_ids = list(range(start, min(start + size, len(rows))))
        batch, place = measure.batch_of(trained, config, rows, row_ids)
        place = with_places(batch, place, tokenizer, length)
        uniforms = rollout_uniforms(config.eval.seed, batch.keys, ANCHORS, samples, length)
        with precision(trained.accelerator, policy):
            numbers = uniforms.to(trained.accelerator.device)
            rollouts = policy.generate(**place, temperature=config.ebft.temperature, uniforms=numbers)
            found = measure.cfm_of_first_tokens(trained, config.ebft.embed_method, place, rollouts)
        parts.append({**found, **judged(tokenizer, place, rollouts)})
    policy.train()
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def judged(tokenizer, place: dict, rollouts: torch.Tensor) -> dict[str, torch.Tensor]:
    """name -> (2, rows): sums over a document's continuations, and their number. What follows an end token is not read.

    valid_truth is valid_python of the document's own text: as high as it can get.
    """
    names = ("valid_python", "next_line_exact", "next_line_similarity", "valid_truth")
    table = {name: torch.zeros(2, len(rollouts), dtype=torch.float64) for name in names}
    for row, index in place["valid"].nonzero().tolist():
        anchor, ids = int(place["anchors"][row, index]), place["document_ids"][row].tolist()
        before, truth = (tokenizer.decode(part) for part in (ids[:anchor], ids[anchor : anchor + rollouts.shape[-1]]))
        table["valid_truth"][:, row] += torch.tensor([float(is_valid_continuation(before, truth)), 1.0])
        for tokens in rollouts[row, index].tolist():
            written = tokenizer.decode(tokens).partition(tokenizer.eos_token)[0]
            lines = next_line(written), next_line(truth)
            values = (is_valid_continuation(before, written), lines[0] == lines[1], edit_similarity(*lines))
            for name, value in zip(names, values, strict=False):
                table[name][:, row] += torch.tensor([float(value), 1.0])
    return table


@torch.no_grad()
def calibration(trained: measure.Trained, rows: Rows, size: int = 16) -> dict[str, torch.Tensor]:
    """Of the next token, at temperature 1: how often the likeliest one is right, and the gaps of confidence.

    accuracy (2, documents); confidence_gaps (BINS, documents), see downstream.py.
    """
    model = copy.deepcopy(base_causal_lm(trained.policy.causal_lm)).eval()
    model.set_attn_implementation("sdpa")
    accuracy, gaps = [], []
    for row in range(len(rows)):
        (document,) = rows[row]
        ids = torch.tensor([document.tokens], device=trained.accelerator.device)
        confidence, likeliest = model(ids, use_cache=False).logits[0, :-1].float().softmax(-1).max(-1)
        correct = (likeliest == ids[0, 1:]).cpu()
        accuracy.append([float(correct.sum()), float(len(correct))])
        gaps.append(confidence_gaps(confidence.cpu(), correct))
    return {"accuracy": torch.tensor(accuracy).T, "confidence_gaps": torch.tensor(gaps, dtype=torch.float64).T}


measure.MEASURES.update(held_out_modules=held_out_modules, all_of_modules=all_of_modules)
