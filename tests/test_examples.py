"""The recipes in examples/: each is a valid configuration that fits its own launch line, and each runs.

Two steps, with a tiny model on rows in the form of its dataset's.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_strided
import train_structured
from conversations import THINKING_TEMPLATE
from ebft_utils.config.modes import StridedConfig, StructuredConfig, load_config
from ebft_utils.run.memory import largest_row
from families import build
from helpers import ROOT, evaluations, logged, tiny_model, tiny_tokenizer
from real_vllm import Server, vllm_python
from serve_vllm import server_arguments

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
SCRIPTS = {"train_strided.py": StridedConfig, "train_structured.py": StructuredConfig}
MODULES = {"strided": train_strided, "structured": train_structured}
LAUNCH = re.compile(
    r"(?:CUDA_VISIBLE_DEVICES=(\S+) )?(?:python|accelerate launch -q --config_file (\S+)) (?:--num_processes (\d+) )?"
    r"(train_\S+\.py) --cfg (\S+)(.*)"
)
SERVE = re.compile(r"(?:CUDA_VISIBLE_DEVICES=(\S+) )?python serve_vllm\.py --cfg (\S+)(.*)")


def header(file: Path) -> list[str]:
    """The comment lines that a file begins with."""
    lines = file.read_text().splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def commands(file: Path) -> list[str]:
    """The commands of a header; one that ends in a backslash goes on in the next line."""
    lines = "\n".join(line[4:] for line in header(file) if line.startswith("#   "))
    return re.sub(r" \\\n +", " ", lines).splitlines()


@dataclass(frozen=True)
class Launch:
    """A command that starts training: a recipe as it stands, or with overrides. servers: commands that it needs."""

    file: Path
    gpus: str | None
    accelerate_file: str | None  # None: one process, without a launcher
    num_processes: str | None
    script: str
    cfg: str
    overrides: tuple[str, ...]
    servers: tuple[tuple[str | None, str, tuple[str, ...]], ...]

    @property
    def config(self) -> StridedConfig | StructuredConfig:
        return load_config(str(self.file), self.overrides, SCRIPTS[self.script])

    @property
    def name(self) -> str:
        return "-".join((self.file.stem, *self.overrides[:1]))


def launches(file: Path) -> list[Launch]:
    """The recipe as it stands, then its variants, each with the servers that stand before it."""
    found, servers = [], []
    for command in commands(file):
        if match := SERVE.fullmatch(command):
            *place, overrides = match.groups()
            servers.append((*place, tuple(shlex.split(overrides))))
        elif match := LAUNCH.fullmatch(command):
            *place, overrides = match.groups()
            found.append(Launch(file, *place, tuple(shlex.split(overrides)), tuple(servers)))
            servers = []
    return found


LAUNCHES = [launch for file in EXAMPLES for launch in launches(file)]
every_example = pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
every_launch = pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.name)


def runs_on_cpu(file: Path) -> bool:
    """Whether it is made for CPUs, as its header says."""
    return any(line.startswith("# Hardware: 2 CPU cores") for line in header(file))


def recipe(name: str) -> Launch:
    """As it stands."""
    return next(launch for launch in LAUNCHES if launch.file.stem == name)


# ----------------------------------------------------------------------------------------------------------------------
# What stands in them


def test_all_recipes_are_there():
    """Guards against a glob that finds nothing, and a feature that no recipe shows any more."""
    assert len(EXAMPLES) >= 15 and len({launch.name for launch in LAUNCHES}) == len(LAUNCHES) >= 20
    configs = [launch.config for launch in LAUNCHES]
    structured = [config for config in configs if config.mode == "structured"]
    assert {config.ebft.use_vllm for config in structured} == {True, False}
    assert {config.ebft.async_prefetch for config in structured if config.ebft.use_vllm} == {True, False}
    assert {config.lora is None for config in configs if config.mode == "strided"} == {True, False}
    transforms = {source.transform or config.data.transform for config in configs for source in config.data.mix or ()}
    transforms |= {config.data.transform for config in configs}
    assert {"text", "prompt_completion", "all_turns", "reasoning", "translate_to_english"} <= transforms


@every_example
def test_the_first_launch_line_is_the_recipe_as_it_stands(file):
    """Guards against a header whose first command is of a variant."""
    first, *variants = launches(file)
    assert not first.overrides and first.config.train.output_dir == f"runs/{file.stem}"
    assert all(variant.overrides for variant in variants)


@every_launch
def test_launch_line_fits(launch):
    """Guards against a command that names another file or server, and one that the configuration is not made for."""
    config, accelerate = launch.config, {"num_processes": 1, "distributed_type": "NO", "use_cpu": True}
    if launch.accelerate_file is not None:
        accelerate = yaml.safe_load((ROOT / launch.accelerate_file).read_text())
        assert int(launch.num_processes) > 1
    assert (ROOT / launch.script).is_file() and ROOT / launch.cfg == launch.file
    num_processes = int(launch.num_processes or accelerate["num_processes"])
    assert num_processes == 1 or accelerate["distributed_type"] != "NO"
    assert config.train.batch_size % (config.train.per_device_batch_size * num_processes) == 0
    assert accelerate["distributed_type"] == "FSDP" or not config.feature_network.shard
    assert len(launch.servers) == (config.mode == "structured" and config.ebft.use_vllm)
    for gpus, cfg, overrides in launch.servers:
        assert ROOT / cfg == launch.file
        assert runs_on_cpu(launch.file) or gpus not in launch.gpus.split(",")  # not one of the trainer's
        served = load_config(str(launch.file), overrides, StructuredConfig)
        assert server_arguments(served, "model") == server_arguments(config, "model")
    assert launch.gpus is None or len(launch.gpus.split(",")) == num_processes


@every_example
def test_header_says_what_it_needs(file):
    """Guards against an estimate for GPUs that reads like a measurement.

    And against commands in the header that the test above does not see.
    """
    lines = header(file)
    assert lines[0].startswith("# ") and lines[0].endswith(".")
    hardware = next(number for number, line in enumerate(lines) if line.startswith("# Hardware: "))
    text = " ".join(line.removeprefix("# ") for line in lines[hardware:] if not line.startswith("#   "))
    on_cpu = runs_on_cpu(file)
    assert (("not run by us" in text) != on_cpu) and ("estimated" in text.lower()) != on_cpu
    known = [command for command in commands(file) if command.startswith("pip install ")]
    known += [launch for launch in launches(file)] + [server for launch in launches(file) for server in launch.servers]
    assert len(known) == len(commands(file))
    assert max(map(len, file.read_text().splitlines())) <= 120


@pytest.mark.parametrize("name", ["paper_qa_code", "paper_unstructured_code", "paper_translation"])
def test_settings_of_the_paper(name):
    """What is left to the defaults has to stay the paper's value, too."""
    config = recipe(name).config
    translation = name == "paper_translation"
    ebft, train = config.ebft, config.train
    assert (ebft.stride, ebft.context_length, ebft.generate_max_len) == ((2, 4, 4) if translation else (8, 8, 8))
    assert (ebft.n_samples_per_prompt, train.batch_size) == (4, 8 if translation else 16)
    assert ebft.embed_method == ("mean_pooling" if translation else "last_token")
    assert ebft.feature_layers == [0.25, 0.5, 0.75]
    assert (ebft.temperature, ebft.advantage_estimator, ebft.feature_norm) == (0.6, "eq94", "joint")
    assert (ebft.whitening, ebft.alignment_coef) == ("sample", 1.0)
    assert ebft.diversity_coef in (0, 0.5, 1) and ebft.ce_coef in (0, 0.03, 0.1)
    assert (train.learning_rate, train.lr_scheduler, train.warmup_ratio) == (1e-6, "constant", 0.03)
    assert (train.adam_beta1, train.adam_beta2, train.weight_decay, train.max_grad_norm) == (0.9, 0.95, 0.0, 1.0)
    assert config.data.packing and config.data.sequence_length == 1024 and config.lora is None
    assert config.model.name_or_path == ("meta-llama/Llama-3.2-1B" if translation else "Qwen/Qwen2.5-1.5B")


