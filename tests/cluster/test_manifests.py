"""Files for clusters: valid for those who read them, and in agreement about ranks and tokens."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.train.v2._internal import constants

from cavmae.cluster.config import RAY_KINDS
from cavmae.cluster.local import drain
from cavmae.cluster.manifests import FILES, ClusterFilesConfig, main, render
from cavmae.cluster.train import RETRIED
from cavmae.trainer.config.parse import parse

SCHEMAS = Path(__file__).parents[3] / "shared" / "schemas"
RUN = "audioset_base --data.train s3://clips/frames --run-dir '/shared/runs/my base'"
CONFIG = ClusterFilesConfig(
    "deploy",
    run=RUN,
    image="registry/cavmae:0.1",
    name="base",
    nodes=4,
    gpus_per_node=4,
    cpus_per_node=50,
    volume_claim="work",
)


def made(name: str) -> str:
    return render(name, CONFIG)


def strict(schema: Any) -> Any:
    """A custom resource's schema that refuses unknown fields, which Kubernetes drops silently."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault(
            "additionalProperties", schema.get("x-kubernetes-preserve-unknown-fields", False)
        )
    return result


@pytest.mark.parametrize(
    ("name", "resource"), [("ray-cluster.yaml", "rayclusters"), ("ray-job.yaml", "rayjobs")]
)
def test_manifests_are_what_kuberay_publishes(name: str, resource: str) -> None:
    path = SCHEMAS / f"ray.io_{resource}.yaml"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    document = yaml.safe_load(made(name))
    assert document["apiVersion"] == f"{definition['spec']['group']}/v1"
    assert document["kind"] == definition["spec"]["names"]["kind"]
    validator = jsonschema.Draft202012Validator(strict(spec))
    validator.validate(document["spec"])
    spoilt = json.loads(json.dumps(document["spec"]).replace("volumeMounts", "volumeMount"))
    assert not validator.is_valid(spoilt), "a field that does not exist is noticed"


def test_the_cloud_s_file_is_one_that_ray_up_takes() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    document = yaml.safe_load(made("ray-aws.yaml"))
    jsonschema.validate(document, schema)
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in document[commands][-1]
    assert document["available_node_types"]["gpu"]["resources"] == {"CPU": 50, "GPU": 4}


def test_the_batch_script_is_one_that_bash_takes() -> None:
    subprocess.run(["bash", "-n"], input=made("slurm.sh"), text=True, check=True)
    assert "#SBATCH --nodes=4\n" in made("slurm.sh")
    assert "#SBATCH --gpus-per-node=4\n" in made("slurm.sh")
    assert "RAY_AUTH_MODE=token" in made("slurm.sh")


STUBS = {
    "ray": "",
    "scontrol": 'echo "$@" >> scontrol; if [ "$1" = show ]; then echo node1; fi',
    "cavmae": 'echo "$@" >> cavmae; exit $(cat refused)',
    "srun": """
if [ "${@: -1}" = --ip-address ]; then echo 10.0.0.1; exit; fi
echo > running
while [ ! -e cavmae ]; do sleep 0.02; done
sleep 0.2
exit $(cat code)
""",
}


@pytest.mark.parametrize(
    ("signalled", "refused", "code", "requeued"),
    [
        (True, 0, 75, True),  # it has saved and stopped
        (True, 0, 1, True),  # it could not save in time
        (True, 0, 0, False),  # it has finished
        (True, 1, 1, True),  # it has not begun yet
        (False, 0, 0, False),
        (False, 0, 75, False),  # `cavmae stop` by a person
    ],
)
def test_before_the_time_limit_a_slurm_job_saves_and_is_requeued(
    signalled: bool, refused: int, code: int, requeued: bool, tmp_path: Path
) -> None:
    """Slurm's and Ray's programs are stand-ins: a machine with Slurm was not to be had."""
    for name, text in STUBS.items():
        (tmp_path / name.upper()).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name.upper()).chmod(0o755)
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(tmp_path / name.upper())
    (tmp_path / "refused").write_text(str(refused))
    (tmp_path / "code").write_text(str(code))
    job = subprocess.Popen(
        ["bash", "-c", made("slurm.sh")],
        cwd=tmp_path,
        env=os.environ
        | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}
        | {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1"},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "running").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    if signalled:
        job.send_signal(signal.SIGUSR1)
    else:
        (tmp_path / "cavmae").write_text("")
    assert job.wait(60) == code
    if signalled:
        assert (tmp_path / "cavmae").read_text() == "stop /shared/runs/my base\n"
    assert ("requeue 42" in (tmp_path / "scontrol").read_text()) == requeued


def test_pods_drain_before_they_are_ended() -> None:
    spec = yaml.safe_load(made("ray-cluster.yaml"))["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", drain.__name__]
        assert 100 < float(command[3]) < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/python3", "/opt/bin/cavmae", "train", "demo"], True),
        (["python", "-m", "cavmae.cluster.train", "demo"], True),
        (["python", "-m", "cavmae", "train", "demo"], True),
        (["/bin/sh", "-c", "cavmae train demo"], False),
        (["python", "/opt/bin/cavmae", "status"], False),
        (["grep", "cavmae", "train"], False),
    ],
)
def test_only_a_driver_itself_is_told_to_stop(words: list[str], expected: bool) -> None:
    assert drain.is_driver(words) == expected


def test_a_job_knows_that_kuberay_starts_it_again() -> None:
    job = yaml.safe_load(made("ray-job.yaml"))["spec"]
    assert yaml.safe_load(job["runtimeEnvYAML"]) == {"env_vars": {RETRIED: "1"}}


