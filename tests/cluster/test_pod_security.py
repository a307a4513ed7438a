"""Every pod that is generated keeps to the "restricted" pod security standard, written out here
from its published rules (Kubernetes' documentation, "Pod Security Standards")."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cavmae.cluster import jobs
from cavmae.cluster.manifests import FILES, ClusterFilesConfig, main, render

ROOT = Path(__file__).parents[2]
CONFIG = ClusterFilesConfig(
    "deploy",
    run="audioset_base --data.train s3://clips/frames --run-dir /shared/run",
    image="registry/cavmae:0.1",
    name="base",
    nodes=4,
    volume_claim="work",
)
VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"),
    *("projected", "secret"),
}
SYSCTLS = {
    *(
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_unprivileged_port_start",
    ),
    *("net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports"),
    *("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"),
    "net.ipv4.tcp_keepalive_probes",
}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def violations(pod: dict[str, Any]) -> Iterator[str]:
    """What of a pod's spec the "baseline" and the "restricted" profile forbid."""
    of_pod = pod.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    for volume in pod.get("volumes", []):
        if kinds := set(volume) - {"name"} - VOLUMES:
            yield f"volume {kinds.pop()}"
    if {one["name"] for one in of_pod.get("sysctls", [])} - SYSCTLS:
        yield "sysctls"
    groups = ("containers", "initContainers", "ephemeralContainers")
    for container in (one for group in groups for one in pod.get(group, [])):
        own = container.get("securityContext", {})
        context = of_pod | own
        capabilities = own.get("capabilities", {})
        selinux = context.get("seLinuxOptions", {})
        profile = context.get("seccompProfile", {}).get("type")
        found = {
            "privileged": own.get("privileged", False),
            "hostProcess": context.get("windowsOptions", {}).get("hostProcess", False),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
            "runAsNonRoot": context.get("runAsNonRoot") is not True,
            "runAsUser": of_pod.get("runAsUser") == 0 or own.get("runAsUser") == 0,
            "seccompProfile": profile not in ("RuntimeDefault", "Localhost"),
            "capabilities.drop": "ALL" not in capabilities.get("drop", []),
            "capabilities.add": set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"},
            "procMount": own.get("procMount", "Default") != "Default",
            "hostPort": any(port.get("hostPort") for port in container.get("ports", [])),
            "seLinuxOptions": selinux.get("type", "") not in SELINUX_TYPES
            or selinux.get("user")
            or selinux.get("role"),
            "appArmorProfile": context.get("appArmorProfile", {}).get("type") == "Unconfined",
            "probe to another host": any(
                container.get(probe, {}).get("httpGet", {}).get("host")
                for probe in ("livenessProbe", "readinessProbe", "startupProbe")
            ),
        }
        yield from (f"{container['name']}: {rule}" for rule, broken in found.items() if broken)


def templates(config: ClusterFilesConfig = CONFIG) -> dict[str, dict[str, Any]]:
    """Templates of all pods, by file and group."""
    cluster = yaml.safe_load(render("ray-cluster.yaml", config))["spec"]
    job = yaml.safe_load(render("ray-job.yaml", config))["spec"]
    found = {"job submitter": job["submitterPodTemplate"]}
    for name, spec in (("cluster", cluster), ("job", job["rayClusterSpec"])):
        assert not spec.get("enableInTreeAutoscaling"), "the autoscaler is a container of KubeRay's"
        found[f"{name} head"] = spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            found[f"{name} {group['groupName']}"] = worker = group["template"]
            # KubeRay waits for the head with the worker's own context, environment and mounts.
            ray = worker["spec"]["containers"][0]
            waits = {"name": "wait-gcs-ready", "securityContext": ray["securityContext"]}
            worker["spec"]["initContainers"] = [waits]
    return found


PODS = templates()


@pytest.mark.parametrize("name", PODS)
def test_every_pod_keeps_to_the_restricted_standard(name: str) -> None:
    assert list(violations(PODS[name]["spec"])) == []


