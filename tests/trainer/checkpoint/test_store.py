"""Checkpoints in a folder and at an object store: whole or absent, and never lost from sight."""

import dataclasses
import errno
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from tiny_run import MODEL

from cavmae.benchmarks.harness.object_store import ObjectStore, object_store
from cavmae.trainer.checkpoint import load as load_module
from cavmae.trainer.checkpoint.format import (
    MANIFEST,
    SUSPECT_MANIFEST,
    CorruptCheckpointError,
    RunState,
    attempt_folder,
    check_not_left_behind,
    checkpoint_folder,
    checkpoint_name,
    list_checkpoints,
    read_manifest,
    verify_checkpoint,
    verify_file,
)
from cavmae.trainer.checkpoint.load import files_of_rank, load_newest
from cavmae.trainer.checkpoint.save import CheckpointSaver
from cavmae.trainer.checkpoint.store import Store, check_writable
from cavmae.trainer.config.configs import CheckpointConfig, EngineConfig, PretrainConfig
from cavmae.trainer.distributed.engine import Engine
from cavmae.trainer.fault_tolerance.lease import Lease, OwnedError
from cavmae.trainer.run_dir import open_run_dir

WEIGHTS = "state/mp_rank_00_model_states.pt"
MOMENTS = "state/zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # a store that is down is told within seconds
        running.make_bucket("checkpoints")
        yield running


