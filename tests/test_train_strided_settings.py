"""Settings of train_strided.py end to end: each choice does something, the seed decides, the log is what it says."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ebft_utils.config.modes import load_config
from ebft_utils.run.loop import learning_rate
from helpers import logged, training, weights
from train_strided import main

VARIANTS = {
    "rloo": [],
    "group_norm": ["ebft.advantage_estimator=group_norm"],
    "reinforce": ["ebft.advantage_estimator=reinforce"],
    "sample whitening": ["ebft.whitening=sample"],
    "no whitening": ["ebft.whitening=none"],
    "mean_pooling": ["ebft.embed_method=mean_pooling"],
    "concat": ["ebft.embed_method=concat"],
    "one layer": ["ebft.feature_layers=[1.0]"],
    "no diversity": ["ebft.diversity_coef=0", "ebft.whitening=none"],
    "temperature": ["ebft.temperature=1.0"],
    "later anchors": ["ebft.min_completion_prefix=12"],
}


def test_every_choice_does_something(train):
    """Guards against an option that is read and then ignored: each one's loss is finite and unlike all the others'."""
    losses = {
        name: training(train(name.replace(" ", "_"), "train.max_steps=1", *overrides))[0]["ebft/rl_loss"]
        for name, overrides in VARIANTS.items()
    }
    assert all(math.isfinite(loss) for loss in losses.values())
    values = sorted(losses.values())
    assert min(high - low for low, high in itertools.pairwise(values)) > 1e-6, losses
    same = training(train("completion_mean", "train.max_steps=1", "ebft.embed_method=completion_mean"))[0][
        "ebft/rl_loss"
    ]
    assert same == losses["mean_pooling"]  # a strided rollout is its completion


def test_logged_loss_is_the_weighted_sum(train):
    """Guards against coefficients that are applied twice or not at all."""
    (entry,) = training(
        train(
            "run",
            "train.max_steps=1",
            "ebft.rl_coef=0.7",
            "ebft.ce_coef=0.2",
            "ebft.alignment_coef=0.5",
            "ebft.diversity_coef=0.25",
            "ebft.whitening=none",
        )
    )
    assert entry["train/loss"] == pytest.approx(0.7 * entry["ebft/rl_loss"] + 0.2 * entry["ebft/ce_loss"], abs=1e-5)
    reward = 0.5 * entry["ebft/alignment"] - 0.25 * entry["ebft/diversity"]
    assert entry["ebft/mean_reward"] == pytest.approx(reward, abs=1e-5)


def test_seed_decides_and_nothing_else(train):
    """Guards against random state that is not the seed's, and a seed that is ignored."""
    first = train("first", "train.max_steps=2", lora={"r": 2})
    torch.manual_seed(77)
    torch.rand(3)
    assert training(train("second", "train.max_steps=2", lora={"r": 2})) == training(first)
    third = train("third", "train.max_steps=2", "train.seed=1", lora={"r": 2})
    assert training(third)[0]["ebft/rl_loss"] != training(first)[0]["ebft/rl_loss"]


def test_a_document_gets_other_rollouts_each_time(train):
    """Guards against rollouts that are keyed by the row alone: each epoch would train on the same ones.

    (The policy stands still: rate 1e-20.)
    """
    still = ("data.max_documents=3", "train.learning_rate=1e-20")
    three = ("train.batch_size=3", "train.per_device_batch_size=3", "train.max_steps=2")
    first, second = training(train("run", *still, *three))
    assert first["ebft/ce_loss"] == pytest.approx(second["ebft/ce_loss"], abs=1e-6)  # the same three documents
    assert abs(first["ebft/alignment"] - second["ebft/alignment"]) > 1e-3
    six = ("train.batch_size=6", "train.per_device_batch_size=6", "train.max_steps=1")
    (both,) = training(train("both", *still, *six))
    assert both["ebft/alignment"] == pytest.approx((first["ebft/alignment"] + second["ebft/alignment"]) / 2, abs=1e-5)


def test_logging_and_table_steps(train):
    """Guards against a last step that is not logged, and tables that are never written."""
    folder = train("run", "train.max_steps=5", "train.logging_steps=2", "train.rollout_table_steps=2")
    assert [entry["step"] for entry in logged(folder)] == [2, 4, 5]
    events = EventAccumulator(str(folder / "tensorboard" / "ebft"), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("rollouts/text_summary")] == [1, 2, 4]


