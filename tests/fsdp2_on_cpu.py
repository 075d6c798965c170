"""Runs a script under FSDP2 on CPU processes:

    ACCELERATE_USE_CPU=true accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 \\
        tests/fsdp2_on_cpu.py train_strided.py --cfg ..

accelerate does not do that by itself. It would run unsharded, and the scripts refuse that.
"""

import runpy
import sys
from pathlib import Path

from accelerate import DistributedType, PartialState

if __name__ == "__main__":
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU  # what accelerate then turns into FSDP
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
