"""Settings of data, data.mix and eval: which are refused, and the nearest ones that are not."""

import pytest
import yaml

from ebft_utils.config.modes import StridedConfig, StructuredConfig, load_config
from helpers import assert_holds, refusal

MIX_KEYS = (
    "dataset, weight, name, revision, split, transform, columns, apply_chat_template, file_pattern, max_documents"
)
COLUMN_KEYS = "text, prompt, completion, turns, messages, reasoning, tools"
WITHOUT_DATASET, BESIDE_MIX = "does nothing without eval.dataset", "does nothing beside data.mix"
NOT_READ = "is not read by the transform"
FILE = {"dataset": "a.jsonl"}
PAIRS = {**FILE, "transform": "prompt_completion"}  # a transform that both modes take


def file(**data) -> dict:
    """data.dataset with the mode's own transform."""
    return {"data": {**FILE, **data}}


def pairs(**data) -> dict:
    return {"data": {**PAIRS, **data}}


def mixed(*entries, **data) -> dict:
    return {"data": {"mix": list(entries), "transform": "prompt_completion", **data}}


def entry(**changes) -> dict:
    return {**FILE, **changes}


def evaluated(**evaluation) -> dict:
    return {"data": PAIRS, "eval": evaluation}


def says(sections: dict, *words: str) -> tuple[dict, list[str]]:
    """Sections of a configuration, and what the message must hold. The first of the words is the key."""
    return sections, list(words)


