"""The command line, checked before a script imports what is slow to import."""

import os
import sys
from contextlib import nullcontext, redirect_stdout

from .modes import Config, parse_command_line
from .settings import UserError


def check_command_line(kind: type[Config], description: str) -> None:
    """Ends the process with one message when the command line or its configuration is wrong, else says what begins.

    A script calls it before it imports torch and transformers: a typo then costs half a second instead of ten. One
    process of each machine speaks.
    """
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        with nullcontext() if speaks else redirect_stdout(None):
            config, dry_run = parse_command_line(sys.argv[1:], description, kind)
    except UserError as error:
        sys.exit(f"error: {error}" if speaks else 1)
    if config is None:
        sys.exit()
    if speaks:
        what = "dry run of " * dry_run + f"{config.mode} mode: {config.model.name_or_path} on {config.data.described}"
        print(f"{what}, into {config.train.output_dir}; loading torch ..", file=sys.stderr)