@pytest.mark.parametrize("name", PODS)
def test_every_pod_has_a_numeric_user_of_the_image_and_no_access_to_kubernetes(name: str) -> None:
    """A name (`USER ray`) can't be told from root's: such a pod never starts."""
    spec = PODS[name]["spec"]
    user = spec["securityContext"]["runAsUser"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"\nUSER {user}:{user}\n" in dockerfile and f"--uid {user} --user-group" in dockerfile
    assert spec["securityContext"]["fsGroup"] == user, "else a volume of root's can't be written"
    assert spec["automountServiceAccountToken"] is False and "serviceAccountName" not in spec


@pytest.mark.parametrize("name", PODS)
def test_every_pod_is_sized_and_its_ray_node_is_probed(name: str) -> None:
    (container,) = PODS[name]["spec"]["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"], "not evicted before others"
    assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["limits"])
    if container["name"].startswith("ray-job"):
        return
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    assert container["livenessProbe"]["failureThreshold"] * 5 > 300, "a busy node is not ended"


def on_pod(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda pod: pod["securityContext"].update(fields)


def on_container(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda pod: pod["containers"][0]["securityContext"].update(fields)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda pod: pod.update(hostNetwork=True), "hostNetwork"),
        (lambda pod: pod["volumes"].append({"name": "a", "hostPath": {}}), "volume hostPath"),
        (on_pod(runAsNonRoot=False), "ray-head: runAsNonRoot"),
        (on_pod(runAsUser=0), "ray-head: runAsUser"),
        (on_pod(seccompProfile={"type": "Unconfined"}), "ray-head: seccompProfile"),
        (on_pod(sysctls=[{"name": "kernel.msgmax"}]), "sysctls"),
        (on_container(runAsUser=0), "ray-head: runAsUser"),
        (on_container(privileged=True), "ray-head: privileged"),
        (on_container(allowPrivilegeEscalation=True), "ray-head: allowPrivilegeEscalation"),
        (on_container(capabilities={"drop": ["NET_RAW"]}), "ray-head: capabilities.drop"),
        (
            on_container(capabilities={"drop": ["ALL"], "add": ["SYS_PTRACE"]}),
            "ray-head: capabilities.add",
        ),
        (on_container(procMount="Unmasked"), "ray-head: procMount"),
    ],
)
def test_the_rules_find_what_breaks_them(
    spoil: Callable[[dict[str, Any]], object], rule: str
) -> None:
    pod = copy.deepcopy(PODS["cluster head"]["spec"])
    spoil(pod)
    assert list(violations(pod)) == [rule]


def test_nobody_but_the_pods_and_kuberay_may_connect_to_the_pods() -> None:
    policy = yaml.safe_load(render("network-policy.yaml", CONFIG))
    spec, label = policy["spec"], {"cavmae-cluster": "base"}
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    assert spec["podSelector"] == {"matchLabels": label} and spec["policyTypes"] == ["Ingress"]
    assert all(one["metadata"]["labels"] == label for one in PODS.values())
    inside, operator = spec["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": label}}]}
    assert operator["ports"] == [{"port": 8265}] and len(operator["from"]) == 1
    assert operator["from"][0]["podSelector"]["matchLabels"] == {
        "app.kubernetes.io/component": "kuberay-operator"
    }


def test_a_cache_that_does_not_fit_on_a_node_s_disk_is_refused(tmp_path: Path) -> None:
    words = [str(tmp_path), "--run", CONFIG.run, "--image", "i", "--disk-gb-per-node", "100"]
    with pytest.raises(
        ValueError, match=r"disk_gb_per_node is 100 and data\.cache_gigabytes 100, "
    ):
        main(words)
    assert main([*words[:2], f"{CONFIG.run} --data.cache-gigabytes 50", *words[3:]]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    sized = dataclasses.replace(CONFIG, disk_gb_per_node=300)
    limits = templates(sized)["cluster gpu"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["ephemeral-storage"] == "300Gi"


def test_the_token_is_not_sent_unencrypted_to_a_public_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ValueError, match=r"--address is http://8\.8\.8\.8:8265, a public address"):
        jobs._client("http://8.8.8.8:8265")
    for inside in ("http://127.0.0.1:8265", "http://10.1.2.3:8265", "http://[fd00::1]:8265"):
        jobs._check_token_stays_inside("--address", inside)
    jobs._check_token_stays_inside("--address", "https://8.8.8.8")
    monkeypatch.delenv("RAY_AUTH_MODE")
    jobs._check_token_stays_inside("--address", "http://8.8.8.8:8265")


@pytest.mark.parametrize("file", [".gitignore", ".dockerignore"])
def test_secrets_that_lie_in_a_checkout_go_nowhere(file: str) -> None:
    ignored = (ROOT / file).read_text().replace("**/", "").splitlines()
    assert {".env", "*.pem", "*.key", ".netrc", "auth_token"} <= set(ignored)
