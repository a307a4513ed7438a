"""The model beyond the published numbers: other sizes, losses left out, inputs that do not fit."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from cavmae.kernels import mask_ids_from_shuffle
from cavmae.trainer.config.configs import EngineConfig
from cavmae.trainer.model.blocks import Block, Modality, Recompute
from cavmae.trainer.model.cavmae import CAVMAE, PretrainOutput
from cavmae.trainer.model.config import MaskConfig, ModelConfig
from cavmae.trainer.model.masking import masks_of, random_masks
from cavmae.trainer.tasks.build_model import configure_blocks

SMALL = ModelConfig(
    audio_frames=48,
    mel_bins=32,
    image_size=32,
    width=32,
    modality_depth=1,
    heads=2,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
)
CROSS = replace(SMALL, decoder="cross", decoder_depth=2, decoded_share=0.5)
DECODERS = pytest.mark.parametrize("sizes", [SMALL, CROSS], ids=["self", "cross"])


def small_model(sizes: ModelConfig = SMALL) -> CAVMAE:
    torch.manual_seed(0)
    return CAVMAE(sizes)


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 48, 32, generator=generator),
        torch.randn(batch, 3, 32, 32, generator=generator),
    )


def forward(model: CAVMAE, batch: int = 3, **options: bool) -> PretrainOutput:
    masks = random_masks(model.config, MaskConfig(0.5, 0.25), torch.arange(batch), seed=0)
    return model(*inputs(batch), *masks, **options)


def used_parameters(model: CAVMAE, output: PretrainOutput) -> set[str]:
    losses = [
        tensor.sum()
        for tensor in (
            output.audio_embedding,
            output.video_embedding,
            output.reconstruction_audio,
            output.reconstruction_video,
        )
        if tensor is not None
    ]
    torch.stack(losses).sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@DECODERS
@pytest.mark.parametrize(
    ("reconstruct", "contrast"), [(True, True), (True, False), (False, True)], ids=str
)
def test_frozen_parameters_are_exactly_those_without_gradient(
    reconstruct: bool, contrast: bool, sizes: ModelConfig
) -> None:
    model = small_model(sizes)
    frozen = set(model.freeze_unused(reconstruct=reconstruct, contrast=contrast))
    positions = {name for name, _ in model.named_parameters() if "pos_embed" in name}
    output = forward(model, reconstruct=reconstruct, contrast=contrast)
    every = {name for name, _ in model.named_parameters()}
    assert used_parameters(model, output) == every - frozen - positions


def forward_one(model: CAVMAE, modality: Modality, **options: bool) -> PretrainOutput:
    """A pass without the other modality."""
    log_mel, frame = inputs()
    masks = masks_of((modality,), model.config, MaskConfig(0.5, 0.25), torch.arange(3), seed=0)
    given = (log_mel, None) if modality == "audio" else (None, frame)
    return model(*given, *masks, **options)


@pytest.mark.parametrize("modality", ["audio", "video"])
@pytest.mark.parametrize(
    "sizes", [SMALL, replace(SMALL, joint_depth=2), CROSS], ids=["1 joint", "2 joint", "cross"]
)
def test_a_model_of_one_modality_uses_what_is_not_frozen_and_nothing_else(
    modality: Modality, sizes: ModelConfig
) -> None:
    model = small_model(sizes)
    frozen = set(model.freeze_unused(reconstruct=True, contrast=False, modalities=(modality,)))
    ran: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    output = forward_one(model, modality, contrast=False)
    positions = {name for name, _ in model.named_parameters() if "pos_embed" in name}
    every = {name for name, _ in model.named_parameters()}
    assert used_parameters(model, output) == every - frozen - positions
    other = "_v" if modality == "audio" else "_a"
    assert not any(name.split(".")[0].endswith(other) for name in ran)
    assert list(output.reconstructions) == [modality]


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_one_modality_is_reconstructed_from_the_tokens_that_it_is_embedded_by(
    modality: Modality,
) -> None:
    model = small_model()
    for parameter in model.parameters():  # the norms of the streams begin alike
        torch.nn.init.normal_(parameter, std=0.1)
    output = forward_one(model, modality)
    tokens = output.audio_tokens if modality == "audio" else output.video_tokens
    assert output.latent is not None and tokens is not None
    assert torch.equal(output.latent, tokens)
    of_both = forward(model)
    for name in ("tokens", "embedding"):
        one, both = (getattr(made, f"{modality}_{name}") for made in (output, of_both))
        torch.testing.assert_close(one, both)


def test_a_model_that_is_given_nothing_is_told() -> None:
    with pytest.raises(ValueError, match="log_mel and frame, or their masks, are None"):
        small_model()(None, None, None, None)


def test_losses_that_are_left_out_are_not_computed() -> None:
    assert forward(small_model(), contrast=False).audio_embedding is None
    output = forward(small_model(), reconstruct=False)
    assert output.reconstruction_audio is None and output.latent is None


def test_unmasked_embeddings_are_those_of_a_mask_that_keeps_everything() -> None:
    model = small_model()
    log_mel, frame = inputs()
    audio, video = (
        mask_ids_from_shuffle(torch.arange(tokens).expand(3, -1), 0.0)
        for tokens in (SMALL.audio_tokens, SMALL.video_tokens)
    )
    output = model(log_mel, frame, audio, video, reconstruct=False)
    assert output.audio_embedding is not None and output.video_embedding is not None
    torch.testing.assert_close(model.embed_audio(log_mel), output.audio_embedding)
    torch.testing.assert_close(model.embed_video(frame), output.video_embedding)


def test_the_order_of_kept_patches_does_not_change_embeddings() -> None:
    model = small_model()
    log_mel, frame = inputs()
    shuffle = torch.randperm(SMALL.video_tokens).expand(3, -1)
    plain = torch.arange(SMALL.video_tokens).expand(3, -1)
    audio = mask_ids_from_shuffle(torch.arange(SMALL.audio_tokens).expand(3, -1), 0.0)
    one, other = (
        model(log_mel, frame, audio, mask_ids_from_shuffle(ids, 0.0), reconstruct=False)
        for ids in (shuffle, plain)
    )
    torch.testing.assert_close(one.video_embedding, other.video_embedding)


@pytest.mark.parametrize(
    ("log_mel", "frame", "message"),
    [
        ((3, 64, 32), (3, 3, 32, 32), r"log_mel has shape \(3, 64, 32\).*model.audio_frames"),
        ((3, 48, 32), (3, 3, 48, 48), r"frame has shape \(3, 3, 48, 48\).*model.image_size"),
    ],
)
def test_inputs_of_another_size_are_refused(log_mel, frame, message: str) -> None:
    model = small_model()
    masks = random_masks(SMALL, MaskConfig(0.5, 0.5), torch.arange(3), seed=0)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(log_mel), torch.zeros(frame), *masks)


def test_single_streams_pass_the_last_joint_block_alone_and_the_joint_one_all() -> None:
    torch.manual_seed(0)
    model = CAVMAE(replace(SMALL, joint_depth=2))
    before = forward(model)._asdict()
    torch.nn.init.normal_(model.blocks_u.get_parameter("0.mlp.fc2.bias"))
    first_changed = forward(model)._asdict()
    torch.nn.init.normal_(model.blocks_u.get_parameter("1.mlp.fc2.bias"))
    last_changed = forward(model)._asdict()
    for name in ("audio_embedding", "video_embedding"):
        assert torch.equal(first_changed[name], before[name])
        assert not torch.allclose(last_changed[name], before[name])
    assert not torch.allclose(first_changed["latent"], before["latent"])
    assert not torch.allclose(last_changed["latent"], first_changed["latent"])


@DECODERS
def test_learnable_positions_get_gradients(sizes: ModelConfig) -> None:
    model = small_model(replace(sizes, learnable_positions=True))
    assert {"pos_embed_a", "decoder_pos_embed_v"} <= used_parameters(model, forward(model))


@DECODERS
def test_the_fields_of_the_engine_reach_every_block(sizes: ModelConfig) -> None:
    def found(engine: EngineConfig) -> list[tuple[set[object], set[object], bool]]:
        """Of each block: how it attends, what its MLP keeps and whether it is compiled."""
        configure_blocks(model := small_model(sizes), engine)
        return [
            (
                {one.backend for one in block.modules() if hasattr(one, "backend")},
                {one.keep for one in block.modules() if hasattr(one, "keep")},
                block._compiled_call_impl is not None,
            )
            for block in (*model.blocks_a, *model.blocks_v, *model.blocks_u, *model.decoder_blocks)
        ]

    chosen = EngineConfig(attention="sdpa", activation_checkpointing="none", compile=True)
    assert found(chosen) == [({"sdpa"}, {True}, True)] * (3 + sizes.decoder_depth)
    assert found(EngineConfig()) == [({None}, {False}, False)] * (3 + sizes.decoder_depth)


def test_a_block_that_is_asked_for_some_tokens_gives_those_of_all() -> None:
    torch.manual_seed(0)
    block = Block(16, 2)
    x = torch.randn(3, 9, 16)
    query_ids = torch.stack([torch.randperm(9)[:4] for _ in range(3)])
    every = block(x)
    some = block(x, query_ids=query_ids)
    torch.testing.assert_close(some, every.gather(1, query_ids[:, :, None].expand(-1, -1, 16)))


@DECODERS
def test_losses_and_gradients_are_those_of_predicting_every_patch(sizes: ModelConfig) -> None:
    some, every = small_model(sizes), small_model(sizes)
    used_parameters(some, forward(some))
    used_parameters(every, forward(every, predict_all=True))
    for (name, one), other in zip(some.named_parameters(), every.parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None, name
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@DECODERS
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputed_blocks_give_the_same_losses_and_gradients(
    how: Recompute, sizes: ModelConfig
) -> None:
    kept, recomputed = small_model(sizes), small_model(sizes)
    recomputed.recompute_blocks(how)
    assert used_parameters(kept, forward(kept)) == used_parameters(recomputed, forward(recomputed))
    for (name, ours), theirs in zip(recomputed.named_parameters(), kept.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None and torch.equal(ours.grad, theirs.grad), name


@DECODERS
@pytest.mark.parametrize(("how", "share"), [("selective", 0.85), ("full", 0.7)])
def test_recomputed_blocks_keep_a_fraction_of_the_activations(
    how: Recompute, share: float, sizes: ModelConfig
) -> None:
    kept, recomputed = small_model(sizes), small_model(sizes)
    recomputed.recompute_blocks(how)
    stored = []
    for model in (kept, recomputed):
        held: dict[int, int] = {}

        def note(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = forward(model)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        stored.append(sum(size for place, size in held.items() if place not in weights))
        del output
    assert stored[1] < share * stored[0], stored


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without generating C++, which takes nearly all of the time: the graphs, the gradients
    and what is compiled anew are the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        pytest.param("none", SMALL, marks=pytest.mark.long),
        ("selective", SMALL),
        ("full", SMALL),
        ("full", CROSS),
    ],
    ids=["none", "selective", "full", "full-cross"],
)
def test_compiled_blocks_give_the_same_losses_and_gradients_without_a_break(
    how: Recompute, sizes: ModelConfig, request: pytest.FixtureRequest
) -> None:
    if how != "selective":
        request.getfixturevalue("without_code")
    eager, compiled = small_model(sizes), small_model(sizes)
    compiled.recompute_blocks(how)
    compiled.compile_blocks()
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    outputs = forward(compiled), forward(eager)
    for ours, theirs in zip(*outputs, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    used = [used_parameters(*pair) for pair in zip((compiled, eager), outputs, strict=True)]
    assert used[0] == used[1]
    for (name, one), other in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None, name
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch._dynamo.utils.counters["graph_break"]
    versions = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    used_parameters(compiled, forward(compiled))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == versions


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
def test_scoring_between_steps_does_not_send_blocks_back_to_running_uncompiled() -> None:
    model = small_model()
    model.compile_blocks()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for batch in (3, 4, 2):
        forward(model, batch)
        with torch.no_grad():
            forward(model, batch, predict_all=True)
            for kept in (inputs(batch)[0], inputs(batch)[0][:1]):
                model.embed_audio(kept)
    graphs = counters["stats"]["unique_graphs"]
    for batch in (3, 4, 2):
        forward(model, batch)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["unimplemented"] and not counters["recompile_limit"]
    assert counters["frames"]["total"] == counters["frames"]["ok"]


@DECODERS
def test_patches_are_predicted_without_losses_as_they_are_with_them(sizes: ModelConfig) -> None:
    model = small_model(sizes)
    masks = random_masks(SMALL, MaskConfig(0.5, 0.25), torch.arange(3), seed=0)
    with_losses = forward(model, predict_all=True)
    predicted_audio, predicted_video = model.predict_patches(*inputs(), *masks)
    torch.testing.assert_close(predicted_audio, with_losses.predicted_audio)
    torch.testing.assert_close(predicted_video, with_losses.predicted_video)


@DECODERS
@pytest.mark.parametrize("absent", ["sound", "frame"])
def test_a_modality_that_is_removed_whole_does_not_change_a_prediction(
    absent: str, sizes: ModelConfig
) -> None:
    model = small_model(sizes)
    log_mel, frame = inputs()
    ratios = (1.0, 0.0) if absent == "sound" else (0.0, 1.0)
    masks = [
        mask_ids_from_shuffle(torch.arange(tokens).expand(3, -1), ratio)
        for tokens, ratio in zip((SMALL.audio_tokens, SMALL.video_tokens), ratios, strict=True)
    ]
    before = model.predict_patches(log_mel, frame, *masks)
    (log_mel if absent == "sound" else frame).normal_()
    after = model.predict_patches(log_mel, frame, *masks)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    (frame if absent == "sound" else log_mel).normal_()
    changed = model.predict_patches(log_mel, frame, *masks)
    assert not any(torch.equal(*pair) for pair in zip(before, changed, strict=True))


@pytest.mark.parametrize("trained", [False, True])
def test_a_block_compiles_whole_where_nothing_needs_gradients(trained: bool) -> None:
    """Dynamo passes arguments of autograd functions by their number there."""
    block = Block(32, 4).requires_grad_(trained)
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
    x = torch.randn(2, 6, 32)
    with torch.set_grad_enabled(not trained):
        for segments in (None, {"audio": 2, "video": 1, "joint": 3}):
            assert torch.equal(compiled(x, segments), block(x, segments))
