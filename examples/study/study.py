"""Does EBFT learn what the paper says?

EBFT against supervised fine-tuning, from the same start, on the same documents, with seeds and error bars.

    python examples/study/study.py                     all runs that have no result yet, then the report
    python examples/study/study.py sweep main          some parts of it; see PARTS in grid.py
    python examples/study/study.py --list              what would be run

Each run is a configuration (strided.yaml or structured.yaml, and what grid.py adds), a seed and a learning rate. It is
trained with `train_step` of the training scripts, without their checkpoints and logs, and measured in the same process.
Its result is one small file in results/: the settings that differ from its base file, the log, and the numbers of each
held-out document. A run that has a result is not run again, so the study can be stopped and continued.

The learning rates are chosen first (part `sweep`, on the validation half of the held-out documents). Everything else
is measured on the other half.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from tqdm import tqdm

import grid
from ebft_utils.config.settings import UserError
from ebft_utils.run.distributed import run_as_command
from measure import MEASURES, Trained

SAVE_EVERY = 25  # steps


def run_one(run: grid.Run) -> None:
    """Trains, measures, and writes the result's file when it is whole. A run that was stopped goes on where it was."""
    trained = Trained(run.config(*run.overrides))
    log, on_the_way = go_on(run, trained)
    seconds, cpu_seconds = (log[-1][name] if log else 0.0 for name in ("seconds", "cpu_seconds"))
    num_steps = 0 if run.name.startswith("gradient-") or run.name.endswith("base") else trained.num_steps
    for step in tqdm(range(len(log), num_steps), desc=run.name, initial=len(log), total=num_steps):
        started, cpu_started = time.perf_counter(), time.process_time()
        metrics = trained.take_step(step)
        seconds, cpu_seconds = seconds + time.perf_counter() - started, cpu_seconds + time.process_time() - cpu_started
        times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
        log.append({"step": step + 1, "train/grad_norm": trained.grad_norm, **metrics, **times})
        if run.on_the_way is not None and (step + 1) % run.on_the_way[1] == 0 and step + 1 < num_steps:
            on_the_way[step + 1] = MEASURES[run.on_the_way[0]](trained, run)
        if (step + 1) % SAVE_EVERY == 0:
            keep(run, trained, log, on_the_way)
    measured = MEASURES[run.measure](trained, run)
    result = {
        "name": run.name,
        "base": run.base,
        "overrides": list(run.overrides),
        "device": device_name(trained.accelerator.device),
        "seconds": round(seconds, 1),
        "documents": num_steps * trained.config.train.batch_size,
        "measured": measured,
        **({"on_the_way": on_the_way} if on_the_way else {}),
        "log": [{name: float(f"{value:.5g}") for name, value in entry.items()} for entry in log],
    }
    run.file.parent.mkdir(exist_ok=True)
    unfinished = run.file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.rename(run.file)
    run.unfinished.unlink(missing_ok=True)
    trained.accelerator.free_memory()


def keep(run: grid.Run, trained: Trained, log: list[dict], on_the_way: dict) -> None:
    """Writes what a run needs to go on: random numbers depend on seed and step alone."""
    run.unfinished.parent.mkdir(parents=True, exist_ok=True)
    state = {"settings": [run.base, *run.overrides], "log": log, "on_the_way": on_the_way}
    state |= {"policy": trained.policy.state_dict(), "optimizer": trained.optimizer.state_dict()}
    temporary = run.unfinished.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.rename(run.unfinished)


def go_on(run: grid.Run, trained: Trained) -> tuple[list[dict], dict]:
    """Brings a run to where it was stopped. Returns its log and what was measured on the way: nothing for a new one."""
    if not run.unfinished.is_file():
        return [], {}
    state = torch.load(run.unfinished, map_location="cpu", weights_only=True)
    if state["settings"] != [run.base, *run.overrides]:
        return [], {}
    trained.policy.load_state_dict(state["policy"])
    trained.optimizer.load_state_dict(state["optimizer"])
    return state["log"], state["on_the_way"]


def is_done(run: grid.Run) -> bool:
    """Whether it has a result. Raises UserError when that is of other settings."""
    if not run.file.is_file():
        return False
    done = json.loads(run.file.read_text())
    if (done["base"], tuple(done["overrides"])) != (run.base, run.overrides):
        there, here = " ".join(done["overrides"]), " ".join(run.overrides)
        raise UserError(f"{run.file}: holds the result of {there}, and {run.name} is now {here}; move the file away")
    return True


def device_name(device: torch.device) -> str:
    """What the seconds were measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(grid.PARTS)}; none: all of them")
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    words = "only runs with TEXT in their names, to share the work between machines"
    parser.add_argument("--only", metavar="TEXT", default="", help=words)
    words = "allow the part pass_at_k to run code that the models wrote (execute.py)"
    parser.add_argument("--execute", action="store_true", help=words)
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        if part not in grid.PARTS:
            parser.error(f"{part!r} is no part; allowed: {', '.join(grid.PARTS)}")
        if part == "pass_at_k" and not (arguments.execute or arguments.list):
            remedy = "add --execute where that is acceptable"
            parser.error(f"pass_at_k runs code that a language model wrote, with your rights: {remedy}")
    for part in arguments.parts or [part for part in grid.PARTS if part != "pass_at_k" or arguments.execute]:
        missing = [run for run in grid.PARTS[part]() if arguments.only in run.name and not is_done(run)]
        print(f"{part}: {len(missing)} runs to do")
        for run in missing:
            if arguments.list:
                print(f"  {run.name}: {' '.join(run.overrides)}")
            elif not is_done(run):  # by another process meanwhile
                run_one(run)
    if not arguments.list:
        subprocess.run([sys.executable, str(grid.HERE / "report.py")], check=True)


if __name__ == "__main__":
    run_as_command(main)
