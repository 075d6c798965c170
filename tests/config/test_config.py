"""The configuration: defaults, overrides, and one test for each refusal. No model is loaded here."""

import dataclasses

import pytest
import yaml

from ebft_utils.config.modes import StridedConfig, load_config, parse_command_line
from ebft_utils.config.sections import TrainConfig
from ebft_utils.config.settings import UserError
from helpers import refusal as refusal_of

EBFT_DEFAULTS = {  # the keys and defaults that users of EBFT know
    "feature_layers": [0.25, 0.5, 0.75],
    "embed_method": "last_token",
    "whitening": "feature",
    "alignment_coef": 1.0,
    "diversity_coef": 1.0,
    "ce_coef": 0.1,
    "rl_coef": 1.0,
    "stride": 8,
    "context_length": 8,
    "generate_max_len": 8,
    "n_samples_per_prompt": 4,
    "temperature": 0.6,
    "top_p": 1.0,
    "advantage_estimator": "rloo",
    "min_completion_prefix": 0,
}
REQUIRED = {"model": {"name_or_path": "m"}, "data": {"dataset": "d"}, "train": {"output_dir": "o", "max_steps": 1000}}


@pytest.fixture
def minimal(tmp_path):
    """A configuration file with the required keys alone."""
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    return path


def refusal(file, *overrides) -> str:
    """The message that load_config refuses with."""
    return refusal_of(load_config, str(file), overrides)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def test_ebft_defaults_are_the_documented_ones(minimal):
    """Guards against a default that drifts away from the names and values that users of EBFT know."""
    ebft = dataclasses.asdict(load_config(str(minimal)).ebft)
    assert {name: ebft[name] for name in EBFT_DEFAULTS} == EBFT_DEFAULTS


@pytest.mark.parametrize("estimator", ["rloo", "eq94", "group_norm", "reinforce"])
@pytest.mark.parametrize("whitening", ["feature", "sample", "none"])
def test_documented_choices_are_accepted(minimal, estimator, whitening):
    """Guards against a documented choice that the type does not have."""
    config = load_config(str(minimal), [f"ebft.advantage_estimator={estimator}", f"ebft.whitening={whitening}"])
    assert (config.ebft.advantage_estimator, config.ebft.whitening) == (estimator, whitening)


def test_overrides_replace_the_file(minimal):
    """Guards against overrides that are dropped, applied to the wrong section, or kept as text."""
    overrides = ["train.max_steps=10", "ebft.ce_coef=0.03", "ebft.feature_layers=[0, 1]", "data.packing=true"]
    config = load_config(str(minimal), [*overrides, "model.dtype=bfloat16"])
    assert config.train.max_steps == 10 and isinstance(config.train.max_steps, int)
    assert config.ebft.ce_coef == 0.03
    assert config.ebft.feature_layers == [0.0, 1.0]
    assert config.data.packing is True
    assert config.model.dtype == "bfloat16"
    assert config.data.dataset == "d" and config.train.learning_rate == 1e-6


