"""An impossible field is refused with its name, its value and what to use instead."""

from pathlib import Path

import pytest

from cavmae.dataloaders.config import Augmentation, DataConfig
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.configs import (
    ClassifierConfig,
    EngineConfig,
    FinetuneConfig,
    LossConfig,
    PretrainConfig,
    ValidationConfig,
)
from cavmae.trainer.config.parse import parse
from cavmae.trainer.config.recipes import PRETRAIN_RECIPES, RECIPES
from cavmae.trainer.config.resolve import check_same_run, native_dtype, resolve, with_real_places
from cavmae.trainer.model.config import MaskConfig, ModelConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(audio_frames=1000), r"audio_frames is 1000.* such as 992"),
        (lambda: ModelConfig(width=100), r"model.width is 100, which 12 heads do not divide"),
        (lambda: ModelConfig(joint_depth=0), r"model.joint_depth is 0; use 1 or more"),
        (lambda: MaskConfig(audio_ratio=1.0), r"mask.audio_ratio is 1.0"),
        (lambda: LossConfig(0, 0), r"both loss weights are 0"),
        (lambda: LossConfig(temperature=0), r"loss.temperature is 0"),
        (lambda: EngineConfig(compile=True, zero_stage=3), r"engine.compile.*zero_stage is 3"),
        (lambda: EngineConfig(offload_optimizer=True, zero_stage=0), r"engine.zero_stage is 0"),
        (lambda: ValidationConfig(every_steps=0), r"validation.every_steps is 0"),
        (lambda: ClassifierConfig(label_smoothing=1.0), r"classifier.label_smoothing is 1.0"),
        (lambda: ClassifierConfig(label_smoothing=-0.1), r"label_smoothing is -0.1; use 0"),
        (lambda: PretrainConfig(lanes=7), r"lanes is 7.*global_batch 48"),
        (lambda: PretrainConfig(loss=LossConfig(contrastive_group=7)), r"contrastive_group is 7"),
    ],
)
def test_an_impossible_field_is_named_with_its_value(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_takes_overrides(name: str) -> None:
    words = [name, "--seed", "3", "--data.train", "shards/frames"]
    config = parse(words, [PretrainConfig, FinetuneConfig], "cavmae")
    assert (config.seed, config.data.train) == (3, "shards/frames")
    assert config.model == RECIPES[name]().model


@pytest.mark.parametrize(("name", "group"), [("paper_audioset", 12), ("paper_vggsound", 30)])
def test_published_groups_do_not_make_micro_batches_small(name: str, group: int) -> None:
    config = PRETRAIN_RECIPES[name]()
    assert config.loss.contrastive_group == group
    assert config.micro_batch == config.global_batch == 4 * group


def test_an_unknown_recipe_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'dmo' is no recipe; use one of demo, paper_audioset"):
        parse(["dmo"], [PretrainConfig], "cavmae pretrain")


def test_a_recipe_of_the_other_kind_is_sent_to_its_command() -> None:
    with pytest.raises(ValueError, match="vggsound is for `cavmae finetune`"):
        parse(["vggsound"], [PretrainConfig], "cavmae pretrain")


def test_help_explains_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["demo", "--help"], [PretrainConfig], "cavmae pretrain")
    text = capsys.readouterr().out
    for field in ("--global-batch", "--loss.temperature", "--engine.zero-stage", "--data.train"):
        assert field in text
    assert "(default: 0.05)" in text


def test_open_fields_are_resolved_once() -> None:
    config = PretrainConfig(epochs=2, global_batch=48, micro_batch=10)
    done = resolve(config, world_size=2, samples=480, threads=3)
    assert (done.lanes, done.steps, done.micro_batch, done.threads_per_rank) == (48, 20, 8, 3)
    assert resolve(config, world_size=5, samples=480, threads=3).micro_batch == 10
    again = resolve(done, world_size=2, samples=480, threads=3)
    assert again == done


@pytest.mark.field
def test_paths_of_sets_are_those_of_the_folders_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set/frames").mkdir(parents=True)
    (tmp_path / "a,b/frames").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "set/frames")
    (tmp_path / "comma").symlink_to(tmp_path / "a,b")
    monkeypatch.chdir(tmp_path)
    data = DataConfig(train="link, s3://bucket/set,comma/frames", validation="set/../link")
    done = with_real_places(PretrainConfig(data=data, initial_weights="set/../weights.pt"))
    assert done.data.train_folders == [
        *(str(tmp_path / "set/frames"), "s3://bucket/set", "comma/frames")
    ]
    assert done.data.validation == str(tmp_path / "set/frames")
    assert done.initial_weights == str(tmp_path / "weights.pt")
    assert with_real_places(PretrainConfig()) == PretrainConfig()


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx2 fma", "fp32"), ("avx512f avx512_bf16", "bf16"), ("amx_tile amx_bf16", "bf16")],
)
def test_bf16_is_chosen_where_the_processor_multiplies_it(
    flags: str, dtype: str, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: some\nflags\t\t: {flags}\n")
    assert native_dtype(gpu=False, cpuinfo=tmp_path / "cpuinfo") == dtype
    assert native_dtype(gpu=True, cpuinfo=tmp_path / "cpuinfo") == "bf16"


def test_more_ranks_than_samples_in_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match=r"49 ranks and global_batch is 48; use 1 to 48 ranks"):
        resolve(PretrainConfig(), world_size=49, samples=1000, threads=1)


def test_a_run_that_resumes_may_change_its_length_but_not_what_it_computes() -> None:
    before = PretrainConfig(steps=10)
    check_same_run(before, PretrainConfig(steps=20))
    with pytest.raises(ValueError, match=r"loss.temperature 0.05 and cannot resume with 0.1"):
        check_same_run(before, PretrainConfig(loss=LossConfig(temperature=0.1)))
    flipped = PretrainConfig(data=DataConfig(augmentation=Augmentation(flip=True)))
    with pytest.raises(ValueError, match=r"data.augmentation.flip False and cannot resume with Tr"):
        check_same_run(before, flipped)


def test_a_fine_tuning_run_that_resumes_may_name_its_label_file_by_another_path() -> None:
    before = FinetuneConfig(classifier=ClassifierConfig(labels="a.csv"))
    check_same_run(before, FinetuneConfig(classifier=ClassifierConfig(labels="b.csv")))
    with pytest.raises(
        ValueError, match=r"classifier.loss bce and cannot resume with cross_entrop"
    ):
        check_same_run(before, FinetuneConfig(classifier=ClassifierConfig(loss="cross_entropy")))


@pytest.mark.field
def test_a_folder_whose_own_name_has_a_comma_is_one_set(tmp_path: Path) -> None:
    folder = tmp_path / "S, 2024"
    assert DataConfig(train=str(folder)).train_folders == [f"{tmp_path}/S", "2024"]
    folder.mkdir()
    assert DataConfig(train=str(folder)).train_folders == [str(folder)]
    with pytest.raises(FileNotFoundError, match=r"commas separate sets, here \['a', 'b'\]"):
        ShardSet(DataConfig(train="a, b").train_folders)
