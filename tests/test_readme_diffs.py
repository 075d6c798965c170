"""README.md's diffs: each fits the script that it names, and runs; a reward is learnt."""

import re
import runpy

import pytest
import yaml

from helpers import ROOT, forget_accelerator, logged, weights
from real_vllm import prompts_file

README = "".join((ROOT / page).read_text() for page in ("README.md", "ebft_utils/algorithm/README.md"))
FOUND = re.findall(r"\*\*The (\w+)\*\* \(`(train_\w+\.py)`.*?```diff\n(.*?)```", README, flags=re.DOTALL)


def applied(script: str, diff: str) -> str:
    """The script with a diff applied; its context has to stand there exactly once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    text = (ROOT / script).read_text()
    assert text.count(before) == 1, before
    return text.replace(before, after)


@pytest.fixture
def trained(tmp_path, model_folder):
    """trained(NAME, SCRIPT, TEXT, override, ..): the folder of a run of a script's text on prompts and completions."""
    rows = prompts_file(tmp_path / "rows.jsonl")

    def run(name: str, script: str, text: str, *overrides: str):
        forget_accelerator()
        (tmp_path / f"{name}.py").write_text(text)
        tree = {
            "model": {"name_or_path": str(model_folder)},
            "data": {"dataset": str(rows), "transform": "prompt_completion"},
            "ebft": {"temperature": 1.0},
            "train": {"output_dir": str(tmp_path / name), "max_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
            "eval": {"num_documents": 0},
        }
        if script == "train_structured.py":
            tree["data"]["max_prompt_length"] = 64
            tree["ebft"] |= {"max_completion_length": 24, "use_vllm": False}
        else:
            tree["ebft"] |= {"generate_max_len": 4, "stride": 4}
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(tree))
        runpy.run_path(str(tmp_path / f"{name}.py"))["main"](["--cfg", str(file), *overrides])
        return tmp_path / name

    return run


@pytest.mark.parametrize("name, script, diff", FOUND, ids=[f"{name}-{script}" for name, script, _ in FOUND])
def test_a_copy_with_the_diff_trains_something_else(name, script, diff, trained):
    """Guards against a diff that no longer fits, and against one that the training ignores."""
    assert 3 <= sum(line[0] in "+-" for line in diff.splitlines()) <= 4
    before = trained("before", script, (ROOT / script).read_text())
    after = trained("after", script, applied(script, diff))
    plain, changed = weights(before), weights(after)
    assert max((plain[name] - changed[name]).abs().max().item() for name in plain) > 1e-6
    assert len(logged(after)) == len(logged(before))


@pytest.mark.parametrize("script, diff", [found[1:] for found in FOUND if found[0] == "reward"])
def test_the_reward_rises(script, diff, trained):
    """Guards against the wrong sign: as the only reward, the share of tokens that occur in the truth grows."""
    alone = ("ebft.alignment_coef=0", "ebft.diversity_coef=0", "ebft.ce_coef=0", "train.max_steps=25")
    rewards = [entry["ebft/mean_reward"] for entry in logged(trained("run", script, applied(script, diff), *alone))]
    assert 0 <= min(rewards) and max(rewards) <= 1
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5, rewards


def test_there_are_diffs():
    scripts = [(name, script) for name, script, _ in FOUND]
    assert scripts == [("reward", "train_strided.py"), ("reward", "train_structured.py"), ("loss", "train_strided.py")]
