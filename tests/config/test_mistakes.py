"""What people type who come from another trainer, or mistype: each message names the remedy."""

import shlex

import pytest

from ebft_utils.config.modes import MODES, StridedConfig, StructuredConfig, parse_command_line
from ebft_utils.config.names import FOREIGN
from ebft_utils.config.settings import keys_of
from helpers import ROOT, refusal

STRIDED, STRUCTURED = (
    (kind, str(ROOT / "examples" / name))
    for kind, name in ((StridedConfig, "raw_text.yaml"), (StructuredConfig, "structured.yaml"))
)
LORA = "write lora=null to leave it out, lora={} for its defaults"
FORM = "is not of the form section.key=value, without spaces"
NO_FLAG = "is no flag; a setting is written without dashes"
MISTAKES = {  # arguments after --cfg FILE -> what the message ends with, or holds between two `..`
    # --- other trainers' names, with a section and without
    "train.eval_steps=10": "train.eval_steps: unknown key; did you mean eval.every_steps?",
    "train.eval_strategy=steps": "did you mean eval.every_steps?",
    "data.max_length=512": "did you mean data.sequence_length?",
    "cutoff_len=512": "did you mean data.sequence_length?",
    "lr=1e-4": "lr: unknown key; did you mean train.learning_rate?",
    "train.num_train_epochs=3": "did you mean train.num_epochs?",
    "train.num_warmup_steps=3": "did you mean train.warmup_steps?",
    "train.per_device_train_batch_size=4": "did you mean train.per_device_batch_size?",
    "train.gradient_accumulation_steps=4": "did you mean train.batch_size? It counts the rows of an optimizer step..",
    "eval.batch_size=2": "did you mean eval.per_device_batch_size?",
    "num_generations=8": "did you mean ebft.n_samples_per_prompt?",
    "max_new_tokens=32": "did you mean ebft.generate_max_len?",
    "train.bf16=true": "did you mean model.dtype? It is float32 or bfloat16",
    "lora_r=8": "did you mean lora.r?",
    "lora.rank=8": "did you mean lora.r?",
    "lora.lora_alpha=16": "did you mean lora.alpha?",
    "train.logging_dir=logs": "did you mean train.output_dir? It holds the logs too",
    "train.save_strategy=steps": "did you mean train.save_steps?",
    "train.resume_from_checkpoint=latest": "did you mean train.resume?",
    "wandb_project=x": "did you mean train.report_to?",
    "model.name=some/model": "did you mean model.name_or_path?",
    "data.path=rows.jsonl": "did you mean data.dataset?",
    "data.max_samples=9": "did you mean data.max_documents?",
    "eval.text_column=q": "did you mean eval.columns.text?",
    "'data.mix=[{dataset: a, text_column: q}]'": "did you mean data.mix[].columns.text?",
    "ebft.use_whitening=false": "did you mean ebft.whitening? It is feature, sample or none",
    "train.dry_run=true": "it is the flag --dry-run",
    # --- what there is not
    "ebft.kl_coef=0.1": "not supported: there is no KL term..",
    "beta=0.1": "not supported: there is no KL term..",
    "model.load_in_4bit=true": "not supported: weights are not quantised..",
    "train.optim=adamw_8bit": "not supported: the optimizer is AdamW..",
    "deepspeed=ds.json": "not supported: accelerate_configs/fsdp2.yaml splits the model over GPUs",
    "lora.dropout=0.1": "not supported: with dropout..",
    "device=cuda": "it is no setting: the launch decides..",
    # --- the right name in another section
    "learning_rate=1e-4": "learning_rate: unknown key; did you mean train.learning_rate?",
    "train.gradient_checkpointing=true": "did you mean model.gradient_checkpointing?",
    "dataset=rows.jsonl": "did you mean data.dataset or eval.dataset?",
    "data.seed=1": "did you mean train.seed or eval.seed?",
    "model.lora.r=8": "model.lora: unknown key; did you mean lora?",
    # --- misspelt
    "train.max-steps=4": "did you mean train.max_steps?",
    "training.max_steps=4": "training: unknown key; did you mean train?",
    "data.columns.promt=q": "did you mean data.columns.prompt?",
    "gradient_checkpoint=true": "did you mean model.gradient_checkpointing?",
    "num_train_epoch=3": "did you mean train.num_epochs?",
    "train.log_level=info": "train.log_level: unknown key; allowed: output_dir, max_steps, ..",
    "train.zzz=4": "unknown key; allowed: output_dir, max_steps, ..",
    # --- another mode's
    "ebft.num_generations=8": "it belongs to train_structured.py; did you mean ebft.n_samples_per_prompt?",
    "vllm.port=8001": "it belongs to train_structured.py",
    # --- values
    "lora=none": f"lora: 'none' is not a section; {LORA}..",
    "lora=off": f"lora: off is not a section; {LORA}..",
    "model=some/model": "'some/model' is not a section; write its keys, as in model.name_or_path=VALUE: name_or_path..",
    "eval.num_documents=None": "allowed: a whole number or null (write eval.num_documents=null)",
    "ebft.feature_layers=0.5": "allowed: a list of a finite number (one alone is written [0.5])",
    "train.seed=1e-3": "train.seed: '1e-3' is not allowed; allowed: a whole number",
    "train.seed=1e400": "train.seed: '1e400' is not allowed; allowed: a whole number",
    "train.seed=1,000": "train.seed: '1,000' is not allowed; allowed: a whole number",
    "model.dtype=bf16": "did you mean bfloat16?",
    # --- flags and form
    "--train.max_steps=10": f"'--train.max_steps=10' {NO_FLAG}: train.max_steps=10",
    "--train.seed 10": f"'--train.seed' {NO_FLAG}: train.seed=VALUE",
    "--learning_rate 1e-4": f"{NO_FLAG}, as section.key=value; did you mean train.learning_rate?",
    "--merge-lora": f"'--merge-lora' {NO_FLAG}, as section.key=value; did you mean lora.merge?",
    "--dry_run": "did you mean --dry-run?",
    "--config my.yaml": "the configuration is given as --cfg FILE",
    "my.yaml": f"'my.yaml' {FORM}; the configuration is given as --cfg my.yaml",
    "train.max_steps = 10": f"'train.max_steps' {FORM}: train.max_steps=VALUE",
}
OF_STRUCTURED = {
    "data.max_length=512": "did you mean data.max_prompt_length and ebft.max_completion_length?",
    "generate_max_len=32": "did you mean ebft.max_completion_length?",
    "ebft.n_samples_per_prompt=8": "it belongs to train_strided.py; did you mean ebft.num_generations?",
    "vllm_server_port=8001": "did you mean vllm.port?",
    "data.sequence_length=99": "it belongs to train_strided.py",
}
ALL = [(STRIDED, *pair) for pair in MISTAKES.items()] + [(STRUCTURED, *pair) for pair in OF_STRUCTURED.items()]


