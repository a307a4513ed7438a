"""No credential of a URL is written: fields refuse it; messages, logs and files leave it out."""

import ast
import dataclasses
import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starts import Start
from tiny_run import tiny_run

from cavmae import cli
from cavmae.credentials import check_no_credential, redacted
from cavmae.field_checks import CheckedFields
from cavmae.trainer.config.configs import TrackingConfig
from cavmae.trainer.inference.media import name_of, windows_of
from cavmae.trainer.tracking.rank_logging import log_to_file

ROOT = Path(__file__).parents[1]
SECRET = "hunter2"
URLS = {
    f"s3://AKIA:{SECRET}/x+y=@bucket/set": "s3://***@bucket/set",
    f"postgresql://user:p@{SECRET}@db:5432/mlflow": "postgresql://***@db:5432/mlflow",
    f"https://{SECRET}@host/set": "https://***@host/set",
    f"https://user:{SECRET}@host:8080/set?a=1": "https://***@host:8080/set?a=1",
    f"simplecache::https://host/x?sv=1&sig={SECRET}%3D&se=2": (
        "simplecache::https://host/x?sv=1&sig=***&se=2"
    ),
    f"https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature={SECRET}": (
        "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=***"
    ),
    f"https://storage.googleapis.com/b/k?x-goog-signature={SECRET}&x=1": (
        "https://storage.googleapis.com/b/k?x-goog-signature=***&x=1"
    ),
    f"https://host/k?AWSAccessKeyId={SECRET}&Expires=1": (
        "https://host/k?AWSAccessKeyId=***&Expires=1"
    ),
    f"https://host/k?access_token={SECRET}": "https://host/k?access_token=***",
}
HARMLESS = [
    *(
        "/data/a@b/c:d@e",
        "s3://bucket/a@b/c:d@e",
        "abfs://container@account.dfs.core.windows.net/p",
    ),
    *("http://host:8080/@scope/x?page=2&monkey=1", "sqlite:////runs/mlflow.db", "sftp://me@host/p"),
    *("file:///x/y:z@w", "s3://a:1/b,s3://c/d", "x://", "a mail to me@example.org"),
]


@pytest.mark.parametrize("url", URLS)
def test_a_credential_is_left_out_of_a_url_wherever_it_stands(url: str) -> None:
    shown = URLS[url]
    assert redacted(url) == shown
    text = f'{{"error": "ClientError(url=\'{url}\') of {url}"}}'
    assert redacted(text) == text.replace(url, shown)
    with pytest.raises(
        ValueError, match=r"^data\.train is .*\*\*\*.*, with a credential"
    ) as refused:
        check_no_credential("data.train", url)
    assert SECRET not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_credential_stays(text: str) -> None:
    assert redacted(text) == text


@given(st.text(alphabet="ab:/@?&=. \n'sigtoken", max_size=200))
def test_leaving_credentials_out_twice_changes_nothing_more(text: str) -> None:
    assert redacted(redacted(text)) == redacted(text)


def config_names() -> Iterator[tuple[str, str]]:
    """Module and name of each dataclass that a command line or a file is read into."""
    for folder in ("trainer", "dataloaders", "cluster"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                    yield f"cavmae.{module}", node.name


@pytest.mark.parametrize(("module", "name"), list(config_names()), ids=lambda word: word)
def test_every_field_that_takes_a_text_refuses_a_credential(module: str, name: str) -> None:
    kind: Any = getattr(importlib.import_module(module), name)
    assert CheckedFields in kind.__mro__
    hints = get_type_hints(kind)
    texts = [field.name for field in dataclasses.fields(kind) if "str" in str(hints[field.name])]
    for field in texts:
        made = object.__new__(kind)
        for one in dataclasses.fields(kind):
            object.__setattr__(made, one.name, None)
        for url in URLS:
            listed = "tuple" in str(hints[field])
            object.__setattr__(made, field, ("a", url) if listed else f"a,{url}")
            with pytest.raises(ValueError, match=rf"{field} is .*, with a credential") as refused:
                CheckedFields.__post_init__(made)
            assert SECRET not in str(refused.value)


@pytest.mark.parametrize("field", ["--run-dir", "--data.train", "--tracking.uri"])
def test_a_run_with_a_credential_in_a_path_does_not_begin(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["train", "demo", "--data.train=x", f"{field}=https://user:{SECRET}@host/x"])
    printed = capsys.readouterr()
    assert "is https://***@host/x, with a" in printed.err
    assert SECRET not in printed.out + printed.err and not list(tmp_path.iterdir())


def test_neither_a_message_nor_a_traceback_of_a_command_has_a_credential(tmp_path: Path) -> None:
    for kind, lines in (("OSError", 1), ("KeyError", None)):
        (tmp_path / "broken.py").write_text(
            f"def main(arguments):\n    raise {kind}('https://u:{SECRET}@h/x?sig={SECRET}')\n"
        )
        code = (
            "import sys, cavmae; from cavmae import cli; cavmae.__path__.append(sys.argv[1]);"
            "cli.COMMANDS['broken'] = ('broken', ''); sys.exit(cli.main(['broken']))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 1 and SECRET not in done.stdout + done.stderr
        assert "https://***@h/x?sig=***" in done.stderr
        assert lines is None or len(done.stderr.splitlines()) == lines


def test_a_log_has_no_credential_in_messages_and_tracebacks(tmp_path: Path) -> None:
    log_to_file(tmp_path / "rank-0.log")
    try:
        raise RuntimeError(f"GET https://h/x?X-Amz-Signature={SECRET}")
    except RuntimeError:
        logging.getLogger("cavmae.test").exception("no answer from https://u:%s@h", SECRET)
    text = (tmp_path / "rank-0.log").read_text()
    assert "no answer from https://***@h" in text and "X-Amz-Signature=***" in text
    assert SECRET not in text


def test_a_presigned_medium_is_named_without_its_signature(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/missing.mp4?X-Amz-Signature={SECRET}"
    assert SECRET not in name_of(url)
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4") as refused:
        list(windows_of(url, 1.0))
    assert SECRET not in str(refused.value) and refused.value.__cause__ is None


@pytest.mark.slow
def test_nothing_that_a_run_leaves_has_a_secret_of_its_environment(
    packed_synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's server does not answer, and the launcher's command has what fields refuse."""
    secrets: dict[str, Any] = {
        "MLFLOW_TRACKING_USERNAME": "name",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "CAVMAE_COMMAND": f"train --store https://user:{SECRET}@host/x",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    tracking = TrackingConfig(uri="http://127.0.0.1:9/", every_steps=1)
    config = tiny_run(packed_synthetic, tmp_path / "run", steps=1, tracking=tracking)
    text = Start(config, 1, tmp_path).finish()
    assert "MLflow (http://127.0.0.1:9/)" in text and SECRET not in text
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "config.json", "report.html", "rank-0.log"} <= {one.name for one in left}
    assert "https://***@host/x" in (tmp_path / "run/run.json").read_text()
    assert not [path for path in left if SECRET.encode() in path.read_bytes()]
