"""`cavmae bench nvdec` says what is absent and how to have it."""

import json
from pathlib import Path

import torch

from cavmae.benchmarks.gpu.nvdec import main


def test_record_and_exit_code_say_whether_video_decodes_here(tmp_path: Path) -> None:
    code = main(["--out", str(tmp_path)])
    (path,) = tmp_path.glob("nvdec-*.json")
    results = json.loads(path.read_text())["results"]
    assert code == (0 if results["ready"] else 1)
    assert [probe["name"] for probe in results["probes"]] == [
        "GPU",
        "libcuda.so.1",
        "libnvcuvid.so.1",
        "DALI",
    ]
    assert (results["probes"][0]["state"] == "ok") == torch.cuda.is_available()
