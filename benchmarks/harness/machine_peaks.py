"""Peak rates of a machine, measured: a copy, and matrix products of the model's shapes.

A share of these shows how far a step is from the limit of its machine, a share of the datasheet how
far the machine is from its specification.
"""

from dataclasses import asdict
from typing import Any, Literal

import torch

from cavmae.benchmarks.harness.timing import ceilings, median_seconds
from cavmae.trainer.cost_model.gpus import find_gpu
from cavmae.trainer.model.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_REPEATS = 5


def measure_rates(
    device: torch.device, dtype: Literal["fp32", "bf16"], config: ModelConfig, batch: int
) -> dict[str, Any]:
    """Measure the rates of the machine in one dtype, for a record.

    Args:
        device: device to measure.
        dtype: dtype of the matrices; TF32 stays as the process has it.
        config, batch: sizes of the products that are measured beside a square one.

    Returns:
        `bytes_per_second` of a copy, read and written; `flops_per_second` of the fastest product,
        the base of all shares; `products`: the rate of each; `datasheet`: as specified, or None.
    """
    ceiling = ceilings(device, DTYPES[dtype])
    products = {"square": ceiling["flops_per_second"]}
    kept = int(config.audio_tokens * 0.25) + int(config.video_tokens * 0.25)
    layers = {
        "encoder": (batch * kept, config.width),
        "decoder": (batch * (config.audio_tokens + config.video_tokens), config.decoder_width),
    }
    for name, (rows, width) in layers.items():
        tokens = torch.randn(rows, width, device=device, dtype=DTYPES[dtype])
        weight = torch.randn(4 * width, width, device=device, dtype=DTYPES[dtype])
        seconds = median_seconds(
            lambda tokens=tokens, weight=weight: torch.nn.functional.linear(tokens, weight),
            device,
            _REPEATS,
        )
        products[f"{name} mlp"] = 2 * rows * width * 4 * width / seconds
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    stated = find_gpu(gpu)
    return {
        "bytes_per_second": ceiling["bytes_per_second"],
        "flops_per_second": max(products.values()),
        "products": {name: {"flops_per_second": rate} for name, rate in products.items()},
        "datasheet": stated and asdict(stated),
    }


def utilization(flops_per_second: float, rates: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Compute shares of the matrix rate, for a record.

    Args:
        flops_per_second: rate of the arithmetic that the losses need.
        rates: from `measure_rates`.
        dtype: dtype of the rates.

    Returns:
        `mfu`: share of the fastest product measured; `mfu_of_datasheet`: None without a datasheet.
    """
    stated = rates["datasheet"]
    return {
        "mfu": flops_per_second / rates["flops_per_second"],
        "mfu_of_datasheet": flops_per_second / stated[dtype] if stated else None,
    }
