"""Golden comparisons run on a folder of other sizes, seeds, ratios, depths and lengths.

The folder is written by the speed baseline, which is a second implementation of the published
operations and is itself held to the published numbers.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cavmae.benchmarks.baselines.published import PublishedCAVMAE
from cavmae.benchmarks.conformance.cases import fill_from_recipe, recipe_inputs
from cavmae.benchmarks.conformance.golden import main
from cavmae.trainer.model.config import ModelConfig

SIZES = ModelConfig(
    audio_frames=512,
    image_size=96,
    width=48,
    modality_depth=3,
    joint_depth=2,
    heads=12,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=16,
)


def check_values(tensor: torch.Tensor) -> dict[str, Any]:
    values = tensor.detach().double().flatten()
    first = [float(value) for value in values[:4]]
    return {"sum": float(values.sum()), "l2": float(values.norm()), "first4": first}


def write_case(folder: Path, seed: int, ratios: tuple[float, float], learnable: bool) -> None:
    sizes = replace(SIZES, learnable_positions=learnable)
    model = PublishedCAVMAE(sizes)
    fill_from_recipe(model, seed)
    audio, image = recipe_inputs(3, sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    shuffles = [
        torch.rand(3, tokens, generator=generator).argsort(1)
        for tokens in (sizes.audio_tokens, sizes.video_tokens)
    ]
    output = model(
        audio,
        image,
        audio_ratio=ratios[0],
        video_ratio=ratios[1],
        reconstruction_weight=2.0,
        contrastive_weight=0.5,
        shuffles=(shuffles[0], shuffles[1]),
    )
    output.loss.backward()
    scalars = {
        "loss": output.loss,
        "loss_mae_a": output.reconstruction_audio,
        "loss_mae_v": output.reconstruction_video,
        "loss_c": 0.5 * output.contrast,
        "c_acc": output.accuracy,
    }
    files = {
        "latent_s16": output.latent[:, ::16, ::16],
        "ca_mean": output.audio_tokens.mean(1),
        "pred_v_s16": output.predicted_video[:, ::16, ::16],
    }
    arrays = {key: tensor.detach().numpy() for key, tensor in files.items()}
    for letter, ids, ratio in zip("av", shuffles, ratios, strict=True):
        restore = ids.argsort(1).numpy()
        kept = int(ids.shape[1] * (1 - ratio))
        arrays[f"ids_shuffle_{letter}"] = ids.numpy().astype(np.int16)
        arrays[f"ids_restore_{letter}"] = restore.astype(np.int16)
        arrays[f"mask_{letter}"] = (restore >= kept).astype(np.uint8)
    gradients: dict[str, dict[str, Any] | None] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            gradients[name] = None
            continue
        values = check_values(parameter.grad)
        if name.endswith("qkv.bias"):
            norms = [float(part.norm()) for part in parameter.grad.chunk(3)]
            values |= dict(zip(("l2_q", "l2_k", "l2_v"), norms, strict=True))
        gradients[name] = values
    name = f"seed{seed}_other"
    entry = {
        "name": "other",
        "seed": seed,
        "batch": 3,
        "audio_length": sizes.audio_frames,
        "input_scale": 1.0,
        "pos": "sincos",
        "tr_pos": learnable,
        "norm_pix_loss": True,
        "mask_mode": "unstructured",
        "mask_ratio_a": ratios[0],
        "mask_ratio_v": ratios[1],
        "mae_loss_weight": 2.0,
        "contrast_loss_weight": 0.5,
        "file": f"pretrain_forward/{name}.npz",
        "grad_file": f"pretrain_forward/{name}_grad.json",
        "scalars": {key: float(value.detach()) for key, value in scalars.items()},
        "input_check": {"audio": check_values(audio), "image": check_values(image)},
    }
    np.savez(folder / entry["file"], **arrays)
    (folder / entry["grad_file"]).write_text(json.dumps(gradients))
    state = model.state_dict()
    weights = {
        "seed": seed,
        "pos": "sincos",
        "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
        "parameter_checks": {"mask_token": check_values(state["mask_token"])},
    }
    weights_file = f"weights_seed{seed}_T{sizes.audio_frames}_sincos_check.json"
    (folder / "pretrain_forward" / weights_file).write_text(json.dumps(weights))
    index = folder / "pretrain_forward" / "index.json"
    entries = json.loads(index.read_text()) if index.exists() else []
    index.write_text(json.dumps([*entries, entry]))


@pytest.mark.slow
def test_sizes_seeds_and_ratios_come_from_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pretrain_forward").mkdir()
    write_case(tmp_path, seed=11, ratios=(0.65, 0.85), learnable=False)
    write_case(tmp_path, seed=12, ratios=(0.9, 0.4), learnable=True)
    code = main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    passed = {line.split()[0] for line in printed.splitlines() if "  pass  " in line}
    assert passed == {
        *(f"{part}/seed{seed}_other" for part in ("inputs", "forward", "gradients")
          for seed in (11, 12)),
        *(f"weights/weights_seed{seed}_T512_sincos_check" for seed in (11, 12)),
    }  # fmt: skip
