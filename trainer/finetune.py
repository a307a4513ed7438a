"""`cavmae finetune RECIPE [--field value ...]`, or `python -m cavmae.trainer.finetune`.

Launched like `cavmae pretrain`; it differs in the recipes that it takes.
"""

import sys

from cavmae.command import exit_code
from cavmae.trainer.config.configs import FinetuneConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.run import MakeHooks, run_as_rank


def main(arguments: list[str], make_hooks: MakeHooks | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        arguments: words after the command.
        make_hooks: see `run`.
    """
    run_as_rank(parse(arguments, [FinetuneConfig], "cavmae finetune"), make_hooks)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
