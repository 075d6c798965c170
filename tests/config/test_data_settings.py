"""Settings of data, data.mix and eval: which are refused, and the nearest ones that are not."""

import pytest
import yaml

from ebft_utils.config.modes import StridedConfig, StructuredConfig, load_config
from helpers import assert_holds, refusal

MIX = {"mix": [{"dataset": "a.jsonl"}, {"dataset": "b.jsonl"}]}
FILE = {"dataset": "a.jsonl"}
MIX_KEYS = (
    "dataset, weight, name, revision, split, transform, columns, apply_chat_template, file_pattern, max_documents"
)
PLAIN, CHAT = {**FILE, "transform": "prompt_completion"}, {**FILE, "transform": "chat"}
BOTH, ONLY_STRIDED, ONLY_STRUCTURED = (StridedConfig, StructuredConfig), (StridedConfig,), (StructuredConfig,)


def mixed(*entries, **data) -> dict:
    return {"data": {"mix": list(entries), "transform": "prompt_completion", **data}}


REFUSED = {
    "split of evaluation": (BOTH, {"data": PLAIN, "eval": {"split": "test"}}, ["eval.split", "does nothing without eval.dataset"]),
    "empty mix": (BOTH, {"data": {"mix": []}}, ["data.mix", "is empty"]),
    "processes of a stream": (BOTH, {"data": {**PLAIN, "streaming": True, "num_proc": 2}}, ["data.num_proc", "2 with data.streaming", "leave it out"]),
    "column that no entry reads": (BOTH, mixed(FILE, columns={"reasoning": "r"}), ["data.columns.reasoning", "is read by no entry of data.mix"]),
    "reasoning in a column and in messages": (BOTH, {"data": {**PLAIN, "transform": "reasoning", "columns": {"reasoning": "r", "messages": "m"}}}, ["data.columns.messages", "with data.columns.reasoning"]),
    "reasoning without its column": (BOTH, {"data": {**PLAIN, "transform": "reasoning", "columns": {"prompt": "q"}}}, ["data.columns.prompt", "without data.columns.reasoning"]),
    "unknown transform beside mix": (BOTH, mixed({**FILE, "transform": "question_answer"}, transform="tpyo"), ["data.transform", "'tpyo'"]),
    "bad rows of an entry": (BOTH, mixed({**FILE, "on_bad_row": "skip"}), ["data.mix[0].on_bad_row", "set data.on_bad_row"]),
    "mix and dataset": (BOTH, {"data": {**FILE, **MIX}}, ["data.mix", "data.dataset 'a.jsonl'", "leave one of them out"]),
    "neither": (BOTH, {"data": {"transform": "prompt_completion"}}, ["data.dataset", "is required"]),
    "name beside mix": (BOTH, mixed(FILE, name="sub"), ["data.name", "does nothing beside data.mix", "write it into its entries"]),
    "revision beside mix": (BOTH, mixed(FILE, revision="v2"), ["data.revision", "does nothing beside data.mix"]),
    "split beside mix": (BOTH, mixed(FILE, split="train[:10%]"), ["data.split", "does nothing beside data.mix"]),
    "max_documents beside mix": (BOTH, mixed(FILE, max_documents=5), ["data.max_documents", "does nothing beside data.mix"]),
    "weight 0": (BOTH, mixed(FILE, {**FILE, "weight": 0}), ["data.mix[1].weight", "0.0", "above 0"]),
    "negative weight": (BOTH, mixed({**FILE, "weight": -2}), ["data.mix[0].weight", "-2.0", "above 0"]),
    "weight as text": (BOTH, mixed({**FILE, "weight": "much"}), ["data.mix[0].weight", "'much'", "a finite number"]),
    "weight too small": (BOTH, mixed({**FILE, "weight": 2}, {**FILE, "weight": 0.001}), ["data.mix[1].weight", "0.001 of 2.001", "less than one row in 1000", "raise it, or leave the source out"]),
    "entry without dataset": (BOTH, mixed(FILE, {"weight": 2}), ["data.mix[1].dataset", "is required"]),
    "unknown key in an entry": (BOTH, mixed(FILE, {**FILE, "wieght": 2}), ["data.mix[1].wieght", "unknown key", "did you mean data.mix[1].weight?"]),
    "key like no other in an entry": (BOTH, mixed({**FILE, "zzz": 2}), ["data.mix[0].zzz", "unknown key", f"allowed: {MIX_KEYS}"]),
    "unknown column in an entry": (BOTH, mixed({**FILE, "columns": {"promt": "q"}}), ["data.mix[0].columns.promt", "did you mean data.mix[0].columns.prompt?"]),
    "streaming in an entry": (BOTH, mixed({**FILE, "streaming": True}), ["data.mix[0].streaming", "set data.streaming, for all of them"]),
    "unknown transform in an entry": (BOTH, mixed(FILE, {**FILE, "transform": "first_trun"}), ["data.mix[1].transform", "'first_trun' is unknown", "did you mean first_turn?"]),
    "column of an entry that nothing reads": (BOTH, mixed({**CHAT, "columns": {"prompt": "q"}}), ["data.mix[0].columns.prompt", "is not read by the transform chat"]),
    "mix of a number": (BOTH, {"data": {"mix": 5}}, ["data.mix", "5 is not allowed", f"a list of mappings with {MIX_KEYS} or null"]),
    "mix of texts": (BOTH, {"data": {"mix": ["a.jsonl", "b.jsonl"]}}, ["data.mix[0]", "'a.jsonl' is not a section", MIX_KEYS]),
    "mix of one section": (BOTH, {"data": {"mix": FILE}}, ["data.mix", "{'dataset': 'a.jsonl'} is not allowed", "a list of mappings"]),
    "mix with a hole": (BOTH, {"data": {"mix": [FILE, None]}}, ["data.mix[1]", "None is not a section"]),
    "prompt of raw text": (ONLY_STRIDED, {"data": {**FILE, "columns": {"prompt": "q"}}}, ["data.columns.prompt", "is not read by the transform text", "leave it out, or take another transform"]),
    "text of prompts": (ONLY_STRUCTURED, {"data": {**FILE, "columns": {"text": "q"}}}, ["data.columns.text", "is not read by the transform prompt_completion"]),
    "thinking that is not read": (BOTH, {"data": {**PLAIN, "columns": {"reasoning": "r"}}}, ["data.columns.reasoning", "is not read by the transform prompt_completion"]),
    "turns of messages": (BOTH, {"data": {**FILE, "transform": "all_turns", "columns": {"turns": "r"}}}, ["data.columns.turns", "is not read by the transform all_turns"]),
    "columns of a known dataset": (BOTH, {"data": {**FILE, "transform": "question_answer", "columns": {"completion": "a"}}}, ["data.columns.completion", "is not read by the transform question_answer"]),
    "columns as text": (BOTH, {"data": {**PLAIN, "columns": "q"}}, ["data.columns", "'q' is not a section", "text, prompt, completion, turns, messages, reasoning"]),
    "column as a number": (BOTH, {"data": {**PLAIN, "columns": {"prompt": 5}}}, ["data.columns.prompt", "5 is not allowed", "text"]),
    "columns of evaluation": (BOTH, {"data": PLAIN, "eval": {"dataset": "b.jsonl", "columns": {"messages": "m"}}}, ["eval.columns.messages", "is not read by the transform prompt_completion"]),
    "transform of evaluation": (BOTH, {"data": PLAIN, "eval": {"dataset": "b.jsonl", "transform": "chatt"}}, ["eval.transform", "'chatt' is unknown", "did you mean chat?"]),
    **{
        f"{key} of evaluation": (BOTH, {"data": PLAIN, "eval": {key: value}}, [f"eval.{key}", "does nothing without eval.dataset"])
        for key, value in {"name": "sub", "revision": "v2", "transform": "chat", "columns": {"prompt": "q"}, "apply_chat_template": True, "file_pattern": "*.json"}.items()
    },
    "thinking in raw text": (ONLY_STRIDED, {"data": {**FILE, "enable_thinking": False}}, ["data.enable_thinking", "does nothing with the transform text"]),
    "buffer without stream": (BOTH, {"data": {**PLAIN, "shuffle_buffer": 50}}, ["data.shuffle_buffer", "does nothing without data.streaming"]),
    "no buffer": (BOTH, {"data": {**PLAIN, "streaming": True, "shuffle_buffer": 0}}, ["data.shuffle_buffer", "0", "at least 1"]),
    **{
        f"{name} in structured mode": (ONLY_STRUCTURED, {"data": {**FILE, "transform": name}}, ["data.transform", f"{name} has no prompt", "train_structured.py needs one", "train_strided.py"])
        for name in ("text", "swallow_code")
    },
    "raw text in a mixture": (ONLY_STRUCTURED, mixed(FILE, {**FILE, "transform": "text"}), ["data.mix[1].transform", "text has no prompt"]),
    "raw text to evaluate": (ONLY_STRUCTURED, {"data": PLAIN, "eval": {"dataset": "b.jsonl", "transform": "text"}}, ["eval.transform", "text has no prompt"]),
    "template for raw text": (ONLY_STRIDED, {"data": {**FILE, "apply_chat_template": True}}, ["data.apply_chat_template", "prompts that are text", "the transform text makes none"]),
    "template for messages": (BOTH, {"data": {**CHAT, "apply_chat_template": True}}, ["data.apply_chat_template", "the transform chat makes none"]),
    "template of an entry": (BOTH, mixed(FILE, {**CHAT, "apply_chat_template": True}), ["data.mix[1].apply_chat_template", "the transform chat makes none"]),
    "no room for a turn": (
        ONLY_STRUCTURED,
        {"data": {**PLAIN, "max_prompt_length": 30, "max_conversation_length": 49}, "ebft": {"max_completion_length": 20}},
        ["data.max_conversation_length", "49 has no room for one turn", "data.max_prompt_length + ebft.max_completion_length = 50"],
    ),
    "processes": (BOTH, {"data": {**PLAIN, "num_proc": 0}}, ["data.num_proc", "0", "at least 1"]),
    "what to do with a bad row": (BOTH, {"data": {**PLAIN, "on_bad_row": "skp"}}, ["data.on_bad_row", "'skp'", "error | skip", "did you mean skip?"]),
    **{f"the old key {name}_column": (BOTH, {"data": {**PLAIN, f"{name}_column": "q"}}, [f"data.{name}_column", f"set data.columns.{name}"]) for name in ("text", "prompt", "completion", "turns", "messages", "reasoning")},
}  # fmt: skip