def test_a_later_override_wins(minimal):
    """Guards against the first of two equal overrides being kept."""
    assert load_config(str(minimal), ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_an_equals_sign_in_a_value_is_kept(minimal):
    """Guards against splitting an override at every '='."""
    assert load_config(str(minimal), ["train.output_dir=runs/lr=3"]).train.output_dir == "runs/lr=3"


def test_lora_override_creates_the_section_and_null_removes_it(minimal):
    """Guards against `lora.r=8` failing on a file without lora, and `lora=null` leaving the file's adapter on."""
    assert load_config(str(minimal)).lora is None
    created = load_config(str(minimal), ["lora.r=8"])
    assert (created.lora.r, created.lora.alpha, created.lora.target_modules) == (8, 32.0, "all-linear")
    minimal.write_text(yaml.safe_dump({**REQUIRED, "lora": {"r": 4}}))
    assert load_config(str(minimal)).lora.r == 4
    assert load_config(str(minimal), ["lora=null"]).lora is None
    assert load_config(str(minimal), ["lora.alpha=1"]).lora.r == 4


@pytest.mark.parametrize("text, number", [("1e-5", 1e-5), ("3e-4", 3e-4), ("1E6", 1e6), ("1", 1.0), ("2.5e-3", 2.5e-3)])
def test_exponents_without_a_point_are_numbers(minimal, text, number):
    """YAML 1.1 reads 1e-5 as text. Guards against a learning rate that is refused, or kept as a string."""
    overridden = load_config(str(minimal), [f"train.learning_rate={text}"]).train.learning_rate
    minimal.write_text(minimal.read_text() + f"  learning_rate: {text}\n")  # train is the last section
    written = load_config(str(minimal)).train.learning_rate
    assert overridden == written == number and isinstance(written, float)


def test_an_empty_section_means_its_defaults(minimal):
    """Guards against `ebft:` with nothing under it (all lines commented out) being an error."""
    minimal.write_text(minimal.read_text() + "ebft:\n")
    assert load_config(str(minimal)).ebft == load_config(str(minimal), ["ebft={}"]).ebft
    assert load_config(str(minimal)).ebft.stride == 8


def test_an_empty_lora_section_is_refused(minimal):
    """Guards against full fine-tuning at an adapter's learning rate when all lines under `lora:` are commented out."""
    minimal.write_text(minimal.read_text() + "lora:\n")
    with pytest.raises(UserError, match=r"lora: is an empty section; write lora=null to leave it out"):
        load_config(str(minimal))
    minimal.write_text(minimal.read_text().replace("lora:\n", "lora: null\n"))
    assert load_config(str(minimal)).lora is None


def test_print_config_loads_back_to_the_same_configuration(minimal, tmp_path, capsys):
    """Guards against a printed configuration that is not the merged one, or cannot be used as --cfg."""
    overrides = [
        "lora.r=3",
        "lora.target_modules=[q_proj, v_proj]",
        "train.learning_rate=1e-5",
        "ebft.feature_layers=[0.5]",
        "data.name='no'",
    ]
    assert parse_command_line(["--cfg", str(minimal), "--print-config", *overrides], "") == (None, False)
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    expected = load_config(str(minimal), overrides)
    assert load_config(str(printed)) == expected
    assert expected.data.name == "no" and expected.lora.target_modules == ["q_proj", "v_proj"]
    sections = {"model", "lora", "data", "feature_network", "eval", "ebft", "train"}
    assert set(yaml.safe_load(printed.read_text())) == sections


SIDES = [
    ["train.seed=7", "--cfg", "FILE"],
    ["--cfg", "FILE", "train.seed=7"],
    ["train.seed=7", "--cfg", "FILE", "train.max_steps=9"],
]


@pytest.mark.parametrize("argv", SIDES)
def test_overrides_may_stand_on_either_side_of_cfg(minimal, argv):
    """Guards against argparse refusing overrides on both sides of an option."""
    config, dry_run = parse_command_line([str(minimal) if word == "FILE" else word for word in argv], "")
    assert config.train.seed == 7 and not dry_run
    assert config.train.max_steps == (9 if "train.max_steps=9" in argv else 1000)


def test_every_option_is_described():
    """Guards against an option that only its author understands."""
    makers = [field.default_factory for field in dataclasses.fields(StridedConfig)]
    sections = [maker for maker in makers if maker is not dataclasses.MISSING]
    options = [field for section in sections for field in dataclasses.fields(section)]
    undescribed = [option.name for option in options if len(option.metadata.get("description", "")) < 10]
    assert len(sections) == 6 and undescribed == []


# ----------------------------------------------------------------------------------------------------------------------
# Refusals: (override, words that the message must hold). Each is tried in the file and on the command line.

MISSPELT, EMBED_METHODS = "ebft.n_sample_per_prompt", "last_token | mean_pooling | completion_mean | concat"
NEEDS_16 = ["ebft.context_length 8", "ebft.generate_max_len 8"]
REFUSALS = {
    "misspelt key": ("ebft.n_sample_per_prompt=4", [MISSPELT, "did you mean ebft.n_samples_per_prompt?"]),
    "misspelt section": ("trian.max_steps=4", ["trian", "did you mean train?"]),
    "key like no other": ("train.zzz=4", ["train.zzz", "unknown key", "allowed", "max_steps", "learning_rate"]),
    "key at the top": ("learning_rate=1e-5", ["learning_rate", "unknown key", "did you mean train.learning_rate?"]),
    "text for a whole number": ("train.max_steps=many", ["train.max_steps", "'many'", "whole number"]),
    "fraction for a whole number": ("train.max_steps=1.5", ["train.max_steps", "1.5", "whole number"]),
    "true for a whole number": ("train.max_steps=true", ["train.max_steps", "True", "whole number"]),
    "true for a number": ("ebft.ce_coef=true", ["ebft.ce_coef", "True", "finite number"]),
    "1 for true": ("data.packing=1", ["data.packing", "1", "true | false"]),
    "text for true": ("data.packing='yes'", ["data.packing", "'yes'", "true | false"]),
    "text for a number": ("train.learning_rate=small", ["train.learning_rate", "'small'", "finite number"]),
    "infinite": ("train.learning_rate=.inf", ["train.learning_rate", "inf", "finite number"]),
    "not a number": ("ebft.ce_coef=.nan", ["ebft.ce_coef", "nan", "finite number"]),
    "too large for a float": ("train.learning_rate=1" + "0" * 400, ["train.learning_rate", "finite number"]),
    "null for text": ("model.name_or_path=null", ["model.name_or_path", "None", "text"]),
    "a date for a number": ("train.seed=2024-01-02", ["train.seed", "'2024-01-02'", "whole number"]),
    "null where a value is needed": ("train.seed=null", ["train.seed", "None", "whole number"]),
    "number for a list": ("ebft.feature_layers=0.5", ["ebft.feature_layers", "0.5", "a list of a finite number"]),
    "text in a list": ("ebft.feature_layers=[0.5, deep]", ["ebft.feature_layers[1]", "'deep'", "finite number"]),
    "choice": (
        "ebft.embed_method=last_tokens",
        ["ebft.embed_method", "'last_tokens'", EMBED_METHODS, "did you mean last_token?"],
    ),
    "choice of estimator": (
        "ebft.advantage_estimator=grpo",
        ["ebft.advantage_estimator", "'grpo'", "rloo | eq94 | group_norm | reinforce"],
    ),
    "list for a choice": ("model.dtype=[float32]", ["model.dtype", "['float32']", "float32 | bfloat16"]),
    "section as a value": ("train=5", ["train", "5", "not a section", "max_steps"]),
    "below the minimum": ("train.max_steps=0", ["train.max_steps", "0", "at least 1"]),
    "stride 0": ("ebft.stride=0", ["ebft.stride", "0", "at least 1"]),
    "context 0": ("ebft.context_length=0", ["ebft.context_length", "0", "at least 1"]),
    "temperature 0": ("ebft.temperature=0", ["ebft.temperature", "0", "at least 0.0001"]),
    "temperature below float32": ("ebft.temperature=1e-39", ["ebft.temperature", "1e-39", "at least 0.0001"]),
    "tolerance below float64": ("ebft.whiten_tol=3e-8", ["ebft.whiten_tol", "3e-08", "at least 1e-06"]),
    "norm of features": ("ebft.feature_norm=batch", ["ebft.feature_norm", "'batch'", "layer | joint"]),
    "negative learning rate": ("train.learning_rate=-1e-5", ["train.learning_rate", "-1e-05", "above 0"]),
    "negative coefficient": ("ebft.diversity_coef=-1", ["ebft.diversity_coef", "-1", "at least 0"]),
    "warm-up longer than the run": ("train.warmup_ratio=1.5", ["train.warmup_ratio", "1.5", "at most 1"]),
    "warm-up given twice": (
        "train={warmup_steps: 5, warmup_ratio: 0.5, max_steps: 9, output_dir: o}",
        ["train.warmup_steps", "5 stands beside train.warmup_ratio 0.5", "leave one of them out"],
    ),
    "warm-up of more steps than there are": (
        "train={warmup_steps: 10, max_steps: 9, output_dir: o}",
        ["train.warmup_steps", "10 is more than train.max_steps 9"],
    ),
    "length given twice": (
        "train.num_epochs=2",
        ["train.num_epochs", "2 stands beside train.max_steps 1000", "for example train.max_steps=null"],
    ),
    "no length": ("train.max_steps=null", ["train.max_steps", "is required, or train.num_epochs in its place"]),
    "no epoch": ("train.num_epochs=0", ["train.num_epochs", "above 0"]),
    "feature layer above 1": ("ebft.feature_layers=[0.25, 1.5]", ["ebft.feature_layers[1]", "1.5", "at most 1"]),
    "feature layer below 0": ("ebft.feature_layers=[-0.5]", ["ebft.feature_layers[0]", "-0.5", "at least 0"]),
    "no feature layer": ("ebft.feature_layers=[]", ["ebft.feature_layers", "empty", "between 0 and 1"]),
    "old switch": (
        "ebft.use_whitening=false",
        ["ebft.use_whitening", "unknown key", "did you mean ebft.whitening?", "none"],
    ),
    "one rollout": ("ebft.n_samples_per_prompt=1", ["ebft.n_samples_per_prompt", "1", "2 or more"]),
    "no rollout": ("ebft.n_samples_per_prompt=0", ["ebft.n_samples_per_prompt", "0", "at least"]),
    "top_p": ("ebft.top_p=0.9", ["ebft.top_p", "0.9", "1.0", "ebft.temperature"]),
    "nothing to train": ("ebft={rl_coef: 0, ce_coef: 0}", ["ebft.rl_coef", "ebft.ce_coef", "0", "above 0"]),
    "no room for a rollout": ("data.sequence_length=15", ["data.sequence_length", "15", *NEEDS_16, "16"]),
    "rank 0": ("lora.r=0", ["lora.r", "0", "at least 1"]),
}


@pytest.mark.parametrize("override, words", REFUSALS.values(), ids=REFUSALS)
def test_refusal_names_where_key_value_and_what_is_allowed(minimal, tmp_path, override, words):
    """Guards against a wrong value that is accepted, changed in silence, or refused without place, value and remedy."""
    message = refusal(minimal, override)
    assert message.startswith("command line: ")
    assert [word for word in words if word not in message] == []

    dotted, _, text = override.partition("=")
    tree = {name: dict(section) for name, section in REQUIRED.items()}
    *sections, key = dotted.split(".")
    (tree.setdefault(sections[0], {}) if sections else tree)[key] = yaml.safe_load(text)
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(tree))
    message = refusal(file)
    assert message.startswith(f"{file}: ")
    assert [word for word in words if word not in message.removeprefix(str(file))] == []
    assert "\n" not in message


