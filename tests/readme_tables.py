"""The tables of the READMEs that are made from the code.

    python tests/readme_tables.py        writes them (test_readme.py fails when they are not up to date)

settings  from the dataclasses that define them, into ebft_utils/config/README.md
examples  from the first lines of each recipe, into examples/README.md
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

from ebft_utils.config.modes import StridedConfig, StructuredConfig
from ebft_utils.config.settings import alternatives, describe_type

PAGES = {"settings": ROOT / "ebft_utils" / "config" / "README.md", "examples": ROOT / "examples" / "README.md"}
BEGIN, END = "<!-- {name}: begin (made by tests/readme_tables.py) -->", "<!-- {name}: end -->"
SECTIONS = ("model", "lora", "data", "ebft", "train", "eval", "feature_network", "vllm")


def sections_of(config: type) -> dict[str, type]:
    """Name -> dataclass of each section of a mode; also of one that may be left out (lora)."""
    hints = typing.get_type_hints(config)
    found = {field.name: alternatives(hints[field.name])[0] for field in dataclasses.fields(config)}
    return {name: kind for name, kind in found.items() if dataclasses.is_dataclass(kind)}


def settings_of(section: type, prefix: str) -> dict[str, tuple[str, str, str]]:
    """Key -> (type, default, meaning) of a section and those inside of it."""
    hints, found = typing.get_type_hints(section), {}
    for field in dataclasses.fields(section):
        kinds = alternatives(hints[field.name])
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        listed = next(
            (kind for kind in itertools.chain(*map(typing.get_args, kinds)) if dataclasses.is_dataclass(kind)), None
        )
        key = f"{prefix}.{field.name}"
        if inner is not None and default is not None:
            found |= settings_of(inner, key)
            continue
        words = ["a mapping" if kind is inner else describe_type(kind).split(" with ")[0] for kind in kinds]
        bounds = [
            f"{word} {field.metadata[name]:g}"
            for name, word in (("minimum", "≥"), ("above", ">"), ("maximum", "≤"))
            if field.metadata.get(name) is not None
        ]
        shown = "required" if default == "" else yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
        found[key] = (", ".join([" or ".join(words), *bounds]), shown, field.metadata["description"])
        if listed is not None:
            found |= settings_of(listed, f"{key}[]")
    return found


def settings_table() -> str:
    """A heading and a table for each section. A key that only one mode has, or has otherwise, says which mode."""
    modes = {mode: sections_of(kind) for mode, kind in (("strided", StridedConfig), ("structured", StructuredConfig))}
    lines = []
    for name in SECTIONS:
        per_mode = {mode: settings_of(sections[name], name) for mode, sections in modes.items() if name in sections}
        lines += ["", f"## {name}", ""]
        lines += ["Only for `train_structured.py` and `serve_vllm.py`.", ""] if name == "vllm" else []
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in dict.fromkeys(key for settings in per_mode.values() for key in settings):
            having = {mode: settings[key] for mode, settings in per_mode.items() if key in settings}
            for setting in dict.fromkeys(having.values()):
                only = [mode for mode, other in having.items() if other == setting]
                tag = f" *({only[0]})*" if len(per_mode) > 1 and len(only) == 1 else ""
                cells = [f"`{key}`{tag}", setting[0], f"`{setting[1]}`", setting[2]]
                lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    return "\n".join(lines)


def header_of(example: Path) -> tuple[str, str]:
    """What a recipe trains, and on which hardware: its first line, and the beginning of the one after `# Hardware:`."""
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), example.read_text().splitlines()))
    hardware = next(line for line in lines if line.startswith("# Hardware: "))
    return lines[0].removeprefix("# "), re.split(r"[:;(]|\. ", hardware.removeprefix("# Hardware: "))[0].strip(" .")


def examples_table() -> str:
    """One row a recipe."""
    lines = ["", "| recipe | what it trains | hardware |", "|---|---|---|"]
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        lines.append(f"| [{path.name}]({path.name}) | " + " | ".join(_escaped(cell) for cell in header_of(path)) + " |")
    return "\n".join(lines)


def _escaped(cell: str) -> str:
    """Outside of code, Markdown would take *.json for emphasis and <think> for HTML."""
    cell = cell.replace("|", "\\|")
    return cell if cell.startswith("`") else cell.replace("*.", "\\*.").replace("<", "&lt;")


def with_table(name: str, page: str) -> str:
    """The page with the table of that name between its two marks."""
    before, begin, rest = page.partition(BEGIN.format(name=name))
    _, end, after = rest.partition(END.format(name=name))
    if not begin or not end:
        raise ValueError(
            f"{PAGES[name]} has no place for the {name}: {BEGIN.format(name=name)} .. {END.format(name=name)}"
        )
    table = {"settings": settings_table, "examples": examples_table}[name]()
    return f"{before}{begin}\n{table}\n\n{end}{after}"


if __name__ == "__main__":
    for name, path in PAGES.items():
        path.write_text(with_table(name, path.read_text()))
