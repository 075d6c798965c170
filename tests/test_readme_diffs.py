"""README.md's diffs: each fits the script that it names, runs, and changes what it says."""

import re
import runpy

import pytest

from helpers import ROOT, logged, weights

README = (ROOT / "README.md").read_text()
FOUND = re.findall(r"\*\*The (\w+)\*\* \(`(train_\w+\.py)`.*?```diff\n(.*?)```", README, flags=re.DOTALL)


def applied(script: str, diff: str) -> str:
    """The script with a diff applied; its context has to stand there exactly once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    text = (ROOT / script).read_text()
    assert text.count(before) == 1, before
    return text.replace(before, after)


@pytest.mark.parametrize("name, script, diff", FOUND, ids=[name for name, *_ in FOUND])
def test_a_copy_with_the_diff_trains_something_else(name, script, diff, train, tmp_path, write_config):
    """Guards against a diff that no longer fits, and against one that the training ignores."""
    assert 3 <= sum(line[0] in "+-" for line in diff.splitlines()) <= 4
    copy = tmp_path / "my_script.py"
    copy.write_text(applied(script, diff))
    start = train("plain", ebft__ce_coef=1.0)
    runpy.run_path(str(copy))["main"](
        ["--cfg", str(tmp_path / "config.yaml"), f"train.output_dir={tmp_path / 'changed'}"]
    )
    plain, changed = weights(start), weights(tmp_path / "changed")
    assert max((plain[name] - changed[name]).abs().max().item() for name in plain) > 1e-6
    assert len(logged(tmp_path / "changed")) == len(logged(start))


def test_there_are_diffs():
    assert [name for name, *_ in FOUND] == ["reward", "loss"]