@pytest.mark.parametrize("key", ["model.name_or_path", "data.dataset", "train.output_dir", "train.max_steps"])
def test_required_keys(tmp_path, key):
    """Guards against a missing model, dataset, output folder or length that only shows when it is first used."""
    section, name = key.split(".")
    file, tree = tmp_path / "incomplete.yaml", {name: dict(values) for name, values in REQUIRED.items()}
    del tree[section][name]
    file.write_text(yaml.safe_dump(tree))
    message = refusal(file)
    assert str(file) in message and key in message and "required" in message


TOO_LONG = ["ebft.generate_max_len=500", "ebft.context_length=250", "ebft.min_completion_prefix=250"]


@pytest.mark.parametrize("override", TOO_LONG)
def test_refusal_of_two_values_points_to_the_overridden_one(minimal, override):
    """Guards against blaming the file for what the command line made wrong: the user would look in the wrong place."""
    message = refusal(minimal, override)
    key, _, value = override.partition("=")
    assert "data.sequence_length" in message and key in message and value in message
    assert message.startswith("command line: ")


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.streaming=true", "train.num_epochs: has no meaning with data.streaming: a stream is not counted"),
        ("data={mix: [{dataset: a}, {dataset: b}]}", "train.num_epochs: has no meaning with data.mix: the sources"),
    ],
)
def test_epochs_that_cannot_be_counted(minimal, override, words):
    """Guards against a run over rows without a number that fails when its data is loaded, or never ends."""
    message = refusal(minimal, "train.max_steps=null", "train.num_epochs=2", override)
    assert words in message and message.endswith("set train.max_steps")