@pytest.fixture(params=["folder", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return request.getfixturevalue("remote") if "object" in request.param else local(tmp_path)


@pytest.fixture
def remote(server: ObjectStore) -> Store:
    return Store(f"s3://checkpoints/{uuid.uuid4().hex}")


def local(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints")


CPU = torch.device("cpu")


def damage(store: Store, name: str) -> None:
    """Change a byte of a file."""
    data = bytearray(store.read(name))
    data[len(data) // 2] ^= 1
    store.put(name, bytes(data))


def remove(store: Store, name: str) -> None:
    store.remove_file(name)


def place(step: int, file: str, attempt: int = 1) -> str:
    """Where a file of a checkpoint is."""
    name = checkpoint_name(step)
    return f"{name if file == MANIFEST else attempt_folder(name, attempt)}/{file}"


# ---------------------------------------------------------------------------------- places


def test_a_store_gives_back_what_it_was_given(store: Store) -> None:
    check_writable(store)
    assert store.folders() == [] and store.files("a") == {} and store.size("a/b") is None
    content = torch.arange(1000)
    written = store.write("a/state/b.pt", lambda file: torch.save(content, file))
    store.put("a/c", b"small")
    assert store.folders() == ["a"]
    assert store.files("a") == {"state/b.pt": written.bytes, "c": 5}
    assert store.size("a/state/b.pt") == written.bytes
    assert b"".join(store.read_blocks("a/state/b.pt", written.bytes)) == store.read("a/state/b.pt")
    for _ in range(2):  # what is gone already is no error
        store.remove_file("a/c")
        assert store.files("a") == {"state/b.pt": written.bytes}
    for _ in range(2):
        store.remove_folder("a")
        assert store.folders() == []


def test_of_several_that_write_the_same_new_file_one_does(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda number: store.put_new("a/b", b"%d" % number), range(8)))
    assert sum(wrote) == 1 and store.read("a/b") == b"%d" % wrote.index(True)
    assert list(store.files("a")) == ["b"]
    assert store.put_new("a/b", store.read("a/b")), "a request that was sent again meets its own"


@pytest.mark.field
def test_a_new_file_is_written_once_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.link", link)
    store = local(tmp_path)
    assert [store.put_new("a/b", data) for data in (b"1", b"2")] == [True, False]
    assert store.read("a/b") == b"1" and list(store.files("a")) == ["b"]


@pytest.mark.field
def test_a_new_file_is_written_once_where_a_store_knows_no_conditions(
    remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipe_file(*_: object, **__: object) -> None:
        raise NotImplementedError("A header you provided implies functionality")

    monkeypatch.setattr(remote._files, "pipe_file", pipe_file)
    assert [remote.put_new("a/b", data) for data in (b"1", b"2")] == [True, False]
    assert remote.read("a/b") == b"1"


def test_a_store_has_one_owner(store: Store) -> None:
    seconds = iter(range(0, 1000, 10))
    with Lease() as first, Lease(lambda: next(seconds), lambda _: None) as second:
        assert first.take({"checkpoint.folder": store}) == 1
        assert second.take({"checkpoint.folder": store}) == 2
        with pytest.raises(OwnedError, match=r"checkpoint.folder .* was taken over by process"):
            first.renew()
    assert list_checkpoints(store) == [] and store.folders() == ["lease"]


def test_what_was_half_written_is_not_at_a_store(remote: Store) -> None:
    def save(file: IO[bytes]) -> None:
        file.write(b"half")
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        remote.write("a/b", save)
    assert remote.files("a") == {}


def test_what_went_wrong_is_told_by_its_name(
    server: ObjectStore, remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save says `unexpected pos 64 vs 0` of a file that failed in its midst."""
    monkeypatch.setattr("cavmae.trainer.checkpoint.store.BLOCK_BYTES", 5 << 20)
    content = torch.zeros(3 << 20)
    server.down(True)
    try:
        with pytest.raises(OSError, match=r"a/b could not be written in 2 tries .*Service Un"):
            remote.write("a/b", lambda file: torch.save(content, file))
    finally:
        server.down(False)
    assert remote.files("a") == {}


def test_what_others_did_at_a_store_is_seen(server: ObjectStore) -> None:
    store = Store("s3://checkpoints/others")
    store.put("a/b", b"12")
    assert store.files("a") == {"b": 2} and store.folders() == ["a"] and store.size("a/c") is None
    server.replace("checkpoints", "others/a/c", b"123")
    server.replace("checkpoints", "others/d/e", b"")
    assert store.files("a") == {"b": 2, "c": 3} and store.folders() == ["a", "d"]
    assert store.size("a/c") == 3


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("gopher://host/runs", "checkpoint.folder: gopher://host/runs cannot be opened"),
        ("pipe:cat", "checkpoint.folder: pipe:cat would run a command"),
        ("s3://nowhere/runs", "s3://nowhere/runs cannot be .*bucket does not exist; create the b"),
    ],
)
def test_a_place_that_cannot_be_is_told_at_once(
    server: ObjectStore, folder: str, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        check_writable(Store(folder))


def test_only_what_has_a_manifest_and_the_right_name_is_a_checkpoint(store: Store) -> None:
    for name in ("step-000000010", "step-1000000000", "step-000000020", "step-000000010-copy"):
        store.put(f"{name}/{MANIFEST}", b"{}")
    store.put("step-000000030/state", b"torn")
    store.remove_file(f"step-000000020/{MANIFEST}")
    store.put("step-000000020/state", b"half removed")
    assert list_checkpoints(store) == ["step-000000010", "step-1000000000"]


def test_a_run_does_not_begin_anew_because_its_checkpoints_are_elsewhere(
    tmp_path: Path, remote: Store
) -> None:
    before = Store(tmp_path / "before")
    for step in (10, 20):
        before.put(f"{checkpoint_name(step)}/{MANIFEST}", b"{}")
    with pytest.raises(ValueError, match=r"before, the newest at step 20, .* which has none; copy"):
        check_not_left_behind(remote, str(before.folder), tmp_path)
    remote.put(f"{checkpoint_name(10)}/{MANIFEST}", b"{}")
    with pytest.raises(ValueError, match=r"the newest at step 20, .* up to step 10; copy them"):
        check_not_left_behind(remote, str(before.folder), tmp_path)
    remote.put(f"{checkpoint_name(20)}/{MANIFEST}", b"{}")
    check_not_left_behind(remote, str(before.folder), tmp_path)
    check_not_left_behind(remote, str(tmp_path / "gone"), tmp_path)
    with pytest.raises(ValueError, match=r"gone .the folder does not exist.*which has none"):
        check_not_left_behind(local(tmp_path), str(tmp_path / "gone"), tmp_path)


def test_a_start_with_another_folder_is_refused_until_the_checkpoints_are_there(
    tmp_path: Path, remote: Store
) -> None:
    run_dir = tmp_path / "run"
    engine = EngineConfig(dtype="fp32")
    first = PretrainConfig(run_dir=str(run_dir), engine=engine)
    moved = dataclasses.replace(first, checkpoint=CheckpointConfig(folder=remote.location()))
    former = Store(checkpoint_folder(first))
    open_run_dir(moved, run_dir, remote, CPU, 1, 0)
    open_run_dir(first, run_dir, former, CPU, 1, 0)  # there was none yet
    former.put(f"{checkpoint_name(10)}/{MANIFEST}", b"{}")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"were written to {run_dir}/checkpoints, the newest"):
            open_run_dir(moved, run_dir, remote, CPU, 1, 0)
    remote.put(f"{checkpoint_name(10)}/{MANIFEST}", b"{}")
    open_run_dir(moved, run_dir, remote, CPU, 1, 0)
    former.remove_folder(checkpoint_name(10))
    with pytest.raises(ValueError, match=f"were written to {remote.location()}, the newest"):
        open_run_dir(first, run_dir, former, CPU, 1, 0)
    with pytest.raises(ValueError, match="they belong to another run; give another folder"):
        open_run_dir(moved, tmp_path / "other", remote, CPU, 1, 0)


def test_a_resume_keeps_the_micro_batch_that_memory_chose(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    engine = EngineConfig(dtype="fp32")
    asked = PretrainConfig(str(run_dir), engine=engine, model=MODEL, global_batch=32, micro_batch=0)
    store = Store(checkpoint_folder(asked))
    chosen = open_run_dir(asked, run_dir, store, CPU, 1, 1 << 40).micro_batch
    assert chosen == 32
    assert open_run_dir(asked, run_dir, store, CPU, 1, 1).micro_batch == 1, "no checkpoint yet"
    open_run_dir(asked, run_dir, store, CPU, 2, 1 << 40)
    store.put(f"{checkpoint_name(10)}/{MANIFEST}", b"{}")
    assert open_run_dir(asked, run_dir, store, CPU, 2, 1).micro_batch == 16
    assert open_run_dir(asked, run_dir, store, CPU, 4, 1 << 40).micro_batch == 8
    assert open_run_dir(asked, run_dir, store, CPU, 1, 1 << 40).micro_batch == 8, "of the last"


# --------------------------------------------------------------------- writing and going on


class OneRank:
    """The part of an engine that a checkpoint needs, with files named as DeepSpeed names them."""

    zero_stage = 1
    dtype = "fp32"

    def __init__(self) -> None:
        self.step = 0

    def snapshot(self) -> dict[str, Any]:
        return {WEIGHTS: {"step": self.step}, MOMENTS: torch.full((1000,), float(self.step))}

    def load(self, folder: Path, *, converted: bool = False) -> None:
        assert not converted
        self.step = torch.load(folder / WEIGHTS)["step"]
        assert torch.load(folder / MOMENTS).unique().tolist() == [self.step]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process; what is copied from a store lies in `tmp_path/scratch`."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    assert list((tmp_path / "scratch").iterdir()) == []


def state_at(step: int) -> RunState:
    return RunState(step, 8 * step, (("clip", "decode"),), "set", 1, 1, "fp32")


def writer_of(
    store: Store,
    start_step: int = 0,
    keep_last: int = 2,
    keep_every: int = 0,
    attempt: int = 1,
    before_commit: Callable[[], None] = lambda: None,
) -> CheckpointSaver:
    config = CheckpointConfig(every_steps=10, keep_last=keep_last, keep_every=keep_every)
    engine = cast(Engine, OneRank())
    return CheckpointSaver(store, config, engine, state_at, start_step, attempt, before_commit)


def save(writer: CheckpointSaver, *steps: int) -> list[bool]:
    done = []
    for step in steps:
        cast(OneRank, writer._engine).step = step
        writer.begin(step)
        done.append(writer.commit())
    return done


def loaded(store: Store) -> int:
    """The step that a start goes on from."""
    engine = OneRank()
    newest = load_newest(store, cast(Engine, engine))
    assert newest is not None
    place, state = newest
    assert place == store.location(checkpoint_name(engine.step)) and state == state_at(engine.step)
    return engine.step


def test_old_ones_go_when_the_new_one_is_there(alone: None, store: Store) -> None:
    assert load_newest(store, cast(Engine, OneRank())) is None
    writer = writer_of(store, keep_last=2, keep_every=30)
    assert save(writer, 10, 20, 30, 40, 50, 60) == [True] * 6
    assert store.folders() == ["step-000000030", "step-000000050", "step-000000060"]
    for name in list_checkpoints(store):
        verify_checkpoint(store, name)
    assert loaded(store) == 60


def test_torn_ones_are_passed_over_and_cleared(alone: None, store: Store) -> None:
    save(writer_of(store), 10, 20)
    store.put(f"step-000000030/{WEIGHTS}", b"killed while it was written")
    store.put("step-000000040-mine/state", b"not ours")
    assert loaded(store) == 20
    writer_of(store, start_step=20)
    assert store.folders() == ["step-000000010", "step-000000020", "step-000000040-mine"]


@pytest.mark.parametrize("spoil", [damage, remove])
@pytest.mark.parametrize("file", [WEIGHTS, MOMENTS, "run_state.json", MANIFEST])
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    alone: None,
    remote: Store,
    caplog: pytest.LogCaptureFixture,
    file: str,
    spoil: Callable[[Store, str], None],
) -> None:
    save(writer_of(remote), 10, 20)
    spoil(remote, place(20, file))
    assert loaded(remote) == 10
    if file != MANIFEST:
        assert f"{remote.location('step-000000020')} is corrupt or incomplete" in caplog.text
        assert file in caplog.text
    writer = writer_of(remote, start_step=10, keep_last=1)
    assert save(writer, 15) == [True]
    aside = [checkpoint_name(20)] if remote.folders()[-1] == checkpoint_name(20) else []
    assert aside or (file, spoil) == (MANIFEST, remove), "only a torn one is gone at once"
    assert remote.folders() == [checkpoint_name(15), *aside]
    assert list_checkpoints(remote) == [checkpoint_name(15)], "it does not count as newest"
    writer = writer_of(remote, start_step=15, keep_last=1)  # the next attempt leaves it as well
    assert remote.folders() == [checkpoint_name(15), *aside]
    assert save(writer, 25) == [True]
    assert remote.folders() == [checkpoint_name(25)], "now there is a newer one"


def test_a_damaged_one_may_be_written_anew(alone: None, store: Store) -> None:
    save(writer_of(store), 10, 20)
    damage(store, place(20, MOMENTS))
    assert loaded(store) == 10
    again = writer_of(store, start_step=10, attempt=2)
    assert save(again, 20) == [True]
    assert loaded(store) == 20
    assert store.folders(checkpoint_name(20)) == ["attempt-2"], "and the damaged one is gone"
    assert store.size(f"{checkpoint_name(20)}/{SUSPECT_MANIFEST}") is None


def test_a_damaged_one_stays_where_writing_it_anew_fails(alone: None, tmp_path: Path) -> None:
    store = local(tmp_path)
    save(writer_of(store), 10, 20)
    damage(store, place(20, MOMENTS))
    again = writer_of(store, start_step=10, attempt=2)
    (tmp_path / "checkpoints" / place(20, WEIGHTS, attempt=2)).mkdir(parents=True)
    assert save(again, 20) == [False]
    assert store.folders(checkpoint_name(20)) == ["attempt-1"]
    assert store.size(f"{checkpoint_name(20)}/{SUSPECT_MANIFEST}")


@pytest.mark.parametrize("file", ["run_state.json", MOMENTS])
def test_one_wrong_read_condemns_no_checkpoint(
    alone: None,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    file: str,
) -> None:
    save(writer_of(store), 10, 20)
    wrong = [place(20, file)]

    def verify(store: Store, name: str, *arguments: Any) -> None:
        if name in wrong:
            wrong.remove(name)
            raise CorruptCheckpointError(f"{name} has changed since it was written")
        verify_file(store, name, *arguments)

    monkeypatch.setattr(load_module, "verify_file", verify)
    assert loaded(store) == 20
    assert "was read wrongly once, and rightly when read again" in caplog.text
    assert file in caplog.text


def test_none_whole_is_an_error(alone: None, store: Store) -> None:
    save(writer_of(store), 10, 20)
    for step in (10, 20):
        damage(store, place(step, MOMENTS))
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* is intact; restore one"):
        loaded(store)


def test_one_of_another_schema_is_not_taken_for_a_damaged_one(alone: None, store: Store) -> None:
    store.put(place(10, MANIFEST), b'{"schema": 1, "files": {"run_state.json": {}}}')
    with pytest.raises(ValueError, match=r"has schema 1, this version reads 2; use the version"):
        loaded(store)
    assert list_checkpoints(store) == [checkpoint_name(10)]


def test_what_an_attempt_that_was_cut_off_sends_late_replaces_nothing(
    alone: None, store: Store
) -> None:
    """Attempt 1 is cut off with a checkpoint half written; attempt 2 saves the same step."""
    checks = iter([lambda: None, owned_by_another])
    late = writer_of(store, before_commit=lambda: next(checks)())
    save(writer_of(store, attempt=2), 20)
    manifest = store.read(place(20, MANIFEST))
    with pytest.raises(OwnedError):  # when it commits, at the second look
        save(late, 20)
    assert store.folders(checkpoint_name(20)) == ["attempt-1", "attempt-2"]
    assert store.read(place(20, MANIFEST)) == manifest
    damage(store, place(20, MOMENTS))
    assert loaded(store) == 20, "only what the manifest names is read"


def owned_by_another() -> None:
    raise OwnedError("taken over")


def test_the_owner_replaces_a_manifest_that_came_late(alone: None, store: Store) -> None:
    owner = writer_of(store, attempt=2)
    save(writer_of(store), 20)
    assert save(owner, 20) == [True]
    assert read_manifest(store, checkpoint_name(20)).attempt == 2 and loaded(store) == 20


def test_what_has_to_come_before_a_checkpoint_may_fail_and_costs_it(
    alone: None, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "epoch-0001.pt")

    writer = writer_of(store, before_commit=full)
    assert save(writer, 10) == [False] and list_checkpoints(store) == []
    assert "ALARM: the checkpoint of step 10 could not be written ([Errno 28] No sp" in caplog.text


def test_a_store_that_is_down_costs_a_checkpoint_and_not_the_run(
    alone: None, server: ObjectStore, remote: Store, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_of(remote)
    save(writer, 10)
    server.down(True)
    try:
        assert save(writer, 20) == [False]
    finally:
        server.down(False)
    assert "ALARM: the checkpoint of step 20 could not be written (rank 0: s3://" in caplog.text
    assert writer.failures == 1 and not writer.is_open
    assert save(writer, 21) == [True]
    assert remote.folders() == ["step-000000010", "step-000000021"]
    assert loaded(remote) == 21


def test_what_cannot_be_removed_is_no_failure_and_is_tried_again(
    alone: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = local(tmp_path)
    writer = writer_of(store, keep_last=1)
    save(writer, 10)
    manifest = tmp_path / "checkpoints/step-000000010" / MANIFEST
    manifest.unlink()
    manifest.mkdir()  # no file: cannot be unlinked
    assert save(writer, 20) == [True] and writer.failures == 0
    assert "step-000000010 could not be removed" in caplog.text
    manifest.rmdir()
    assert save(writer, 30) == [True]
    assert store.folders() == ["step-000000030"]


def test_one_written_over_another_that_could_not_be_removed_stays(
    alone: None, remote: Store, server: ObjectStore
) -> None:
    writer = writer_of(remote)
    server.down(True)
    try:
        assert save(writer, 20) == [False]
    finally:
        server.down(False)
    assert save(writer, 20, 30) == [True, True]
    assert list_checkpoints(remote) == ["step-000000020", "step-000000030"]


def test_a_thread_that_cannot_start_is_a_failed_checkpoint(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of the system, met by one rank: it must still come to the collectives."""

    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    writer = writer_of(local(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", start)
        assert save(writer, 10) == [False]
    assert save(writer, 11) == [True]
    assert list_checkpoints(local(tmp_path)) == ["step-000000011"]


def test_a_copy_that_a_killed_start_left_is_cleared(
    alone: None, remote: Store, tmp_path: Path
) -> None:
    save(writer_of(remote), 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        loaded(remote)
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    assert loaded(remote) == 10


def test_a_rank_copies_what_it_loads_and_no_more() -> None:
    names = [
        f"state/{kind}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        for rank in (1, 11)
        for kind in ("", "bf16_")
    ]
    assert files_of_rank([WEIGHTS, *names], 1) == [WEIGHTS, *names[:2]]
    names = [f"state/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(3)]
    assert files_of_rank(names, 2) == names[2:]


def test_what_fails_on_one_rank_is_known_to_all(tmp_path: Path) -> None:
    ranks = run_ranks(Path(__file__).with_name("checkpoint_ranks.py"), 2, str(tmp_path), tmp_path)
    told = [["PermissionError", "[Errno 13] of rank 0"], ["ValueError", "of rank 1"]]
    assert ranks["errors"] == [told, told]
    assert ranks["saved"] == [[True, False, True]] * 2, "the second rank's disk is full at step 20"
    kinds, messages = zip(*ranks["misread"], strict=True)
    assert kinds == ("OSError", "OSError") and "look for errors of a disk" in messages[1]
    assert ranks["loaded"] == [30, 30] and ranks["without newest"] == [10, 10]
    assert ranks["in spite of the first"] == [30, 30], "what it does not see, or reads wrongly"