@pytest.mark.parametrize("mode, arguments, words", ALL, ids=[f"{mode[0].mode} {typed}" for mode, typed, _ in ALL])
def test_message_names_the_remedy(mode, arguments, words):
    """Guards against a suggestion that misleads (eval_steps -> max_steps), and a page of argparse's usage."""
    kind, file = mode
    message = refusal(parse_command_line, ["--cfg", file, *shlex.split(arguments)], "", kind)
    assert message.startswith("command line: ") and "\n" not in message
    assert words.removesuffix("..") in message if words.endswith("..") else message.endswith(words), message


def test_the_same_in_the_file(tmp_path):
    """Guards against suggestions that only the command line gets: here a key in the wrong section of the YAML."""
    file = tmp_path / "wrong.yaml"
    file.write_text("train: {output_dir: o, gradient_checkpointing: true}\n")
    message = refusal(parse_command_line, ["--cfg", str(file)], "")
    key = "train.gradient_checkpointing"
    assert message == f"{file}: {key}: unknown key; did you mean model.gradient_checkpointing?"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["examples/quickstart.yaml"], "the configuration is missing: --cfg examples/quickstart.yaml"),
        (["train.max_steps=3"], "the configuration is missing: --cfg FILE"),
    ],
)
def test_cfg_is_required(argv, words):
    """Guards against a run on defaults alone when --cfg was forgotten."""
    assert refusal(parse_command_line, argv, "") == f"command line: {words}"


VALUES = {
    "train.max_steps=1e3": 1000,
    "train.max_steps=1.5e3": 1500,
    "train.max_steps=1_000": 1000,
    "lora.target_modules=q_proj,v_proj": ["q_proj", "v_proj"],
    "lora.target_modules=q_proj, v_proj": ["q_proj", "v_proj"],
    "lora.target_modules='.*(q,v)_proj'": ".*(q,v)_proj",
    "lora.target_modules=q_proj": "q_proj",
    "ebft.feature_layers=0.25,1": [0.25, 1.0],
}


@pytest.mark.parametrize("override, value", VALUES.items())
def test_values_as_people_write_them(override, value):
    """Guards against a refusal of what can only mean one thing."""
    kind, file = STRIDED
    config, _ = parse_command_line(["--cfg", file, override], "", kind)
    section, key = override.partition("=")[0].split(".")
    found = getattr(getattr(config, section), key)
    assert found == value and type(found) is type(value)


def test_every_foreign_name_leads_to_a_setting():
    """Guards against advice that names a setting which was renamed or removed, and against one that hides a setting."""
    known = {key for kind in MODES.values() for key in keys_of(kind)}
    assert [key for meant in FOREIGN.values() for key in meant.keys if key not in known] == []
    assert [name for name, meant in FOREIGN.items() if "." in name and name in known] == []
