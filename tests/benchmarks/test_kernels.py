"""`cavmae bench kernels`: contenders compute the same thing, and what fails is on record."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from three_way import DEVICE, normal, upstream_of

from cavmae.benchmarks import kernels
from cavmae.benchmarks.baselines.tiled_contrastive import tiled_contrastive_loss
from cavmae.benchmarks.kernel_agreement import disagreements
from cavmae.benchmarks.kernel_cases import Case, cases

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "case", list(cases(CPU, 2, torch.float32, [24])), ids=lambda case: case.name
)
def test_contenders_of_a_case_give_the_same_values_and_gradients(case: Case) -> None:
    if case.name.startswith("random_mask"):  # random in different ways: the same kind of result
        every = torch.arange(512 if "audio" in case.name else 196).expand(2, -1)
        assert all(torch.equal(run().sort(1).values, every) for run in case.contenders.values())
        return
    expected = case.contenders["ours"]()
    for name, run in case.contenders.items():
        output = run()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4, msg=name)
        upstream = upstream_of(output.detach())
        for ours, theirs in zip(
            torch.autograd.grad(case.contenders["ours"](), case.leaves, upstream),
            torch.autograd.grad(output, case.leaves, upstream),
            strict=True,
        ):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4, msg=name)


def test_the_tiled_baseline_is_the_dense_formula() -> None:
    audio, video = normal(70, 40), normal(70, 40, seed=1)
    exact = [audio.requires_grad_(), video.requires_grad_()]
    similarity = F.normalize(audio, dim=1) @ F.normalize(video, dim=1).T / 0.1
    truth = (similarity.logsumexp(0) + similarity.logsumexp(1)).mean() / 2
    truth = truth - similarity.diagonal().mean()
    single = [x.detach().float().requires_grad_() for x in exact]
    loss = tiled_contrastive_loss(single[0], single[1], 0.1)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, single), torch.autograd.grad(truth, exact), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-6)


def test_the_record_has_ratios_ceilings_and_shares(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--batch", "1", "--contrastive", "16", "--repeats", "2"]
    assert kernels.main([*words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("kernels-*.json")
    assert path.with_suffix(".png").exists()
    results = json.loads(path.read_text())["results"]
    assert results["backend"] == "torch"
    assert results["ceilings"]["bytes_per_second"] > 0
    assert results["bars"] == "judged on a GPU only"
    gather = results["cases"]["gather_tokens"]
    assert len(gather["both"]["eager"]["all_seconds"]) == 2
    assert gather["forward"]["eager"]["times_ours"]["median"] > 0
    assert 0 < gather["forward"]["ours"]["share_of_copy"] < 2
    # The gathered tokens in float32, and nothing else.
    assert gather["forward"]["ours"]["peak_bytes"] == 531 * 512 * 4
    assert "both" not in results["cases"]["random_mask_audio"]


def test_a_contender_that_fails_is_on_record_and_ends_nothing() -> None:
    def fails() -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    case = Case("some", {"ours": lambda: torch.zeros(2), "theirs": fails})
    ceiling = {"bytes_per_second": 1.0, "flops_per_second": 1.0}
    result = kernels.measured(case, CPU, repeats=1, compile=False, ceiling=ceiling)
    assert result["failed"] == {"theirs forward": "OutOfMemoryError: no room"}
    assert list(result["forward"]) == ["ours"]
    assert "failed: theirs forward" in kernels.line("some", result)


def test_bars_are_judged_by_what_was_measured() -> None:
    found = {
        "gather_tokens": {"forward": {"ours": {"share_of_copy": 0.9}}},
        "contrastive_32768": {"both": {"tiled": {"times_ours": {"median": 1.5}}}},
    }
    judged = kernels.bars(found)
    assert judged["gather_tokens forward: share of copy"]["met"] is True
    assert judged["contrastive both: times tiled"]["met"] is False
    assert judged["restore_tokens both: share of copy"]["met"] is None, "not measured"


def test_kernels_agree_with_their_references_and_themselves() -> None:
    found, beyond = disagreements(DEVICE, batch=2)
    assert beyond == []
    assert found["random_mask tf bfloat16"] == 0
    assert 0 < found["contrastive_loss bfloat16"] < 2e-2
