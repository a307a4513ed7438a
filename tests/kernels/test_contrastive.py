"""The contrastive loss against its formula written out, in the reference and in the kernel."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from three_way import (
    DEVICE,
    DTYPES,
    check_repeats,
    check_three_way,
    dtype_name,
    error,
    normal,
    results,
)

from cavmae.kernels import contrastive_loss, similarity
from cavmae.kernels.similarity import tile_statistics

# A probability is as exact as its exponent, which is up to 20 (100 at the sharpest temperature).
# For inputs of 16 bits the gradient's weights are stored in bf16.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 8e-3}
BACKENDS = ["torch", "triton"]
NAMES = ("audio", "video", "temperature")


def pairs(audio: int, video: int, width: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of which each pair is a little alike."""
    a, v = normal(audio, width), normal(video, width, seed=1)
    count = min(audio, video)
    start_a, start_v = (offset, 0) if audio > video else (0, offset)
    v[start_v : start_v + count] += 0.7 * a[start_a : start_a + count]
    return a, v


def written_out(
    audio: torch.Tensor,
    video: torch.Tensor,
    temperature: torch.Tensor | float,
    bidirectional: bool,
    offset: int = 0,
) -> torch.Tensor:
    similarity = F.normalize(audio, dim=1) @ F.normalize(video, dim=1).T / temperature
    count = min(similarity.shape)
    a = torch.arange(count, device=DEVICE) + (offset if len(audio) > len(video) else 0)
    v = torch.arange(count, device=DEVICE) + (offset if len(video) > len(audio) else 0)
    losses = [(similarity.logsumexp(0)[v] - similarity[a, v]).mean()]
    if bidirectional:
        losses.append((similarity.logsumexp(1)[a] - similarity[a, v]).mean())
    return torch.stack(losses).mean()


