"""What the READMEs say is so: generated tables, metrics, transforms, error messages, links, and the files they name."""

import re
import subprocess
from pathlib import Path

import pytest

import train_strided
import train_structured
from ebft_utils.config.modes import load_config
from ebft_utils.config.settings import UserError
from ebft_utils.data.transforms import TRANSFORMS
from helpers import ROOT
from readme_tables import PAGES, with_table

FOLDERS = ("accelerate_configs", "ebft_utils", "examples", "tests")
READMES = sorted([ROOT / "README.md", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))])
EACH = pytest.mark.parametrize("page", READMES, ids=lambda path: str(path.relative_to(ROOT)))
WRITTEN_BY_RUNS = {"config.yaml", "training_config.yaml"}


def section(page: Path, title: str) -> str:
    """The text of a page below a heading of the second level."""
    return page.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_cells(text: str) -> str:
    """The first cell of each table row that begins with code, a line each."""
    return "\n".join(line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `"))


def prose_of(markdown: str) -> str:
    """Without blocks of code."""
    return re.sub(r"^(`{3,}).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings: lower case, punctuation dropped, spaces to hyphens; repeated
    ones are numbered."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?)\s*$", prose_of(page.read_text()), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        numbered, number = slug, 0
        while numbered in found:
            number += 1
            numbered = f"{slug}-{number}"
        found.add(numbered)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_generated_tables_are_up_to_date(name):
    """Guards against a setting or a recipe that is added, renamed or changed, and the table is not."""
    page = PAGES[name].read_text()
    assert with_table(name, page) == page, "run: python tests/readme_tables.py"


def test_the_settings_table_by_hand():
    """Guards against a generator that loses a mode, a bound, a list of sections or a default."""
    page = PAGES["settings"].read_text()
    assert "| `ebft.stride` *(strided)* | a whole number, ≥ 1 | `8` | tokens from one anchor to the next |" in page
    assert "| `lora.r` | a whole number, ≥ 1 | `16` |" in page
    for key in ("data.mix[].weight", "data.columns.text", "vllm.port", "train.output_dir` | text | `required"):
        assert f"| `{key}`" in page


def test_every_metric_is_explained():
    """Guards against a number in TensorBoard that nobody explains, and one in the table that nobody logs."""
    files = [*ROOT.glob("train_*.py"), *(ROOT / "ebft_utils").rglob("*.py")]
    code = "".join(path.read_text() for path in files)
    logged = set(re.findall(r"\"((?:ebft|train|rollout|vllm|time|eval)/[a-z_]+)\"", code))
    logged -= {"vllm/ratio_least"}  # logged as ratio_min
    logged |= {f"eval/{name}" for name in (*train_strided.EVALUATED, *train_structured.EVALUATED)}
    logged = {name for name in logged if not name.endswith("_se")}
    table = section(ROOT / "ebft_utils" / "README.md", "Metrics")
    assert logged == set(re.findall(r"`([a-z]+/[a-z_@0-9]+)`", first_cells(table))) and len(logged) > 30
    assert "`…_se`" in table and "`…_change_se`" in table


def test_every_transform_is_listed():
    """Guards against a transform that only its author knows."""
    listed = re.findall(r"`([a-z_]+)`", first_cells(section(ROOT / "examples" / "README.md", "Your data")))
    assert set(TRANSFORMS) <= set(listed)


def test_error_messages_are_the_real_ones():
    """Guards against a page that shows a message which the program no longer gives."""
    page = (ROOT / "ebft_utils" / "config" / "README.md").read_text()
    shown = re.findall(r"^\$ python train_strided.py --cfg (\S+) (.*)\nerror: (.*)$", page, flags=re.MULTILINE)
    assert len(shown) == 3
    for file, overrides, message in shown:
        with pytest.raises(UserError) as error:
            load_config(str(ROOT / file), overrides.split())
        assert str(error.value) == message


@EACH
def test_links_lead_somewhere(page):
    """Guards against a page or a picture that moved, and a heading that was renamed."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: there is no {file}"
        assert not anchor or anchor in anchors_of(file / "README.md" if file.is_dir() else file), (
            f"{target}: no heading"
        )


@EACH
def test_files_that_it_names_are_there(page):
    """Guards against a README that outlives its files. my_data.yaml and the like are the reader's own."""
    named = set(re.findall(r"(?<![\w/.:*-])[\w./-]+\.(?:py|yaml|sh)(?!\w)", page.read_text()))
    known = {
        path.name for path in (*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")))
    }
    for name in sorted(name for name in named if not Path(name).name.startswith("my")):
        if "/" not in name or Path(name).name in WRITTEN_BY_RUNS:
            assert Path(name).name in known | WRITTEN_BY_RUNS, name
        else:
            assert (ROOT / name).is_file() or (page.parent / name).is_file(), name


def test_the_first_page_stays_short():
    """Guards against a README that nobody reads to its end."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250 and len(text.encode()) <= 20 * 1024


def test_the_test_command_is_found():
    """Guards against a check that runs nothing: .ci/run takes its command out of README.md."""
    script, _, run = (ROOT / ".ci" / "run").read_text().rstrip().rpartition("\n")
    assert run == 'bash -euo pipefail -c "$command"'
    found = subprocess.run(["bash", "-c", script, ROOT / ".ci" / "run"], capture_output=True, text=True, check=True)
    assert "pip install -r requirements.txt" in found.stdout and found.stdout.endswith("python -m pytest -q tests\n")
