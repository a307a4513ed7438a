"""`cavmae bench kernels`: contenders compute the same thing, and what fails is on record."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from three_way import DEVICE, normal

from cavmae.benchmarks.baselines.tiled_contrastive import tiled_contrastive_loss
from cavmae.benchmarks.kernels import agreement, bench
from cavmae.benchmarks.kernels.cases import Case, Contender, cases
from cavmae.benchmarks.kernels.timing import measured
from cavmae.kernels import Backend

CPU = torch.device("cpu")
CEILING = {"bytes_per_second": 1e9, "flops_per_second": 1e9}


@pytest.mark.parametrize(
    "case", list(cases(CPU, 2, torch.float32, [80])), ids=lambda case: case.name
)
def test_contenders_of_a_case_give_the_same_values_and_gradients(case: Case) -> None:
    ours = case.contenders["ours"]
    expected = ours.run()
    if case.drawn:  # random in different ways: the same kind of result
        every = torch.arange(expected.shape[1]).expand_as(expected)
        assert all(
            torch.equal(contender.run().sort(1).values, every)
            for contender in case.contenders.values()
        )
        return
    upstream = torch.arange(1, expected.numel() + 1).sin().reshape(expected.shape)
    gradients = torch.autograd.grad(ours.run(), ours.leaves, upstream)
    for name, contender in case.contenders.items():
        output = contender.run()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4, msg=name)
        found = torch.autograd.grad(output, contender.leaves, upstream)
        for theirs, gradient in zip(found, gradients, strict=True):
            torch.testing.assert_close(
                contender.as_ours(theirs), gradient, rtol=1e-3, atol=1e-4, msg=name
            )


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("torch", torch.float64, 1e-12), ("torch", torch.float32, 1e-4),
     ("triton", torch.float32, 1e-4)],
)  # fmt: skip
def test_the_tiled_baseline_is_the_dense_formula(
    backend: Backend, dtype: torch.dtype, tolerance: float
) -> None:
    exact = [normal(70, 40).requires_grad_(), normal(70, 40, seed=1).requires_grad_()]
    audio, video = (F.normalize(x, dim=1) for x in exact)
    similarity = audio @ video.T / 0.1
    truth = -(similarity.log_softmax(0) + similarity.log_softmax(1)).diagonal().mean() / 2
    cast = [x.detach().to(dtype).requires_grad_() for x in exact]
    loss = tiled_contrastive_loss(cast[0], cast[1], 0.1, precision="ieee", backend=backend)
    assert abs(loss.detach().double() - truth.detach()) < tolerance
    for theirs, gradient in zip(
        torch.autograd.grad(3 * loss, cast), torch.autograd.grad(3 * truth, exact), strict=True
    ):
        scale = gradient.abs().max()
        assert (theirs.double() - gradient).abs().max() < tolerance * scale


def test_the_record_has_ratios_ceilings_and_shares_and_a_plot_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--batch", "1", "--contrastive", "16", "--repeats", "2"]
    assert bench.main([*words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("kernels-*.json")
    assert path.with_suffix(".png").exists()
    record = json.loads(path.read_text())
    assert record["configuration"]["dtype"] == "fp32"
    assert record["configuration"]["compile"] is False
    results = record["results"]
    assert results["backend"] == "torch"
    assert results["ceilings"]["bytes_per_second"] > 0
    assert {bar["met"] for bar in results["bars"].values()} == {None}, "not judged on a CPU"
    for name, case in results["cases"].items():
        assert case["failed"] == {}
        entry = case["forward"]["eager"]
        assert len(entry["all_seconds"]) == 2
        ratio = entry["times_ours"]
        assert ratio["minimum"] <= ratio["median"] <= ratio["maximum"]
        assert entry["difference_from_ours"] is None or entry["difference_from_ours"] < 1e-4
        assert ("both" in case) == (not name.startswith("random_mask"))
    gather = results["cases"]["gather_tokens"]["forward"]["ours"]
    assert gather["bytes_per_second"] == pytest.approx(2 * 531 * 512 * 4 / gather["median_seconds"])
    assert gather["share_of_product"] is None
    assert gather["peak_bytes"] == 531 * 512 * 4, "the gathered tokens, and nothing else"
    assert "tiled" in results["cases"]["contrastive_16"]["both"]
    printed = capsys.readouterr().out
    assert all(f"{name}, forward" in printed for name in results["cases"])


def test_a_contender_that_fails_is_on_record_and_ends_nothing() -> None:
    def no_room() -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    calls = []

    def fails_later() -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise KeyError("late")
        return torch.zeros(2)

    others = {"eager": Contender(no_room), "late": Contender(fails_later)}
    case = Case("some", {"ours": Contender(lambda: torch.zeros(2)), **others})
    result = measured(case, CPU, repeats=50, compile=False, ceiling=CEILING)
    assert result["failed"]["eager forward"] == "OutOfMemoryError: no room"
    assert result["failed"]["late forward"] == "KeyError: 'late'"
    assert list(result["forward"]) == ["ours"]


def test_a_kernel_of_ours_that_fails_leaves_the_others_without_ratios() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("does not compile")

    case = Case("some", {"ours": Contender(broken), "eager": Contender(lambda: torch.ones(2))})
    result = measured(case, CPU, repeats=2, compile=False, ceiling=CEILING)
    assert list(result["forward"]) == ["eager"]
    assert "times_ours" not in result["forward"]["eager"]
    assert "does not compile" in result["failed"]["ours forward"]
    judged = bench.bars({"contrastive_4096": result}, torch.device("cuda"))
    assert judged["contrastive_4096 forward: times eager"]["met"] is None


def test_bars_are_judged_by_what_was_measured_and_on_a_gpu_only() -> None:
    found: dict[str, Any] = {
        "gather_tokens": {"forward": {"ours": {"share_of_copy": 0.9}}},
        "contrastive_32768": {
            "both": {
                "ours": {"workspace_share_of_matrix": 0.009},
                "tiled": {"times_ours": {"median": 1.5}},
            }
        },
    }
    judged = bench.bars(found, torch.device("cuda"))
    assert judged["gather_tokens forward: share of copy"]["met"] is True
    assert judged["contrastive_32768 with backward: times tiled"]["met"] is False
    assert judged["contrastive_32768 with backward: workspace over matrix"]["met"] is True
    assert judged["restore_tokens with backward: share of copy"]["met"] is None
    assert not any(bar["met"] for bar in bench.bars(found, CPU).values())


def test_cases_after_the_deadline_are_named_and_not_measured() -> None:
    *_, results = bench.measure(
        bench.KernelsConfig("cpu", batch=1, contrastive=(16,), repeats=1), deadline=0.0
    )
    assert all("skipped" in case for case in results["cases"].values())


@pytest.mark.parametrize("field", [{"batch": 0}, {"repeats": 0}, {"contrastive": (512, 0)}])
def test_counts_below_one_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))} is 0; use 1 or more"):
        bench.KernelsConfig(**field)


def test_kernels_agree_with_their_references_and_themselves() -> None:
    found: dict[str, float] = {}
    for name in agreement.comparisons(small=True):
        differences, beyond = agreement.compared(DEVICE, name)
        assert beyond == []
        found |= differences
    assert found["random_mask tf odd float32"] == 0
    assert 0 < found["contrastive_loss both ways odd bfloat16"] < 2e-2


def test_a_kernel_that_is_wrong_or_differs_between_two_runs_is_named_in_each_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agreement, "INTERPRETED", False)
    values = iter((1.0, 1.0, 1.2) * 2 + (1.0, 1.1, 1.0))
    monkeypatch.setattr(
        agreement, "gather_patches", lambda *_, **__: torch.full((2,), next(values))
    )
    _, beyond = agreement.compared(DEVICE, "gather_patches odd")
    assert beyond == [
        "gather_patches odd float32: 1.67e-01 (limit 2e-05)",
        "gather_patches odd bfloat16: 1.67e-01 (limit 2e-02)",
        "gather_patches odd float16: two runs differ",
    ]


def test_comparisons_whose_process_dies_are_beyond_their_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    *_, (found, beyond) = agreement.compared_in_parallel(DEVICE, ["a", "b"])
    assert found == {}
    assert sorted(beyond) == [
        f"{name}: not compared, its process ended with exit code 1" for name in "ab"
    ]