def check_against_truth(
    audio: torch.Tensor,
    video: torch.Tensor,
    bidirectional: bool,
    dtype: torch.dtype,
    backend: str,
    *,
    offset: int = 0,
    temperature: float = 0.07,
) -> None:
    def ours(backend, audio, video, temperature) -> torch.Tensor:
        result = contrastive_loss(
            audio, video, temperature, bidirectional, None, offset, backend=backend
        )
        return result.loss

    def truth(_, audio, video, temperature) -> torch.Tensor:
        return written_out(audio, video, temperature, bidirectional, offset)

    tau = torch.tensor(temperature, dtype=torch.float64, device=DEVICE)
    exact = [audio.to(dtype).double(), video.to(dtype).double(), tau]
    expected = results(truth, "", exact)
    found = results(ours, backend, [audio.to(dtype), video.to(dtype), tau.float()])
    # A loss is the difference of two numbers around 10, whose rounding it has.
    assert abs(float(found[0]) - float(expected[0])) <= 2e-6 * max(1.0, float(expected[0]))
    for name, value, true in zip(NAMES, found[1:], expected[1:], strict=True):
        limit = TOLERANCE[dtype] * float(true.abs().max()) + 2e-6  # what is left of a gradient of 0
        assert float((value.double() - true).abs().max()) <= limit, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize(
    ("audio", "video", "width", "offset"),
    [
        (1, 1, 16, 0),
        (12, 12, 8, 0),
        (70, 70, 40, 0),
        (33, 70, 40, 5),
        (70, 33, 40, 37),
        (1, 20, 24, 19),
        (20, 1, 2, 3),
    ],
)
def test_loss_and_gradients_are_the_formula_s(
    audio, video, width, offset, bidirectional, dtype, backend
) -> None:
    check_against_truth(
        *pairs(audio, video, width, offset), bidirectional, dtype, backend, offset=offset
    )


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_more_blocks_than_programs(bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # 5 blocks of 64 queries and candidates over 2 programs and 4 splits, on a GPU as well.
    monkeypatch.setattr(tile_statistics, "_programs", lambda _: 8)
    check_against_truth(*pairs(300, 310, 16, 4), bidirectional, torch.float32, "triton", offset=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_widest_embeddings(dtype) -> None:
    check_against_truth(*pairs(5, 5, 2048), True, dtype, "triton", temperature=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_sharp_and_flat_temperatures(temperature: float, backend) -> None:
    audio, video = pairs(40, 40, 24)
    video[3] = -audio[3]  # a positive on the far side: its similarity is -1 / temperature
    check_against_truth(audio, video, True, torch.float32, backend, temperature=temperature)


def test_more_groups_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_statistics, "_programs", lambda _: 2)
    audio, video = (x.float() for x in pairs(15, 15, 8))
    by_kernel, by_torch = (
        contrastive_loss(audio, video, 0.05, True, 5, backend=b).loss for b in ("triton", "torch")
    )
    torch.testing.assert_close(by_kernel, by_torch)


@pytest.mark.parametrize(
    ("group", "block_bytes"),
    [(None, 1), (70, 1), (70, 2 * 70 * 70 * 4)],
    ids=["two-blocks", "one-group-at-a-time", "two-groups-at-a-time"],
)
def test_gradients_do_not_depend_on_the_row_blocks(
    group: int | None, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio, video = (x.float() for x in pairs(210, 210, 8))

    def loss(_, a, v, temperature) -> torch.Tensor:
        return contrastive_loss(a, v, temperature, True, group, backend="triton").loss

    inputs = [audio, video, torch.tensor(0.07, device=DEVICE)]
    at_once = results(loss, "", inputs)
    monkeypatch.setattr(similarity, "ROW_BLOCK_BYTES", block_bytes)
    for ours, theirs in zip(results(loss, "", inputs), at_once, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-15, 1e-9, 1e9, 1e15])
def test_gradients_are_as_much_larger_as_the_embeddings_are_shorter(
    scale: float, backend, bidirectional: bool
) -> None:
    # Below 1e-12 a norm counts as 1e-12, in the loss as in torch.nn.functional.normalize.
    audio, video = (F.normalize(x) for x in pairs(20, 20, 16))

    def ours(_, a, v) -> torch.Tensor:
        return contrastive_loss(a, v, 0.05, bidirectional, backend=backend).loss

    def truth(_, a, v) -> torch.Tensor:
        return written_out(a, v, 0.05, bidirectional)

    inputs = [(audio * scale).float(), (video * scale).float()]
    expected = results(truth, "", [x.double() for x in inputs])
    for found, true in zip(results(ours, "", inputs), expected, strict=True):
        assert error(found * scale, true * scale) < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_huge_and_tiny_norms(scale: float, backend) -> None:
    audio, video = (x.float() for x in pairs(20, 20, 16))
    scales = torch.logspace(0, math.log10(scale), 20, device=DEVICE)[:, None]
    loss = contrastive_loss(audio * scales, video / scales.sqrt(), 0.05, True, backend=backend).loss
    expected = written_out(audio.double(), video.double(), 0.05, True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("group", [None, 4], ids=["whole", "groups"])
@pytest.mark.parametrize(
    "view",
    [
        lambda: normal(16, 12, seed=2).T,
        lambda: normal(24, 16, seed=2)[::2],
        lambda: normal(12, 40, seed=2)[:, 5:21],
        lambda: normal(12, 32, seed=2)[:, ::2],
        lambda: normal(1, 16, seed=2).expand(12, 16),
        lambda: normal(12, 1, seed=2).expand(12, 16),
    ],
    ids=[
        "transposed",
        "every-second-row",
        "columns",
        "every-second-column",
        "one-row",
        "one-value",
    ],
)
def test_embeddings_are_read_through_their_strides(view, group: int | None) -> None:
    def operation(backend, audio, video) -> torch.Tensor:
        return contrastive_loss(audio, video, 0.5, True, group, backend=backend).loss

    plain = normal(12, 16)
    for inputs in ([view(), plain], [plain, view()]):
        check_three_way(operation, inputs, torch.float32, tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equal_embeddings_know_nothing(bidirectional: bool, backend) -> None:
    x = torch.ones(30, 8, device=DEVICE, requires_grad=True)
    result = contrastive_loss(x, x.detach(), 0.05, bidirectional, backend=backend)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.log(30), rel=1e-5)
    assert float(result.accuracy) == 0, "a tie is a miss, whatever the order"
    assert x.grad is not None and x.grad.abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_counts_the_pairs_that_rank_first(backend) -> None:
    audio = torch.eye(4, device=DEVICE)
    video = torch.eye(4, device=DEVICE)[[0, 1, 3, 2]]
    assert contrastive_loss(audio, video, 0.05, True, backend=backend).accuracy.item() == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_that_is_there_twice_is_a_miss_for_both(backend) -> None:
    audio = torch.eye(5, device=DEVICE)
    audio[1] = audio[0]
    result = contrastive_loss(audio, audio.clone(), 0.05, False, backend=backend)
    assert result.accuracy.item() == pytest.approx(3 / 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_embedding_of_zeros_has_similarity_zero_and_harms_no_other(backend) -> None:
    audio, video = (x.float() for x in pairs(8, 8, 16))
    audio[2] = 0
    audio.requires_grad_()
    loss = contrastive_loss(audio, video, 0.05, True, backend=backend).loss
    loss.backward()
    expected = written_out(audio.detach().double(), video.double(), 0.05, True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    others = [0, 1, 3, 4, 5, 6, 7]
    assert audio.grad is not None and audio.grad.isfinite().all()
    assert (audio.grad[others].abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("group", [None, 50], ids=["whole", "groups"])
def test_an_embedding_that_is_not_finite_makes_the_loss_nan(
    group: int | None, bidirectional: bool, value: float, backend
) -> None:
    for side in (0, 1):
        for row in (0, 99):  # the first and the last of two blocks
            audio, video = (x.float() for x in pairs(100, 100, 16))
            (audio, video)[side][row, 3] = value
            result = contrastive_loss(audio, video, 0.05, bidirectional, group, backend=backend)
            assert result.loss.isnan(), (side, row)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_a_candidate_without_partner_that_is_not_finite_makes_the_loss_nan(
    bidirectional: bool, backend
) -> None:
    audio, video = (x.float() for x in pairs(20, 8, 16, 3))
    audio[19, 0] = float("nan")
    assert contrastive_loss(
        audio, video, 0.05, bidirectional, None, 3, backend=backend
    ).loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_that_is_not_a_number_makes_the_loss_nan(backend) -> None:
    audio, video = (x.float() for x in pairs(8, 8, 16))
    temperature = torch.tensor(float("nan"), device=DEVICE)
    assert contrastive_loss(audio, video, temperature, True, backend=backend).loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_temperature_s_gradient_has_its_shape_and_dtype(shape, backend) -> None:
    audio, video = (x.bfloat16() for x in pairs(8, 8, 16))
    temperature = torch.full(shape, 0.07, device=DEVICE, requires_grad=True)
    contrastive_loss(audio, video, temperature, True, backend=backend).loss.backward()
    assert temperature.grad is not None
    assert temperature.grad.shape == shape and temperature.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 4, 6])
def test_groups_are_separate_softmaxes(group: int, backend) -> None:
    audio, video = (x.float().requires_grad_() for x in pairs(12, 12, 8))
    grouped = contrastive_loss(audio, video, 0.05, True, group, backend=backend)
    parts = [
        contrastive_loss(audio[i : i + group], video[i : i + group], 0.05, True, backend="torch")
        for i in range(0, 12, group)
    ]
    alone = torch.stack([part.loss for part in parts]).mean()
    torch.testing.assert_close(grouped.loss, alone, atol=1e-6, rtol=1e-5)
    accuracy = torch.stack([part.accuracy for part in parts]).mean()
    torch.testing.assert_close(grouped.accuracy, accuracy)
    for ours, theirs in zip(
        torch.autograd.grad(grouped.loss, [audio, video]),
        torch.autograd.grad(alone, [audio, video]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(2, 20),
    seed=st.integers(0, 1000),
    backend=st.sampled_from(BACKENDS),
    bidirectional=st.booleans(),
)
def test_order_and_length_of_the_embeddings_do_not_matter(
    batch, seed, backend, bidirectional
) -> None:
    audio, video = (x.float() for x in pairs(batch, batch, 8))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(batch, generator=generator).to(DEVICE)
    lengths = (torch.rand(batch, 1, generator=generator) * 10 + 0.1).to(DEVICE)
    plain = contrastive_loss(audio, video, 0.1, bidirectional, backend=backend)
    other = contrastive_loss(
        (audio * lengths)[order], video[order], 0.1, bidirectional, backend=backend
    )
    torch.testing.assert_close(other.loss, plain.loss, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other.accuracy, plain.accuracy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_overflows_makes_the_loss_nan(backend) -> None:
    audio, video = (x.float() for x in pairs(8, 8, 16))
    audio[3] *= 1e20  # its square is beyond float32
    assert contrastive_loss(audio, video, 0.05, True, backend=backend).loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0.9e-12, 1e-14], ids=["just-below", "far-below"])
def test_embeddings_below_the_smallest_norm_have_the_gradient_of_normalize(length, backend) -> None:
    audio, video = (F.normalize(x, dim=1).float() * length for x in pairs(8, 8, 16))
    inputs = [x.requires_grad_() for x in (audio, video)]
    ours = contrastive_loss(audio, video, 0.5, True, backend=backend).loss
    theirs = written_out(audio, video, 0.5, True)
    for found, expected in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        assert error(found, expected.double()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, -0.1])
def test_a_temperature_that_training_moves_to_zero_makes_the_loss_nan(value, backend) -> None:
    audio, video = (x.float() for x in pairs(8, 8, 16))
    temperature = torch.tensor(value, device=DEVICE)
    assert contrastive_loss(audio, video, temperature, True, backend=backend).loss.isnan()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("audio", "video", "group"), [(6, 6, None), (6, 6, 3), (4, 6, None), (6, 4, None)]
)
def test_the_reference_passes_gradcheck(audio, video, group, bidirectional: bool) -> None:
    inputs = [x.requires_grad_() for x in (*pairs(audio, video, 3), normal(1)[0].abs() + 0.3)]
    assert torch.autograd.gradcheck(
        lambda a, v, t: contrastive_loss(a, v, t, bidirectional, group, backend="torch").loss,
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_two_runs_give_the_same_bits(dtype) -> None:
    audio, video = (x.to(dtype) for x in pairs(150, 150, 24))
    check_repeats(
        lambda backend, a, v: contrastive_loss(a, v, 0.05, True, backend=backend).loss,
        [audio, video],
    )


@pytest.mark.parametrize(
    ("audio", "video", "options", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), {}, r"audio has shape \(2, 3, 4\)"),
        (torch.zeros(2, 4), torch.zeros(0, 4), {}, r"video has shape \(0, 4\)"),
        (torch.zeros(2, 4), torch.zeros(2, 5), {}, r"video has width 5 and audio 4"),
        (torch.zeros(2, 4), torch.zeros(2, 4).half(), {}, r"video is torch.float16 and audio"),
        (torch.zeros(2, 4), torch.zeros(2, 4, device="meta"), {}, r"video is on meta"),
        (torch.ones(2, 4).int(), torch.ones(2, 4).int(), {}, r"use one float dtype"),
        (torch.zeros(2, 4), torch.zeros(2, 4), {"temperature": 0.0}, r"temperature is 0.0"),
        (
            torch.zeros(2, 4),
            torch.zeros(2, 4),
            {"temperature": float("nan")},
            r"temperature is nan",
        ),
        (
            torch.zeros(2, 4),
            torch.zeros(2, 4),
            {"temperature": torch.ones((), device="meta")},
            r"temperature has shape \(\) on meta",
        ),
        (
            torch.zeros(2, 4),
            torch.zeros(2, 4),
            {"temperature": torch.ones(2)},
            r"temperature has shape \(2,\)",
        ),
        (torch.zeros(12, 4), torch.zeros(12, 4), {"group_size": 5}, r"group_size is 5.*12 pairs"),
        (torch.zeros(4, 4), torch.zeros(4, 4), {"group_size": 0}, r"group_size is 0"),
        (torch.zeros(4, 4), torch.zeros(2, 4), {"group_size": 2}, r"video has 2 embeddings"),
        (torch.zeros(4, 4), torch.zeros(4, 4), {"row_offset": 1}, r"row_offset is 1; .* 0 to 0"),
        (torch.zeros(4, 4), torch.zeros(2, 4), {"row_offset": -1}, r"row_offset is -1"),
        (torch.zeros(4, 4), torch.zeros(2, 4), {"row_offset": 3}, r"row_offset is 3; .* 0 to 2"),
    ],
)
def test_bad_input_is_named(audio, video, options: dict, message: str) -> None:
    options = {"temperature": 0.05, "bidirectional": True} | options
    with pytest.raises(ValueError, match=message):
        contrastive_loss(audio, video, **options)


def test_the_kernel_refuses_what_is_wider_than_its_tiles() -> None:
    x = torch.zeros(2, 2049, device=DEVICE)
    with pytest.raises(ValueError, match=r"audio has width 2049; .* up to 2048"):
        contrastive_loss(x, x, 0.05, True, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [512, 4096])
def test_published_width_at_large_batches(batch: int) -> None:
    audio, video = (x.bfloat16() for x in pairs(batch, batch, 768))

    def loss(backend, a, v) -> torch.Tensor:
        return contrastive_loss(a, v, 0.05, True, backend=backend).loss

    for ours, theirs in zip(
        results(loss, "triton", [audio, video]), results(loss, "torch", [audio, video]), strict=True
    ):
        assert error(ours, theirs.double()) < TOLERANCE[torch.bfloat16]
