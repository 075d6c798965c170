"""Settings whose type is text: they take what is written, where YAML would read something else into it."""

import pytest
import yaml

from ebft_utils.config.modes import StructuredConfig, load_config
from helpers import refusal

REQUIRED = {"model": {"name_or_path": "m"}, "data": {"dataset": "d"}, "train": {"output_dir": "o", "max_steps": 1000}}
ODD = [
    *("*.md", "*", "&x", "@me", "%5", ":", "a: b", "a #b", "#", "C:\\data\\x", "2024-01-02", "2024-13-45", "no"),
    *("yes", "on", "Off", "true", "1234567", "0123", "1e5", "1.50", "0x1F", "1_000", "1:30", ".inf", "[a]", "[a", "{b"),
    *("!x", "`", "|", ">", "- a", "? a", "train[:1%]", '"a" b', "it's", " a ", "a\nb", "---", "9" * 5000, "=", "<<"),
]
WRITTEN = ["1234567", "0123", "1e5", "1.50", "0x1F", "1_000", "1:30", "no", "Yes", "on", "2024-01-02", "2024-13-45"]
WRITTEN += [".inf", "+1", "true", "9" * 5000]


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    return str(path)


def data_of(file, *overrides):
    return load_config(file, overrides, StructuredConfig).data


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("key", ["data.file_pattern", "data.revision", "data.columns.turns"])
def test_text_on_the_command_line_is_what_stands_there(minimal, tmp_path, key, text):
    """Guards against `data.file_pattern=*.md` being refused as YAML, and against a text that YAML changes in silence
    (a comment cut off, a number or a date for a revision). It comes back from the printed configuration.
    """
    config = load_config(minimal, [f"{key}={text}"], StructuredConfig)
    found = config.data.columns.turns if key.endswith("turns") else getattr(config.data, key.partition(".")[2])
    assert found == text
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(str(tmp_path / "again.yaml"), [], StructuredConfig) == config


def test_quotes_around_a_text_are_yamls(minimal):
    """Guards against quotes that older commands have ending up in the value, and null that can no longer be given."""
    for written in ('"*.md"', "'*.md'", "*.md"):
        assert data_of(minimal, f"data.file_pattern={written}").file_pattern == "*.md"
    assert data_of(minimal, 'data.columns.text="a\\tb"', "data.transform=mine.py:f").columns.text == "a\tb"
    assert data_of(minimal, "data.name='null'").name == "null"
    for null in ("null", "~", "Null", ""):
        assert data_of(minimal, "data.name=x", f"data.name={null}").name is None
        message = refusal(load_config, minimal, [f"data.dataset={null}"], StructuredConfig)
        assert message == "command line: data.dataset: None is not allowed; allowed: text"


@pytest.mark.parametrize("text", WRITTEN)
def test_text_in_a_file_is_what_is_written(minimal, tmp_path, text):
    """Guards against `revision: 1234567` being refused, and against 0123 coming out as 83, in a section, in a list and
    in a list of sections.
    """
    file = tmp_path / "written.yaml"
    file.write_text(
        f"model: {{name_or_path: m, revision: {text}}}\ntrain: {{output_dir: {text}, max_steps: 3}}\n"
        f"vllm: {{extra_args: [--x, {text}]}}\n"
        f"data:\n  mix:\n  - {{dataset: a.jsonl, revision: {text}, columns: {{prompt: {text}}}}}\n"
    )
    config = load_config(str(file), [], StructuredConfig)
    entry = config.data.mix[0]
    assert {config.model.revision, config.train.output_dir, entry.revision, entry.columns.prompt} == {text}
    assert config.vllm.extra_args == ["--x", text]


def test_text_or_a_list_of_texts(minimal):
    """Guards against a list on the command line that becomes the text '[q, v]', and items of it that are not text."""
    for written, found in {
        "[q_proj, v_proj]": ["q_proj", "v_proj"],
        "[1, no]": ["1", "no"],
        "all-linear": "all-linear",
        ".*(q|v)_proj$": ".*(q|v)_proj$",
        "*_proj": "*_proj",
        "[qv]_proj": "[qv]_proj",
    }.items():
        assert load_config(minimal, [f"lora.target_modules={written}"]).lora.target_modules == found


def test_numbers_and_switches_are_read_as_before(minimal, tmp_path):
    """Guards against a number that stays text, and against a message that shows the reader's own objects."""
    config = load_config(minimal, ["train.max_steps=1_000", "train.learning_rate=1e-5", "data.packing=on"])
    assert (config.train.max_steps, config.train.learning_rate, config.data.packing) == (1000, 1e-5, True)
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({**REQUIRED, "train": {"output_dir": "o", "seed": [1, {"a": True}]}}))
    assert "train.seed: [1, {'a': True}] is not allowed" in refusal(load_config, str(file))
    assert "train: 5 is not a section" in refusal(load_config, minimal, ["train=5"])
    assert "train.x: unknown key" in refusal(load_config, minimal, ["train.x=*"])
    assert "trian: unknown key" in refusal(load_config, minimal, ["trian.x.y=&"])