@pytest.mark.parametrize(
    "epochs, rows, batch, steps",
    [(1, 10, 5, 2), (1, 11, 5, 3), (2, 11, 5, 5), (0.5, 10, 5, 1), (0.01, 10, 5, 1), (1.1, 10, 1, 11), (3, 7, 2, 11)],
)
def test_steps_of_epochs(epochs, rows, batch, steps):
    """Guards against a last batch that is dropped, no step at all, and a step more for want of binary fractions."""
    train = TrainConfig(num_epochs=epochs, batch_size=batch)
    assert train.total_steps(range(rows)) == steps
    assert TrainConfig(max_steps=4).total_steps(None) == 4


UNUSABLE = {
    "list": ("- a\n- b\n", ["no sections", "model", "data", "ebft", "train"]),
    "text": ("just text\n", ["no sections"]),
    "empty": ("", ["no sections"]),
    "unclosed": ("train: {max_steps: 3\n", ["not valid YAML", "line"]),
    "tab": ("train:\n\tmax_steps: 3\n", ["not valid YAML", "line 2"]),
    "section given twice": ("train:\n  seed: 1\ntrain:\n  max_steps: 5\n", ["train", "twice"]),
}


@pytest.mark.parametrize("content, words", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_yaml(tmp_path, content, words):
    """Guards against a traceback of the YAML parser, and a second `train:` that silently throws the first one away."""
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    message = refusal(file)
    assert str(file) in message
    assert [word for word in words if word not in message] == []


def test_file_that_is_not_text(tmp_path):
    """Guards against a traceback when --cfg is given a model file, or a file in another encoding."""
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"train: {output_dir: caf\xe9}\n")
    message = refusal(file)
    assert str(file) in message and "UTF-8" in message