IN_BOTH_MODES = {
    "split of evaluation": says(evaluated(split="test"), "eval.split", WITHOUT_DATASET),
    "empty mix": says({"data": {"mix": []}}, "data.mix", "is empty"),
    "processes of a stream": says(
        pairs(streaming=True, num_proc=2), "data.num_proc", "2 with data.streaming", "leave it out"
    ),
    "column that no entry reads": says(
        mixed(FILE, columns={"reasoning": "r"}), "data.columns.reasoning", "is read by no entry of data.mix"
    ),
    "reasoning in a column and in messages": says(
        pairs(transform="reasoning", columns={"reasoning": "r", "messages": "m"}),
        "data.columns.messages",
        "with data.columns.reasoning",
    ),
    "reasoning without its column": says(
        pairs(transform="reasoning", columns={"prompt": "q"}), "data.columns.prompt", "without data.columns.reasoning"
    ),
    "unknown transform beside mix": says(
        mixed(entry(transform="question_answer"), transform="tpyo"), "data.transform", "'tpyo'"
    ),
    "bad rows of an entry": says(
        mixed(entry(on_bad_row="skip")), "data.mix[0].on_bad_row", "did you mean data.on_bad_row?"
    ),
    "mix and dataset": says(
        file(mix=[{"dataset": "a.jsonl"}, {"dataset": "b.jsonl"}]),
        "data.mix",
        "data.dataset 'a.jsonl'",
        "leave one of them out",
    ),
    "neither": says({"data": {"transform": "prompt_completion"}}, "data.dataset", "is required"),
    "name beside mix": says(mixed(FILE, name="sub"), "data.name", BESIDE_MIX, "write it into its entries"),
    "revision beside mix": says(mixed(FILE, revision="v2"), "data.revision", BESIDE_MIX),
    "split beside mix": says(mixed(FILE, split="train[:10%]"), "data.split", BESIDE_MIX),
    "max_documents beside mix": says(mixed(FILE, max_documents=5), "data.max_documents", BESIDE_MIX),
    "weight 0": says(mixed(FILE, entry(weight=0)), "data.mix[1].weight", "0.0", "above 0"),
    "negative weight": says(mixed(entry(weight=-2)), "data.mix[0].weight", "-2.0", "above 0"),
    "weight as text": says(mixed(entry(weight="much")), "data.mix[0].weight", "'much'", "a finite number"),
    "weight too small": says(
        mixed(entry(weight=2), entry(weight=0.001)),
        "data.mix[1].weight",
        "0.001 of 2.001",
        "less than one row in 1000",
        "raise it, or leave the source out",
    ),
    "entry without dataset": says(mixed(FILE, {"weight": 2}), "data.mix[1].dataset", "is required"),
    "unknown key in an entry": says(
        mixed(FILE, entry(wieght=2)), "data.mix[1].wieght", "unknown key", "did you mean data.mix[1].weight?"
    ),
    "key like no other in an entry": says(
        mixed(entry(zzz=2)), "data.mix[0].zzz", "unknown key", f"allowed: {MIX_KEYS}"
    ),
    "unknown column in an entry": says(
        mixed(entry(columns={"promt": "q"})), "data.mix[0].columns.promt", "did you mean data.mix[0].columns.prompt?"
    ),
    "streaming in an entry": says(
        mixed(entry(streaming=True)), "data.mix[0].streaming", "did you mean data.streaming?"
    ),
    "unknown transform in an entry": says(
        mixed(FILE, entry(transform="first_trun")),
        "data.mix[1].transform",
        "'first_trun' is unknown",
        "did you mean first_turn?",
    ),
    "column of an entry that nothing reads": says(
        mixed(entry(transform="chat", columns={"prompt": "q"})), "data.mix[0].columns.prompt", f"{NOT_READ} chat"
    ),
    "mix of a number": says(
        {"data": {"mix": 5}}, "data.mix", "5 is not allowed", f"a list of mappings with {MIX_KEYS} or null"
    ),
    "mix of texts": says(
        {"data": {"mix": ["a.jsonl", "b.jsonl"]}}, "data.mix[0]", "'a.jsonl' is not a section", MIX_KEYS
    ),
    "mix of one section": says(
        {"data": {"mix": FILE}}, "data.mix", "{'dataset': 'a.jsonl'} is not allowed", "a list of mappings"
    ),
    "mix with a hole": says({"data": {"mix": [FILE, None]}}, "data.mix[1]", "None is not a section"),
    "thinking that is not read": says(
        pairs(columns={"reasoning": "r"}), "data.columns.reasoning", f"{NOT_READ} prompt_completion"
    ),
    "turns of messages": says(
        file(transform="all_turns", columns={"turns": "r"}), "data.columns.turns", f"{NOT_READ} all_turns"
    ),
    "columns of a known dataset": says(
        file(transform="question_answer", columns={"completion": "a"}),
        "data.columns.completion",
        f"{NOT_READ} question_answer",
    ),
    "columns as text": says(pairs(columns="q"), "data.columns", "'q' is not a section", COLUMN_KEYS),
    "column as a list": says(pairs(columns={"prompt": [5]}), "data.columns.prompt", "[5] is not allowed", "text"),
    "column of evaluation that nothing reads": says(
        evaluated(dataset="b.jsonl", columns={"messages": "m"}),
        "eval.columns.messages",
        f"{NOT_READ} prompt_completion",
    ),
    "unknown transform of evaluation": says(
        evaluated(dataset="b.jsonl", transform="chatt"), "eval.transform", "'chatt' is unknown", "did you mean chat?"
    ),
    "name of evaluation": says(evaluated(name="sub"), "eval.name", WITHOUT_DATASET),
    "revision of evaluation": says(evaluated(revision="v2"), "eval.revision", WITHOUT_DATASET),
    "transform of evaluation": says(evaluated(transform="chat"), "eval.transform", WITHOUT_DATASET),
    "columns of evaluation": says(evaluated(columns={"prompt": "q"}), "eval.columns", WITHOUT_DATASET),
    "apply_chat_template of evaluation": says(
        evaluated(apply_chat_template=True), "eval.apply_chat_template", WITHOUT_DATASET
    ),
    "file_pattern of evaluation": says(evaluated(file_pattern="*.json"), "eval.file_pattern", WITHOUT_DATASET),
    "buffer without stream": says(
        pairs(shuffle_buffer=50), "data.shuffle_buffer", "does nothing without data.streaming"
    ),
    "no buffer": says(pairs(streaming=True, shuffle_buffer=0), "data.shuffle_buffer", "0", "at least 1"),
    "template for messages": says(
        file(transform="chat", apply_chat_template=True), "data.apply_chat_template", "the transform chat makes none"
    ),
    "template of an entry": says(
        mixed(FILE, entry(transform="chat", apply_chat_template=True)),
        "data.mix[1].apply_chat_template",
        "the transform chat makes none",
    ),
    "processes": says(pairs(num_proc=0), "data.num_proc", "0", "at least 1"),
    "share of bad rows": says(pairs(on_bad_row="skip", max_skipped=1.5), "data.max_skipped", "1.5", "at most 1"),
    "share of bad rows that stop it": says(
        pairs(max_skipped=0.1), "data.max_skipped", "0.1 does nothing with data.on_bad_row error"
    ),
    "what to do with a bad row": says(
        pairs(on_bad_row="skp"), "data.on_bad_row", "'skp'", "error | skip", "did you mean skip?"
    ),
    **{
        f"the old key {name}_column": says(
            pairs(**{f"{name}_column": "q"}), f"data.{name}_column", f"did you mean data.columns.{name}?"
        )
        for name in COLUMN_KEYS.split(", ")
    },
}
IN_STRIDED_MODE = {
    "prompt of raw text": says(
        file(columns={"prompt": "q"}),
        "data.columns.prompt",
        f"{NOT_READ} text",
        "leave it out, or take another transform",
    ),
    "thinking in raw text": says(
        file(enable_thinking=False), "data.enable_thinking", "does nothing with the transform text"
    ),
    "cut answers": says(
        pairs(long_documents="cut"),
        "data.long_documents",
        "with the transform prompt_completion a long completion is always cut",
    ),
    "long documents": says(file(long_documents="drop"), "data.long_documents", "'drop'", "split | cut"),
    "template for raw text": says(
        file(apply_chat_template=True),
        "data.apply_chat_template",
        "prompts that are text",
        "the transform text makes none",
    ),
}
IN_STRUCTURED_MODE = {
    "text of prompts": says(file(columns={"text": "q"}), "data.columns.text", f"{NOT_READ} prompt_completion"),
    **{
        f"{name} in structured mode": says(
            file(transform=name),
            "data.transform",
            f"{name} has no prompt",
            "train_structured.py needs one",
            "train_strided.py",
        )
        for name in ("text", "swallow_code")
    },
    "raw text in a mixture": says(mixed(FILE, entry(transform="text")), "data.mix[1].transform", "text has no prompt"),
    "raw text to evaluate": says(
        evaluated(dataset="b.jsonl", transform="text"), "eval.transform", "text has no prompt"
    ),
    "no room for a turn": says(
        {**pairs(max_prompt_length=30, max_conversation_length=49), "ebft": {"max_completion_length": 20}},
        "data.max_conversation_length",
        "49 has no room for one turn",
        "data.max_prompt_length + ebft.max_completion_length = 50",
    ),
}
STRIDED, STRUCTURED = (StridedConfig,), (StructuredConfig,)
BOTH = STRIDED + STRUCTURED
TABLES = ((BOTH, IN_BOTH_MODES), (STRIDED, IN_STRIDED_MODE), (STRUCTURED, IN_STRUCTURED_MODE))
REFUSED = {name: (kinds, *case) for kinds, table in TABLES for name, case in table.items()}


