"""The training step that benchmarks time really trains."""

import pytest
import torch

from cavmae.benchmarks.step.training_step import (
    SIZES,
    MasterAdam,
    ModelName,
    Precision,
    StepSetting,
    TrainingStep,
)


@pytest.mark.parametrize("name", ["cavmae", "published"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_falls_over_ten_steps(name: ModelName, precision: Precision) -> None:
    step = TrainingStep(StepSetting(name, SIZES["tiny"], 4, precision, torch.device("cpu")))
    losses = [float(step()) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_first_losses_of_both_precisions_agree() -> None:
    cpu = torch.device("cpu")
    fp32, bf16 = (
        float(TrainingStep(StepSetting("cavmae", SIZES["tiny"], 4, precision, cpu))())
        for precision in ("fp32", "bf16")
    )
    assert bf16 == pytest.approx(fp32, rel=1e-2)


def test_bf16_parameters_follow_float32_masters() -> None:
    start = torch.ones(3)
    parameter = torch.nn.Parameter(start.bfloat16())
    unused = torch.nn.Parameter(torch.ones(2).bfloat16())
    optimizer = MasterAdam([parameter, unused])
    reference = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([reference], lr=1e-4, betas=(0.95, 0.999), weight_decay=5e-7)
    for _ in range(30):
        gradient = torch.tensor([1.0, -2.0, 0.5])
        parameter.grad, reference.grad = gradient.bfloat16(), gradient
        optimizer.step()
        adam.step()
        optimizer.zero_grad()
    # A bf16 step of 1e-4 on 1.0 would round to nothing; the masters collect it.
    torch.testing.assert_close(optimizer.masters[0].detach(), reference.detach())
    assert torch.equal(parameter.detach(), reference.detach().bfloat16())
    assert torch.equal(unused.detach(), torch.ones(2).bfloat16())