def test_all_give_a_run_the_time_to_save_that_they_have() -> None:
    assert "--checkpoint.grace-seconds=100" in CONFIG.words
    own = dataclasses.replace(CONFIG, run=f"{RUN} --checkpoint.grace-seconds 60")
    assert parse(own.words[2:], RAY_KINDS, "cavmae train").checkpoint.grace_seconds == 60


def test_all_start_the_same_run_with_a_rank_for_each_gpu() -> None:
    entrypoint = yaml.safe_load(made("ray-job.yaml"))["spec"]["entrypoint"]
    assert entrypoint in made("slurm.sh")
    program, command, *words = shlex.split(entrypoint)
    assert (program, command) == ("cavmae", "train")
    run = parse(words, RAY_KINDS, "cavmae train")
    assert run.run_dir == "/shared/runs/my base"
    assert (run.cluster.workers, run.cluster.gpus_per_worker) == (16, 1)
    assert run.cluster.cpus_per_worker == 12 and run.cluster.address == "auto"


@pytest.mark.parametrize(
    "folder", ["it's", 'a "b"', "a: b # c", "$HOME %{name}", "été 🎬", "a\\nb"]
)
def test_whatever_stands_in_a_field_arrives_as_it_is(folder: str) -> None:
    words = shlex.join(["demo", "--data.train", f"/{folder}", "--run-dir", "/run"])
    config = dataclasses.replace(CONFIG, run=words, volume_claim=folder, image=folder)
    job = yaml.safe_load(render("ray-job.yaml", config))["spec"]
    assert shlex.split(job["entrypoint"])[4] == f"/{folder}"
    for group in (
        job["rayClusterSpec"]["headGroupSpec"],
        *job["rayClusterSpec"]["workerGroupSpecs"],
    ):
        pod = group["template"]["spec"]
        assert pod["containers"][0]["image"] == folder
        assert pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == folder
    script = render("slurm.sh", config).replace("cavmae train", "printf '<%s>'")
    command = script[script.index("printf") : script.rindex(" &")]
    printed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert f"</{folder}>" in printed.stdout


def test_without_a_claim_nothing_is_mounted_at_shared() -> None:
    text = render("ray-cluster.yaml", dataclasses.replace(CONFIG, volume_claim=""))
    assert "shared" not in text and yaml.safe_load(text)["kind"] == "RayCluster"


def test_all_notice_failures_alike() -> None:
    spec = yaml.safe_load(made("ray-cluster.yaml"))["spec"]
    (pod,) = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert pod["env"] == spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    settings = {f"{one['name']}={one['value']}" for one in pod["env"]}
    cloud = yaml.safe_load(made("ray-aws.yaml"))
    for text in (
        cloud["head_start_ray_commands"][-1],
        cloud["worker_start_ray_commands"][-1],
        made("slurm.sh"),
    ):
        assert set(re.findall(r"RAY_(?!AUTH)\w+=\d+", text)) == settings


@pytest.mark.parametrize(
    ("nodes", "period"), [(1, 1000), (250, 1000), (500, 2000), (1000, 3000), (4000, 3000)]
)
def test_health_checks_are_as_many_as_a_head_can_make(nodes: int, period: int) -> None:
    text = render("slurm.sh", dataclasses.replace(CONFIG, nodes=nodes))
    settings = {
        name: int(value) for name, value in re.findall(r"RAY_health_check_(\w+)=(\d+)", text)
    }
    assert settings["period_ms"] == settings["initial_delay_ms"] == period
    waits = settings["period_ms"] + settings["timeout_ms"]
    assert waits * settings["failure_threshold"] < 30_000, "a lost node is noticed in half a minute"


def test_ray_knows_the_settings_by_their_names() -> None:
    names = re.findall(r"RAY_(?!AUTH)\w+", made("slurm.sh"))
    server = (Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server").read_bytes()
    for name in names:
        known = vars(constants).values() if "TRAIN" in name else server
        assert (name if "TRAIN" in name else name.removeprefix("RAY_").encode()) in known, name
    assert len(names) == 6


def test_pods_ask_for_the_token_and_train_on_the_nodes_alone() -> None:
    spec = yaml.safe_load(made("ray-cluster.yaml"))["spec"]
    assert spec == yaml.safe_load(made("ray-job.yaml"))["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP" and head["rayStartParams"]["num-cpus"] == "0"
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 4
    for group, gpus in ((head, None), (workers, 4)):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "registry/cavmae:0.1"
        assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]


def test_the_command_writes_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path / "deploy"), "--run", RUN, "--image", "i", "--gpus-per-node", "4"]
    assert main([*words, "--nodes", "4"]) == 0
    assert {path.name for path in (tmp_path / "deploy").iterdir()} == set(FILES)
    assert capsys.readouterr().out.split() == [str(tmp_path / "deploy" / name) for name in FILES]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("audioset_base", "data.train is empty"),
        ("audioset_base --data.train s3://c/frames", "run_dir is 'runs/.*relative"),
        (f"{RUN} --global-batch 8", "there are 16 ranks and global_batch is 8"),
        ("no_recipe", "'no_recipe' is no recipe"),
    ],
)
def test_a_run_that_could_not_start_is_refused_here(run: str, message: str, tmp_path: Path) -> None:
    words = [str(tmp_path), "--run", run, "--image", "i", "--gpus-per-node", "4", "--nodes", "4"]
    with pytest.raises(ValueError, match=message):
        main(words)


@pytest.mark.parametrize(
    ("field", "value"),
    [("nodes", 0), ("cpus_per_node", 3), ("name", "My Run"), ("run", " "), ("slurm_time", "1h")],
)
def test_a_field_out_of_range_is_named(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"run": RUN, "image": "i", "gpus_per_node": 4} | {field: value}
    with pytest.raises(ValueError, match=f"^{field} is "):
        ClusterFilesConfig("deploy", **fields)