def tree_of(sections: dict) -> dict:
    return {"model": {"name_or_path": "m"}, "train": {"output_dir": "o"}, **sections}


@pytest.mark.parametrize("kinds, sections, words", REFUSED.values(), ids=REFUSED)
def test_refused_settings(tmp_path, kinds, sections, words):
    """Guards against a setting that is taken and does nothing, or that fails only when the data is read: each is
    refused with its key, its value and a way out.
    """
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree_of(sections)))
    for kind in kinds:
        message = refusal(load_config, str(file), [], kind)
        assert message.startswith(f"{file}: {words[0]}: ") and "\n" not in message
        assert_holds(message, *words)


ACCEPTED = {
    "mix": (BOTH, mixed(FILE, {**FILE, "weight": 3, "transform": "chat", "columns": {"messages": "m"}})),
    "null for mix": (BOTH, {"data": {**PLAIN, "mix": None}}),
    "a weight of one row in a thousand": (BOTH, mixed({**FILE, "weight": 999}, {**FILE, "weight": 1})),
    "columns that are read": (
        BOTH,
        {
            "data": {
                **FILE,
                "transform": "reasoning",
                "columns": {"prompt": "p", "completion": "c", "turns": "t", "reasoning": "r"},
            }
        },
    ),
    "columns of a function of ones own": (
        BOTH,
        {"data": {**FILE, "transform": "mine.py:f", "columns": {"text": "t", "messages": "m", "turns": "x"}}},
    ),
    "a column by its default name": (BOTH, {"data": {**CHAT, "columns": {"prompt": "prompt"}}}),
    "settings of evaluation": (
        BOTH,
        {
            "data": PLAIN,
            "eval": {
                "dataset": "b.jsonl",
                "name": "sub",
                "transform": "chat",
                "columns": {"messages": "m"},
                "file_pattern": "*.json",
            },
        },
    ),
    "a buffer of a stream": (BOTH, {"data": {**PLAIN, "streaming": True, "shuffle_buffer": 50}}),
    "room for one turn": (
        ONLY_STRUCTURED,
        {
            "data": {**PLAIN, "max_prompt_length": 30, "max_conversation_length": 50},
            "ebft": {"max_completion_length": 20},
        },
    ),
    "a template for prompts": (BOTH, {"data": {**FILE, "transform": "question_answer", "apply_chat_template": True}}),
    "raw text in strided mode": (ONLY_STRIDED, {"data": {**FILE, "transform": "swallow_code"}}),
}


@pytest.mark.parametrize("kinds, sections", ACCEPTED.values(), ids=ACCEPTED)
def test_settings_at_the_border(tmp_path, kinds, sections):
    """Guards against refusals of the table above that refuse too much, and against a mixture that does not come back
    from its own YAML.
    """
    file, again = tmp_path / "config.yaml", tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(tree_of(sections)))
    for kind in kinds:
        config = load_config(str(file), [], kind)
        again.write_text(config.to_yaml())
        assert load_config(str(again), [], kind) == config