def tree_of(sections: dict) -> dict:
    return {"model": {"name_or_path": "m"}, "train": {"output_dir": "o", "max_steps": 3}, **sections}


@pytest.mark.parametrize("kinds, sections, words", REFUSED.values(), ids=REFUSED)
def test_refused_settings(tmp_path, kinds, sections, words):
    """Guards against a setting that is taken and does nothing, or that fails only when the data is read.

    Each is refused with its key, its value and a way out.
    """
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree_of(sections)))
    for kind in kinds:
        message = refusal(load_config, str(file), [], kind)
        assert message.startswith(f"{file}: {words[0]}: ") and "\n" not in message
        assert_holds(message, *words)


COLUMNS_READ = {"prompt": "p", "completion": "c", "turns": "t", "reasoning": "r"}
OTHER_PAIRS = {"dataset": "b.jsonl", "name": "sub", "transform": "chat", "columns": {"messages": "m"}}
TURN = {**pairs(max_prompt_length=30, max_conversation_length=50), "ebft": {"max_completion_length": 20}}
ANY_COLUMNS = {"text": "t", "messages": "m", "turns": "x"}
ACCEPTED = {
    "mix": (BOTH, mixed(FILE, entry(weight=3, transform="chat", columns={"messages": "m"}))),
    "null for mix": (BOTH, pairs(mix=None)),
    "a weight of one row in a thousand": (BOTH, mixed(entry(weight=999), entry(weight=1))),
    "columns that are read": (BOTH, file(transform="reasoning", columns=COLUMNS_READ)),
    "columns of a function of ones own": (BOTH, file(transform="mine.py:f", columns=ANY_COLUMNS)),
    "a column by its default name": (BOTH, file(transform="chat", columns={"prompt": "prompt"})),
    "settings of evaluation": (BOTH, evaluated(**OTHER_PAIRS, file_pattern="*.json")),
    "a buffer of a stream": (BOTH, pairs(streaming=True, shuffle_buffer=50)),
    "room for one turn": (STRUCTURED, TURN),
    "a template for prompts": (BOTH, file(transform="question_answer", apply_chat_template=True)),
    "raw text in strided mode": (STRIDED, file(transform="swallow_code")),
}


@pytest.mark.parametrize("kinds, sections", ACCEPTED.values(), ids=ACCEPTED)
def test_settings_at_the_border(tmp_path, kinds, sections):
    """Guards against refusals that refuse too much, and a mixture that does not come back from its own YAML."""
    file, again = tmp_path / "config.yaml", tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(tree_of(sections)))
    for kind in kinds:
        config = load_config(str(file), [], kind)
        again.write_text(config.to_yaml())
        assert load_config(str(again), [], kind) == config
