"""What the README says of the code is so: its generated tables, the metrics and the transforms that it lists, the files it names."""

import re

import pytest

import train_strided
import train_structured
from conftest import ROOT
from ebft_utils.data.transforms import TRANSFORMS
from ebft_utils.run.metrics import evaluation_metrics
from readme_tables import with_tables

README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_generated_tables_are_up_to_date():
    """Guards against a setting that is added, renamed or gets another default, and an example that is added, without the README."""
    assert with_tables(README) == README, "run: python tests/readme_tables.py"
    assert "`ebft.stride` *(strided)* | a whole number, ≥ 1 | `8` | tokens from one anchor to the next |" in README
    assert "| `data.mix[].weight` |" in README and "`vllm.port`" in README


def test_every_metric_is_explained():
    """Guards against a number in TensorBoard that nobody explains, and one in the table that nobody logs: names out of the code that logs them."""
    code = "".join(
        (ROOT / name).read_text()
        for name in ("train_strided.py", "train_structured.py", "ebft_utils/run/loop.py", "ebft_utils/run/metrics.py")
    )
    logged = set(re.findall(r"\"((?:ebft|train|rollout|vllm|time|eval)/[a-z_]+)\"", code)) - {
        "vllm/ratio_least"
    }  # becomes ratio_min
    logged |= {f"eval/{name}" for name in (*train_strided.EVALUATED, *train_structured.EVALUATED)}
    logged = {name for name in logged if not name.endswith("_se")}
    explained = set(
        re.findall(
            r"`([a-z]+/[a-z_@0-9]+)`",
            "\n".join(line.split(" | ")[0] for line in section("Metrics").splitlines() if line.startswith("| `")),
        )
    )
    assert logged == explained and len(logged) > 30
    assert evaluation_metrics.__name__ and "…_se" in section("Metrics")


def test_every_transform_is_listed():
    """Guards against a transform that only its author knows."""
    listed = set(
        re.findall(
            r"`([a-z_]+)`",
            "\n".join(line.split(" | ")[0] for line in section("Your data").splitlines() if line.startswith("| `")),
        )
    )
    assert set(TRANSFORMS) <= listed


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:examples|tests|ebft_utils|accelerate_configs)/[\w./]+\.(?:py|yaml|sh)", README)))
)
def test_files_that_it_names_are_there(path):
    """Guards against a README that outlives its files."""
    assert (ROOT / path).is_file()
