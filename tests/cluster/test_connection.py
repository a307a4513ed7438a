"""An address that no cluster answers at is one line, at once; Ray itself waits for minutes."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cavmae import cli
from cavmae.cluster import connection
from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import address_of, check_address

pytestmark = pytest.mark.field


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Loopback stays loopback, also where Ray was imported before.
    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)


@contextmanager
def server(answer: bytes) -> Iterator[str]:
    """Yield the address of a server that says one thing."""

    def serve() -> None:
        with listener.accept()[0] as client:
            client.sendall(answer)
            client.recv(1 << 10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize("by_variable", [True, False])
@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://h:10001", "head", "h:x"])
def test_an_address_of_another_kind_is_refused(
    monkeypatch: pytest.MonkeyPatch, address: str, by_variable: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address if by_variable else "other:6379")
    source = "RAY_ADDRESS" if by_variable else "--address"
    with pytest.raises(ValueError, match=f"{source} is {address}.*give HOST:6379 or auto"):
        check_address(ClusterConfig(address="" if by_variable else address))


def test_a_dry_run_refuses_a_job_server_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert cli.main(["train", "demo", "--data.train=/s", "--dry-run"]) == 1
    assert capsys.readouterr().err.startswith("error: RAY_ADDRESS is http://127.0.0.1:8265")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"is 127.0.0.1:{port}, where no Ray cluster answers"):
        check_address(ClusterConfig(address=f"127.0.0.1:{port}"))


def test_who_listens_speaks_something_else() -> None:
    other = pytest.raises(ConnectionError, match="something else than the head")
    with server(b"HTTP/1.0 400 Bad request") as address, other:
        check_address(ClusterConfig(address=address))


def test_who_listens_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"no Ray cluster answers \(timed out\)"):
            check_address(ClusterConfig(address=address))


def test_a_grpc_server_passes() -> None:
    with server(bytes(3) + b"\4" + bytes(5)) as address:  # a SETTINGS frame
        check_address(ClusterConfig(address=address))


def test_the_variable_says_which_cluster_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_of(ClusterConfig(address="auto")) == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "h:6379")
    assert address_of(ClusterConfig()) == address_of(ClusterConfig(address="auto")) == "h:6379"
    assert address_of(ClusterConfig(address="g:6379")) == "g:6379"


@pytest.mark.parametrize("before", [None, "a token that Ray made"])
def test_the_token_of_a_cluster_is_for_its_owner_alone(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / ".ray/auth_token"
    if before:
        path.parent.mkdir()
        path.write_text(before)
        path.chmod(0o644)
    connection.make_token(path)
    token = path.read_text()
    connection.make_token(path)
    assert path.read_text() == token and (len(token) == 64 if before is None else token == before)
    assert path.stat().st_mode & 0o777 == 0o600 and list(path.parent.iterdir()) == [path]