def test_missing_file_and_folder(tmp_path):
    """Guards against a traceback for the commonest mistake."""
    missing = tmp_path / "none.yaml"
    assert refusal(missing) == f"--cfg {missing}: cannot be read: No such file or directory"
    assert refusal(tmp_path) == f"--cfg {tmp_path}: cannot be read: Is a directory"


@pytest.mark.parametrize("override", ["train.max_steps", "=5", "train.=5", ".max_steps=5", "max steps"])
def test_override_of_another_form(minimal, override):
    """Guards against an override without '=' that is taken for something else, or ignored."""
    message = refusal(minimal, override)
    assert message.startswith("command line: ") and repr(override) in message and "section.key=value" in message


@pytest.mark.parametrize("override", ["train.seed={1", "train.seed=*", "data.packing=&x"])
def test_override_that_is_not_yaml(minimal, override):
    """Guards against a traceback or a page of the YAML parser for a value on the command line that is not text."""
    message = refusal(minimal, override)
    assert message.startswith("command line: ") and "\n" not in message and override.partition("=")[0] in message


def test_override_below_a_plain_value(minimal):
    """Guards against `train.seed.x=3` turning the seed into a mapping."""
    message = refusal(minimal, "train.seed.x=3")
    assert message.startswith("command line: ") and "train.seed" in message
