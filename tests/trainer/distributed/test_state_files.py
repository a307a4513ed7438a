"""A snapshot with code in it is refused, whoever reads it, and its code does not run."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks
from unsafe_pickle import save_malicious

from cavmae.trainer.distributed.state_files import read_state_file

CASES = [
    *({"zero_stage": stage, "global_batch": 2} for stage in range(4)),
    {"zero_stage": 1, "global_batch": 2, "dtype": "bf16"},
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    script = Path(__file__).with_name("state_file_ranks.py")
    return run_ranks(script, 1, CASES, tmp_path_factory.mktemp("snapshots"))


@pytest.mark.slow
def test_snapshots_of_every_stage_hold_nothing_else_than_what_is_allowed(outcomes) -> None:
    intact = [(way, said) for way, name, said, _ in outcomes if name == "intact"]
    assert len(intact) == 2 * len(CASES) - 1 and {said for _, said in intact} == {"read"}


@pytest.mark.slow
def test_code_in_any_file_of_any_stage_is_refused_and_does_not_run(outcomes) -> None:
    spoilt = [one for one in outcomes if one[1] != "intact"]
    assert {way for way, *_ in spoilt} == {"loaded", "converted"}
    assert len(spoilt) == 1 + 4 * 2 * 2, "one file at stage 0, two at the others, read in two ways"
    for way, name, said, marker in spoilt:
        assert name in said and "posix.mkdir" in said and "\n" not in said, (way, name, said)
        assert not Path(marker).exists(), (way, name)


def test_the_file_of_these_tests_does_run_code_where_pickles_are_read(tmp_path: Path) -> None:
    marker = save_malicious(tmp_path / "state.pt", tmp_path)
    with pytest.raises(ValueError, match=r"state\.pt holds posix\.mkdir"):
        read_state_file(tmp_path / "state.pt")
    assert not marker.exists()
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert marker.exists()


class _Calls:
    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.name!r})",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_neither_a_format_nor_a_setting_makes_the_reader_run_code(
    zipped: bool, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protocol 4 names functions by another opcode, and the variable is a widespread remedy for
    what weights_only refuses."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, marker = tmp_path / "state.pt", tmp_path / "code_ran"
    torch.save(
        {"extra": _Calls(str(marker))},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match=r"state\.pt holds .*, which is no part of a checkpoint"):
        read_state_file(path)
    path.write_bytes(pickle.dumps(_Calls(str(marker)), protocol))
    with pytest.raises(ValueError, match=r"state\.pt holds .*, which is no part of a checkpoint"):
        read_state_file(path)
    assert not marker.exists()
