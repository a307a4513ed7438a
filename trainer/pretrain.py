"""`cavmae pretrain RECIPE [--field value ...]`, or `python -m cavmae.trainer.pretrain`.

Launched by plain python, `deepspeed --module`, `torchrun -m` or `cavmae.cluster.train`, which all
set the same rank variables. A run folder that has checkpoints is resumed from the newest whole one.
"""

import sys

from cavmae.command import exit_code
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.run import MakeHooks, run_as_rank


def main(arguments: list[str], make_hooks: MakeHooks | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        arguments: words after the command.
        make_hooks: see `run`.
    """
    run_as_rank(parse(arguments, [PretrainConfig], "cavmae pretrain"), make_hooks)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
