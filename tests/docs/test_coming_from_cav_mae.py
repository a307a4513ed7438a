"""Whoever comes from the published code finds each flag once, and what took its place exists."""

import re
from pathlib import Path

from fields_page import fields

PAGE = (Path(__file__).resolve().parents[2] / "docs/start/coming-from-cav-mae.md").read_text()
ROWS = re.findall(r"^\| `(--[\w-]+)` \| ([^|]*) \|", PAGE, flags=re.MULTILINE)

# Of run_cavmae_pretrain.py and run_cavmae_ft.py, as far as they are published.
BOTH = """
    data-train data-val data-eval label-csv n_class model dataset dataset_mean dataset_std
    target_length noise exp-dir lr optim batch-size num-workers n-epochs lr_patience lr_adapt
    metrics warmup lrscheduler_start lrscheduler_step lrscheduler_decay n-print-steps save_model
    mixup bal weight_file pretrain_path
"""
PRETRAINING = """
    cont_model norm_pix_loss contrast_loss_weight mae_loss_weight tr_pos masking_ratio mask_mode
"""
FINE_TUNING = """
    loss freqm timem wa wa_start wa_end label_smooth ftmode head_lr freeze_base skip_frame_agg
"""


def test_every_published_flag_has_one_row() -> None:
    published = (BOTH + PRETRAINING + FINE_TUNING).split()
    assert sorted(flag for flag, _ in ROWS) == sorted(f"--{flag}" for flag in published)


def test_what_took_its_place_is_a_field() -> None:
    known = {field.path for field in fields()}
    named = {name for _, here in ROWS for name in re.findall(r"`([^`]+)`", here)}
    assert named <= known


def test_a_flag_without_a_place_says_none() -> None:
    assert [flag for flag, here in ROWS if "`" not in here and here != "none"] == []
