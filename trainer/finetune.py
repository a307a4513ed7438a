"""`cavmae finetune RECIPE [--field value ...]`, or `python -m cavmae.trainer.finetune`.

Started in all the ways that `cavmae pretrain` is; it differs in the recipes that it takes.
"""

import sys

from cavmae.command import exit_code
from cavmae.trainer.config.configs import FinetuneConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.run import run_as_rank


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    run_as_rank(parse(arguments, [FinetuneConfig], "cavmae finetune"))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
