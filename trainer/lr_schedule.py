"""The learning rate as a function of the step alone, so that resuming needs no state for it."""

import math

from cavmae.trainer.config.configs import ScheduleConfig


def learning_rate(
    config: ScheduleConfig, peak: float, *, step: int, steps: int, steps_per_epoch: float
) -> float:
    """Compute the learning rate of optimizer step `step`, counted from 0.

    The `step` schedule is the published one: it multiplies by `gamma` after `step_start_epochs`
    finished epochs and after every `step_every_epochs` more. `cosine` falls from the end of the
    warm-up to `min_lr_ratio` of the peak at the last step.

    Args:
        config: the schedule.
        peak: learning rate after warm-up.
        step: optimizer step.
        steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of a pass over the training set.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.name == "step":
        finished = math.floor(step / steps_per_epoch + 1e-9)
        decays = 0
        if finished >= config.step_start_epochs:
            decays = (finished - config.step_start_epochs) // config.step_every_epochs + 1
        return peak * config.gamma**decays
    if config.name == "cosine":
        share = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
    return peak