def test_baseline_differs_in_the_loss_alone():
    """sft.yaml beside quickstart.yaml: a comparison of two things at once would be none."""
    quickstart, baseline = (recipe(name).config.to_dict() for name in ("quickstart", "sft"))
    differing = {
        f"{section}.{key}"
        for section in quickstart
        for key in quickstart[section] or ()
        if quickstart[section][key] != baseline[section][key]
    }
    assert differing == {"ebft.rl_coef", "ebft.ce_coef", "train.output_dir", "train.rollout_table_steps"}
    assert (baseline["ebft"]["rl_coef"], baseline["ebft"]["ce_coef"]) == (0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# What the evidence says (examples/study/README.md), and what they have


def right_rate(config) -> bool:
    low, high = (1e-5, 1e-4) if config.lora is None else (1e-4, 2e-3)
    return low <= config.train.learning_rate <= high


def right_features(config) -> bool:
    """completion_mean below 10,000 groups a step. Without rollouts in training no update is made of features."""
    groups = config.train.batch_size * largest_row(config)[1]
    return config.ebft.rl_coef == 0 or groups >= 10_000 or config.ebft.embed_method == "completion_mean"


EVIDENCE = {"learning_rate": right_rate, "embed_method": right_features}
EVIDENCE["ce_coef"] = lambda config: config.ebft.ce_coef >= 0.1


def without_reason(launch: Launch) -> set[str]:
    """Settings that contradict the evidence, and have no comment at their line that says why."""
    overridden = {override.partition("=")[0].partition(".")[2] for override in launch.overrides}
    reasons = set(re.findall(r"^  (\w+): [^#\n]*# \w", launch.file.read_text(), flags=re.MULTILINE)) - overridden
    return {key for key, holds in EVIDENCE.items() if not holds(launch.config)} - reasons


@every_launch
def test_recipes_follow_the_evidence(launch):
    """Guards against rates of full fine-tuning for adapters, and features that the steps are too small for."""
    assert not without_reason(launch)


@pytest.mark.parametrize("page", ["examples/README.md", "ebft_utils/README.md"])
def test_the_pages_give_the_same_rates(page):
    """Guards against pages that send a reader to different learning rates."""
    text = " ".join((ROOT / page).read_text().split())
    assert re.search(r"5e-4.{,20} \(1e-4 to 2e-3\)", text) and "is the paper's, for long runs of all weights" in text


def test_a_deviation_needs_a_reason(tmp_path):
    """Guards against a rule that lets everything through: a recipe of three deviations, one with its reason."""
    text = (ROOT / "examples" / "mixed.yaml").read_text()
    text = text.replace("learning_rate: 5.0e-4", "learning_rate: 1.0e-5").replace("ce_coef: 0.1", "ce_coef: 0.03")
    text = re.sub("embed_method: completion_mean.*", "embed_method: last_token  # measured so", text)
    (tmp_path / "mixed.yaml").write_text(text)
    launch = replace(recipe("mixed"), file=tmp_path / "mixed.yaml")
    assert without_reason(launch) == {"learning_rate", "ce_coef"}
    assert right_features(load_config(str(launch.file), ["ebft.embed_method=last_token", "train.batch_size=1000"]))
    assert not right_features(load_config(str(launch.file), ["train.batch_size=800"]))  # 12 groups a row
    assert without_reason(replace(launch, overrides=("ebft.embed_method=last_token",))) > {"embed_method"}
    assert not right_rate(load_config(str(launch.file), ["lora=null", "train.learning_rate=5e-4"]))


# ----------------------------------------------------------------------------------------------------------------------
# Rows as the datasets have them


NAMES = ["add", "scale", "shift", "power", "halve", "clip", "negate", "square"]
TRANSLATIONS = {
    "Guten Tag.": "Good day.",
    "Der Hund schläft.": "The dog is asleep.",
    "Es regnet heute.": "It is raining today.",
    "Das Haus ist alt.": "The house is old.",
    "Ich habe Zeit.": "I have time.",
    "Wo ist der Zug?": "Where is the train?",
    "Das Buch ist neu.": "The book is new.",
    "Sie liest gern.": "She likes to read.",
}


def python_files() -> list[dict]:
    return [
        {"text": f"def {name}(x):\n    y = x + {number}\n    return y * {number + 2}\n\n\nprint({name}({number}))\n"}
        for number, name in enumerate(NAMES)
    ]


def functions() -> list[dict]:
    rows = []
    for number, name in enumerate(NAMES):
        prompt = f'def {name}(x):\n    """Uses {number}."""\n'
        rows.append({"prompt": prompt, "completion": f"    y = x + {number}\n    return y * {number + 2}\n"})
    return rows


def open_code_instruct() -> list[dict]:
    """All columns are text."""
    return [
        {
            "id": f"{number:032x}",
            "input": f"Write {name}(x), with {number}.",
            "output": f"```python\ndef {name}(x):\n    return x + {number}\n```",
            "domain": "generic",
            "generation_algorithm": "self-instruct",
            "llm_judgement": json.dumps({"logical_correctness": {"score": 5}}),
            "unit_tests": json.dumps([f"\nassert {name}(0) == {number}\n"]),
            "tests_execution_status": json.dumps(["pass"]),
            "average_test_score": "1",
        }
        for number, name in enumerate(NAMES)
    ]


def translations(language: str) -> list[dict]:
    return [{"translation": {language: foreign, "en": english}} for foreign, english in TRANSLATIONS.items()]


def conversations() -> list[dict]:
    """Of two turns; the prompt once more in a column of its own."""
    rows = []
    for number, name in enumerate(NAMES):
        said = [f"What is {name}?", f"It makes {number}.", "Why?", f"Since x is {number}."]
        messages = [{"content": words, "role": ("user", "assistant")[index % 2]} for index, words in enumerate(said)]
        rows.append({"prompt": said[0], "prompt_id": f"{number:064x}", "messages": messages})
    return rows


def mathematics() -> list[dict]:
    """Thinking and answer in the last message."""
    rows = []
    for number in range(8):
        problem = f"What is {number} + 1?"
        generation = f"<think>\nOne more than {number}.\n</think>\n\nIt is {number + 1}."
        row = {"problem": problem, "solution": f"{number} + 1 = {number + 1}", "answer": str(number + 1)}
        row |= {"problem_type": "Algebra", "question_type": "math-word-problem", "source": "olympiads"}
        row |= {"uuid": f"{number:08x}-0000-5000-8000-000000000000", "is_reasoning_complete": [True, True]}
        row |= {"generations": [generation, generation], "correctness_math_verify": [True, False]}
        row |= {"correctness_llama": None, "finish_reasons": None, "correctness_count": 1}
        row["messages"] = [{"content": problem, "role": "user"}, {"content": generation, "role": "assistant"}]
        rows.append(row)
    return rows


def my_rows() -> list[dict]:
    """Those that fit when a character is a token."""
    lines = (ROOT / "examples" / "my_rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if len(line) < 180][:8]


def human_eval() -> list[dict]:
    return [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def {name}_twice(x):\n    """Twice."""\n',
            "entry_point": f"{name}_twice",
            "completion": f"    return 2 * (x + {number})\n",
            "test": f"assert candidate(0) == {2 * number}",
        }
        for number, name in enumerate(NAMES)
    ]


MADE_BY = {
    "python_stdlib": python_files,
    "python_stdlib_functions": functions,
    "human_eval": human_eval,
    "examples/my_rows.jsonl": my_rows,
    "tokyotech-llm/swallow-code": python_files,
    "nvidia/OpenCodeInstruct": open_code_instruct,
    "HuggingFaceH4/ultrachat_200k": conversations,
    "open-r1/OpenR1-Math-220k": mathematics,
}


def rows_like(dataset: str, name: str | None) -> list[dict]:
    """A few rows in the form of a dataset's."""
    if dataset == "haoranxu/ALMA-Human-Parallel":
        return translations(name.partition("-")[0])
    if dataset == "haoranxu/WMT22-Test":
        pairs = [{"de": f"Nein! {german}", "en": f"No! {english}"} for german, english in TRANSLATIONS.items()]
        return [{name: pair} for pair in pairs]
    return MADE_BY[dataset]()


def learnt_in(row: dict) -> list[str]:
    """What should be learnt of such a row, piece by piece, without the end-of-text token."""
    if "translation" in row:
        return [" " + row["translation"]["en"]]
    if "messages" in row:
        return [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return [row[next(column for column in ("completion", "output", "text") if column in row)]]


def read_in(row: dict) -> str:
    """What should stand in the prompt of such a row; nothing for raw text."""
    if "translation" in row:
        return next(text for language, text in row["translation"].items() if language != "en")
    return row["messages"][0]["content"] if "messages" in row else row.get("prompt", row.get("input", ""))


# ----------------------------------------------------------------------------------------------------------------------
# Two steps of each


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    """The tiny llama with a chat template, whose answers end in <eos>."""
    folder = tmp_path_factory.mktemp("chat-model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


FAMILY_OF = {"qwen3_5": ("qwen3_5_text", {}), "gemma3": ("gemma3_text", {"sliding_window": 32})}


@pytest.fixture(scope="session")
def model_of(chat_model, tmp_path_factory):
    """model_of(LAUNCH): a small model of the recipe's family, where that is not the llama's."""

    def model(launch: Launch) -> Path:
        for beginning, (family, changes) in FAMILY_OF.items():
            if launch.file.stem.startswith(beginning):
                folder = tmp_path_factory.mktemp(family)
                shutil.copytree(chat_model, folder, dirs_exist_ok=True)
                build(family, **changes).save_pretrained(folder)
                return folder
        return chat_model

    return model


def local(tree: dict, folder: Path) -> list[dict]:
    """Puts files of a few rows in place of a recipe's datasets; transforms, columns and weights stay.

    Returns the rows that are trained on.
    """
    data, rows = tree["data"], []
    for number, source in enumerate(data.get("mix", [data])):
        own = rows_like(source["dataset"], source.pop("name", None))
        source.pop("split", None)
        source["dataset"] = str(write(folder / f"rows-{number}.jsonl", own))
        rows += own
    if "dataset" in tree.get("eval", {}):
        held_out = rows_like(tree["eval"]["dataset"], tree["eval"].pop("name", None))
        tree["eval"].pop("split", None)
        tree["eval"] |= {"dataset": str(write(folder / "held-out.jsonl", held_out)), "num_documents": 2}
    else:
        tree.setdefault("eval", {})["num_documents"] = 0
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def small(launch: Launch, model: Path, folder: Path) -> tuple[dict, list[dict]]:
    """A recipe for a tiny model on a few rows, two steps, and these rows."""
    tree = yaml.safe_load(launch.file.read_text())
    for override in launch.overrides:
        key, _, value = override.partition("=")
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = yaml.safe_load(value)
    structured = SCRIPTS[launch.script] is StructuredConfig
    rows = local(tree, folder)
    tree["model"] |= {"name_or_path": str(model), "dtype": "float32"}
    tree["model"].pop("pad_token", None)  # of another tokenizer
    tree.pop("feature_network", None)  # is for several processes
    if structured:
        tree["data"]["max_prompt_length"] = 64
        tree["ebft"]["max_completion_length"] = 48
        if "max_conversation_length" in tree["data"]:
            tree["data"]["max_conversation_length"] = 144
            tree["ebft"]["max_completion_length"] = 24
    else:
        tree["data"]["sequence_length"] = 160
    tree["train"] |= {"output_dir": str(folder / "run"), "max_steps": 2, "save_steps": 0, "seed": 1}
    tree["train"] |= {"batch_size": 2, "per_device_batch_size": 1}
    return tree, rows


def run(tree: dict, mode: str, folder: Path, monkeypatch) -> list:
    """Trains, and returns the batches of all steps."""
    file, module, batches = folder / "recipe.yaml", MODULES[mode], []
    file.write_text(yaml.safe_dump(tree))
    made = module.step_batches

    def keep(*arguments):
        batches.extend(found := made(*arguments))
        return found

    monkeypatch.setattr(module, "step_batches", keep)
    AcceleratorState._reset_state(True)
    module.main(["--cfg", str(file)])
    return batches


def assert_trained(tree: dict, folder: Path) -> list[dict]:
    """Two steps with finite numbers, and weights that moved as far as AdamW moves them.

    That is by about the sum of the learning rates where gradients agree, never by more.
    """
    steps = [entry for entry in logged(folder) if "train/loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    for entry in steps:
        assert all(torch.tensor(value).isfinite() for value in entry.values()) and entry["train/grad_norm"] > 0
        assert (entry.get("ebft/advantages_std", 0) > 0) == (tree["ebft"].get("rl_coef", 1) > 0)
    (file,) = (folder / "final").glob("*model.safetensors")
    after = load_file(file)
    if "lora" in tree:
        moved = torch.cat([tensor.flatten() for name, tensor in after.items() if "lora_B" in name])  # begins at 0
    else:
        before = load_file(Path(tree["model"]["name_or_path"]) / "model.safetensors")
        assert after.keys() == before.keys()
        moved = torch.cat([(tensor - before[name]).flatten() for name, tensor in after.items()])
    most = sum(entry["train/learning_rate"] for entry in steps)
    assert most > 0 and 0.5 * most < moved.abs().max() < 1.2 * most
    assert (moved != 0).double().mean() > 0.1
    return steps


def assert_batches(batches: list, tree: dict, mode: str, rows: list[dict], tokenizer) -> None:
    """What is learnt are the completions (or texts) of the rows, with their end-of-text tokens.

    Rollouts start inside of them.
    """
    answers = {"".join(f"{text}<eos>" for text in learnt_in(row)): read_in(row) for row in rows}
    if mode == "structured":
        found = set()
        for conversation in [conversation for batch in batches for conversation in batch.conversations]:
            words = "".join(map(tokenizer.decode, conversation.truths))
            assert answers[words] in tokenizer.decode(conversation.prompt)
            parts = [part + "<eos>" for part in words.split("<eos>")[:-1]]
            assert [tokenizer.decode(truth) for truth in conversation.truths] == parts
            found.add(words)
        assert len(found) == 4  # two rows a step, each another one
        return
    seen = 0
    ebft = {"min_completion_prefix": 0, "context_length": 8, "generate_max_len": 8, **tree["ebft"]}
    for batch in batches:
        tensors = (batch.document_ids, batch.segment_ids, batch.completion_ids, batch.anchors, batch.valid)
        for ids, segments, completions, anchors, valid in zip(*tensors, strict=True):
            for number in range(int(completions.max()) + 1):
                words = tokenizer.decode(ids[completions == number])
                place = (completions == number).nonzero().flatten().tolist()
                document = (segments == segments[place[0]]).nonzero().flatten().tolist()
                assert answers[words] in tokenizer.decode(ids[document[0] : place[0]])
                assert (place[0] == document[0]) == (answers[words] == "")  # raw text has no prompt
                own = [anchor for anchor in anchors[valid].tolist() if place[0] <= anchor <= place[-1]]
                assert own[0] == max(document[0] + ebft["context_length"], place[0] + ebft["min_completion_prefix"])
                assert own[-1] + ebft["generate_max_len"] <= place[-1] + 1
                seen += len(own)
    assert seen == sum(int(batch.valid.sum()) for batch in batches) > 0


@every_launch
def test_two_steps(launch, model_of, tmp_path, monkeypatch, capsys):
    """The recipe's transform, columns, mode, layers, losses and schedule, without its server.

    Guards against rows of that form being left out, too.
    """
    tree, rows = small(launch, model_of(launch), tmp_path)
    mode = SCRIPTS[launch.script].mode
    if mode == "structured":
        tree["ebft"] |= {"use_vllm": False, "async_prefetch": False}
    batches = run(tree, mode, tmp_path, monkeypatch)
    assert "left out" not in capsys.readouterr().out
    steps = assert_trained(tree, tmp_path / "run")
    assert ("ebft/mean_reward" in steps[0]) == (tree["ebft"].get("rl_coef", 1) > 0)
    assert_batches(batches, tree, mode, rows, tiny_tokenizer())
    evaluated = evaluations(tmp_path / "run")
    assert [entry["step"] for entry in evaluated] == ([0, 2] if "dataset" in tree["eval"] else [])
    assert all(0 < entry["eval/cross_entropy"] < 20 for entry in evaluated)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real vLLM server for adapters of the recipes' size, of a tiny model with a chat template."""
    vllm_python()
    server = Server(tmp_path_factory.mktemp("served"), tied=False, lora={"r": 16, "alpha": 32})
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    tokenizer.save_pretrained(server.model)
    try:
        yield server.start().wait()
    finally:
        server.kill()


def test_two_steps_with_a_server(server, tmp_path, monkeypatch):
    """The asynchronous recipe as it stands, with its server.

    The first batch is from fresh weights, the second from weights one update older.
    """
    tree, rows = small(recipe("qwen3_4b_structured_async"), server.model, tmp_path)
    assert tree["ebft"]["async_prefetch"] and tree["lora"] == server.lora and "vllm" not in tree
    tree["vllm"] = dict(server.vllm)
    batches = run(tree, "structured", tmp_path, monkeypatch)
    steps = assert_trained(tree, tmp_path / "run")
    assert_batches(batches, tree, "structured", rows, tiny_tokenizer())
    assert [entry["vllm/staleness"] for entry in steps] == [0, 1]
    fresh, stale = steps
    assert fresh["vllm/logprob_gap"] < 1e-3 < 1e-2 < stale["vllm/logprob_gap"] < 0.2  # an update of 5e-4 shows
    assert 0.99 < fresh["vllm/ratio_min"] <= fresh["vllm/ratio_max"] < 1.01
    for entry in steps:
        assert entry["vllm/capped"] == 0 and 1 <= entry["rollout/length"] <= 48
    assert not [name for name in server.models() if name.startswith("ebft-")]  # the run has taken its adapter off
