"""`cavmae pretrain RECIPE [--field value ...]`, or `python -m cavmae.trainer.pretrain`.

Started by plain python, `deepspeed --module`, `torchrun -m` or `cavmae.cluster.train`; each sets
the same rank variables. A run folder that has checkpoints goes on from the newest whole one.
"""

import sys

from cavmae.command import exit_code
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.run import run_as_rank


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    run_as_rank(parse(arguments, [PretrainConfig], "cavmae pretrain"))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