# ----------------------------------------------------------------------------------------------------------------------
# (l) Learning rate


SCHEDULES = [  # scheduler, warm-up, rates of 8 steps
    ("constant", 0.0, [1, 1, 1, 1, 1, 1, 1, 1]),
    ("constant", 0.25, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
    ("linear", 0.0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ("linear", 0.5, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 3 / 4, 2 / 4, 1 / 4]),
    ("cosine", 0.0, [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]),
    ("cosine", 0.5, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5]),
    ("constant", 1.0, [step / 9 for step in range(1, 9)]),
]


@pytest.mark.parametrize("scheduler, warmup, expected", SCHEDULES)
def test_learning_rate_by_hand(write_config, scheduler, warmup, expected):
    """Guards against a first or last step at learning rate 0 (wasted), and a peak that is never reached."""
    file = write_config(train__max_steps=8, train__lr_scheduler=scheduler, train__warmup_ratio=warmup)
    config = load_config(str(file))
    assert [learning_rate(config, step, 8) / 1e-3 for step in range(8)] == pytest.approx(expected, abs=1e-6)


def test_warm_up_in_steps(write_config):
    """Guards against warmup_steps that are ignored, or rounded as a share."""
    file = write_config(train__max_steps=8, train__lr_scheduler="linear", train__warmup_steps=2)
    rates = [learning_rate(load_config(str(file)), step, 8) / 1e-3 for step in range(8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], abs=1e-6)


def test_a_run_of_epochs(train, write_config, refused, capsys):
    """Guards against num_epochs that differ between the loop, its learning rates, the dry run and the model card.

    5 rows, 2 a step: two epochs are 5 steps.
    """
    changes = dict(data__max_documents=5, eval__num_documents=0, train__max_steps=None, train__lr_scheduler="linear")
    changes |= dict(train__warmup_ratio=0.0, train__learning_rate=1e-2)
    folder = train("run", "train.num_epochs=2", **changes)
    rates = [entry["train/learning_rate"] for entry in training(folder)]
    assert rates == pytest.approx([1e-2, 8e-3, 6e-3, 4e-3, 2e-3])
    assert "Trained for 5 steps" in (folder / "final" / "README.md").read_text()
    file = write_config(**changes)
    main(["--cfg", str(file), "train.num_epochs=2", "--dry-run"])
    assert "5 steps of 2 rows" in (printed := capsys.readouterr().out) and "; 2.00 epochs" in printed
    message = refused("--cfg", file, "train.num_epochs=1", "train.resume=latest")
    assert "train.num_epochs: so many epochs are 3 steps, less than the 5 steps that checkpoint-5 has done" in message
    main(["--cfg", str(file), "train.max_steps=6", "train.resume=latest"])
    shares = "(warm-up and decay are shares of the steps: the learning rates change with them)"
    assert f"train.max_steps is 6 and was None {shares}\n" in capsys.readouterr().out


def test_logged_learning_rate_is_the_one_of_the_step(train):
    """Guards against logging the next step's rate."""
    linear = ("train.lr_scheduler=linear", "train.warmup_ratio=0", "train.learning_rate=1e-2")
    folder = train("run", "train.max_steps=4", *linear)
    assert [entry["train/learning_rate"] for entry in training(folder)] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_first_update_has_the_size_of_the_first_rate(train, model_folder):
    """Guards against a schedule that is not connected to the optimizer.

    AdamW's first update of a weight is the learning rate, up or down.
    """
    start = load_file(model_folder / "model.safetensors")
    for name, overrides, rate in [("flat", ["train.warmup_ratio=0"], 1e-3), ("warm", ["train.warmup_ratio=1"], 5e-4)]:
        folder = train(name, "train.max_steps=1", *overrides)
        moved = torch.cat([(tensor - start[key]).abs().flatten() for key, tensor in weights(folder).items()])
        assert moved.max().item() == pytest.approx(rate, rel=1e-2)
        assert (moved > 0.99 * rate).float().mean() > 0.3
