"""Tables in README.md that are made from the code: the settings, from the dataclasses that define them, and the examples, from their first lines.

python tests/readme_tables.py        writes them into README.md (test_readme.py fails when they are not up to date)
"""

import dataclasses
import itertools
import re
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml

from ebft_utils.config.modes import LoraConfig, StridedConfig, StructuredConfig
from ebft_utils.config.settings import alternatives, describe_type

BEGIN, END = "<!-- {name}: begin (made by tests/readme_tables.py) -->", "<!-- {name}: end -->"
SECTIONS = ("model", "lora", "data", "ebft", "train", "eval", "feature_network", "vllm")


def sections_of(config: type) -> dict[str, type]:
    """Name -> dataclass of each section of a mode."""
    found = {
        field.name: field.default_factory
        for field in dataclasses.fields(config)
        if field.default_factory is not dataclasses.MISSING
    }
    return {**found, "lora": LoraConfig}


def settings_of(section: type, prefix: str) -> dict[str, tuple[str, str, str]]:
    """Key -> (type, default, meaning) of a section and those inside of it."""
    hints, found = typing.get_type_hints(section), {}
    for field in dataclasses.fields(section):
        kinds = alternatives(hints[field.name])
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        listed = next(
            (item for kind in kinds for item in typing.get_args(kind) if dataclasses.is_dataclass(item)), None
        )
        key = f"{prefix}.{field.name}"
        if inner is not None and default is not None:
            found |= settings_of(inner, key)
            continue
        words = " or ".join(
            "null" if kind is type(None) else "a mapping" if kind is inner else describe_type(kind).split(" with ")[0]
            for kind in kinds
        )
        bounds = [
            f"{word} {field.metadata[name]:g}"
            for name, word in (("minimum", "≥"), ("above", ">"), ("maximum", "≤"))
            if field.metadata.get(name) is not None
        ]
        shown = "required" if default == "" else yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
        found[key] = (", ".join([words, *bounds]), shown, field.metadata["description"])
        if listed is not None:
            found |= settings_of(listed, f"{key}[]")
    return found


def settings_table() -> str:
    """A table for each section."""
    modes = {mode: sections_of(kind) for mode, kind in (("strided", StridedConfig), ("structured", StructuredConfig))}
    lines = []
    for name in SECTIONS:
        per_mode = {mode: settings_of(sections[name], name) for mode, sections in modes.items() if name in sections}
        lines += [
            "",
            f"**`{name}`**" + (" (only for train_structured.py and serve_vllm.py)" if name == "vllm" else ""),
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for key in dict.fromkeys(key for settings in per_mode.values() for key in settings):
            having = {mode: settings[key] for mode, settings in per_mode.items() if key in settings}
            for setting in dict.fromkeys(having.values()):
                only = [mode for mode, other in having.items() if other == setting]
                tag = f" *({only[0]})*" if len(per_mode) > 1 and len(only) == 1 else ""
                cells = [f"`{key}`{tag}", setting[0], f"`{setting[1]}`", setting[2]]
                lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    return "\n".join(lines)


def header_of(example: Path) -> tuple[str, str]:
    """(what it is, on which hardware), of its first lines."""
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), example.read_text().splitlines()))
    hardware = next(line for line in lines if line.startswith("# Hardware: "))
    return lines[0].removeprefix("# "), re.split(r"[:;(]|\. ", hardware.removeprefix("# Hardware: "))[0].strip(" .")


def examples_table() -> str:
    """One line an example."""
    rows = [(path.name, *header_of(path)) for path in sorted((ROOT / "examples").glob("*.yaml"))]
    return "\n".join(
        [
            "",
            "| `examples/` | | hardware |",
            "|---|---|---|",
            *(f"| `{name}` | {what} | {hardware} |" for name, what, hardware in rows),
        ]
    )


def _escaped(cell: str) -> str:
    """Outside of code, Markdown would take *.json for emphasis and <think> for HTML."""
    cell = cell.replace("|", "\\|")
    return cell if cell.startswith("`") else cell.replace("*.", "\\*.").replace("<", "&lt;")


def with_tables(readme: str) -> str:
    """The README with the tables in their places."""
    for name, table in (("settings", settings_table()), ("examples", examples_table())):
        before, begin, rest = readme.partition(BEGIN.format(name=name))
        _, end, after = rest.partition(END.format(name=name))
        if not begin or not end:
            raise ValueError(f"README.md has no place for the {name}")
        readme = f"{before}{begin}\n{table}\n\n{end}{after}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
