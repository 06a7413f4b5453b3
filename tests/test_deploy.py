"""The files for servers are sound, and name what there is."""

from __future__ import annotations

import configparser
import importlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("prometheus_client", reason="the server needs the extra serve")

from linspec.checkpoints.resolve import resolve
from linspec.serve.app import make_app
from linspec.serve.metrics import PREFIX, metric_names
from linspec.serve.run import server_config
from linspec.serve.settings import PREFIX as SETTINGS
from linspec.serve.settings import Settings

DEPLOY = Path(__file__).parents[1] / "deploy"
READY, HEALTH = "/ready", "/health"


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (DEPLOY / "grafana/linspec.json").read_text(encoding="utf-8")
    )
    return found


@pytest.mark.parametrize(
    "name", sorted(str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*.y*ml"))
)
def test_yaml_can_be_read(name: str) -> None:
    assert all(isinstance(each, dict) for each in documents(name))


def test_the_dashboard_asks_for_metrics_that_there_are_and_for_all_of_them() -> None:
    told = json.dumps(dashboard())
    asked = set(re.findall(rf"{PREFIX}\w+", told))
    assert asked - metric_names() == set()
    # of a histogram its buckets are enough
    shown = {
        name for name in metric_names() if not name.endswith(("_seconds_sum", "_seconds_count"))
    }
    assert shown - asked == set()


def test_panels_have_their_own_places_and_queries() -> None:
    panels = dashboard()["panels"]
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert (
        len(places)
        == len({p["id"] for p in panels})
        == len({p["title"] for p in panels})
        == len(panels)
    )
    for panel in panels:
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")"), expression
            assert "$model" in expression


def test_compose_mounts_files_that_there_are_and_listens_on_this_machine_alone() -> None:
    compose = documents("compose.yaml")[0]
    assert sorted(compose["services"]) == ["grafana", "prometheus", "server"]
    for service in compose["services"].values():
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            assert (
                (DEPLOY / source).is_file()
                if source.startswith(".")
                else source in compose["volumes"]
            )
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    server = compose["services"]["server"]
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    assert server["cpus"] and server["mem_limit"]
    target = documents("prometheus.yml")[0]["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == ["server:8000"]


def test_the_pod_says_when_it_is_ready_what_it_takes_and_runs_without_rights() -> None:
    service, deployment = documents("kubernetes.yaml")
    pod = deployment["spec"]["template"]
    container = pod["spec"]["containers"][0]
    assert container["readinessProbe"]["httpGet"]["path"] == READY
    assert container["livenessProbe"]["httpGet"]["path"] == HEALTH
    assert set(container["resources"]["limits"]) == {"cpu", "memory"}
    # threads follow the limit in whole cores
    assert float(container["resources"]["limits"]["cpu"]).is_integer()
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    mounts = {each["name"] for each in container["volumeMounts"]}
    assert mounts == {each["name"] for each in pod["spec"]["volumes"]}


def test_the_image_is_built_of_files_that_there_are_and_runs_without_rights() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert text.count("\nFROM ") == 2
    last = text.rpartition("\nFROM ")[2]
    assert "\nUSER 10001:10001\n" in last and READY in last
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.M):
        for name in line.split():
            assert (DEPLOY.parent / name).exists(), name
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    assert {"src", "setup.py", "pyproject.toml"} <= set(re.findall(r"^!(\S+)$", kept, flags=re.M))


def test_the_unit_is_sound() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    unit.read(DEPLOY / "linspec.service")
    assert set(unit) - {"DEFAULT"} == {"Unit", "Service", "Install"}
    service = unit["Service"]
    assert service["ExecStart"].startswith("/opt/linspec/bin/linspec serve ")
    assert service["DynamicUser"] == "yes" and service["CPUQuota"].endswith("%")


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


SERVERS = ("Dockerfile", "compose.yaml", "kubernetes.yaml", "linspec.service")


def test_variables_are_settings_that_there_are_and_the_address_has_its_key() -> None:
    """A variable that no setting has is read by nobody."""
    known = {f"{SETTINGS}{name}".upper() for name in Settings.model_fields}
    for name in SERVERS:
        assert set(re.findall(rf"{SETTINGS}\w+", text(name))) <= known, name
    # the image listens where others reach it, which only goes with a key: whoever runs it gives one
    assert f"{SETTINGS}HOST=0.0.0.0" in text("Dockerfile")
    assert all(f"{SETTINGS}API_KEY" in text(name) for name in SERVERS)


def test_ports_and_paths_are_those_of_the_server() -> None:
    port = str(Settings.model_fields["port"].default)
    assert re.findall(rf"{SETTINGS}PORT=(\d+)", text("Dockerfile")) == [port]
    assert re.findall(r"^EXPOSE (\d+)$", text("Dockerfile"), flags=re.M) == [port]
    compose, (service, deployment) = documents("compose.yaml")[0], documents("kubernetes.yaml")
    assert compose["services"]["server"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    (listening,) = container["ports"]
    assert str(listening["containerPort"]) == port
    annotations = service["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == port
    # those that are asked for by name
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    used = {each["port"] for each in probes} | {
        each["targetPort"] for each in service["spec"]["ports"]
    }
    assert used == {listening["name"]}
    scraped = documents("prometheus.yml")[0]["scrape_configs"][0]
    asked = {each["path"] for each in probes}
    asked |= {annotations["prometheus.io/path"], scraped["metrics_path"]}
    asked |= set(re.findall(rf"http://127.0.0.1:{port}(/\w+)", text("Dockerfile")))
    assert asked == {READY, HEALTH, "/metrics"}
    assert asked <= set(make_app({}, Settings.read(None)).openapi()["paths"]) | {"/metrics"}


def test_there_is_time_to_finish_running_requests_and_models_are_there() -> None:
    config = server_config(make_app({}, Settings.read(None)), Settings.read(None))
    needed = config.timeout_graceful_shutdown
    assert needed is not None
    compose, (_, deployment) = documents("compose.yaml")[0], documents("kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    given = [
        int(compose["services"]["server"]["stop_grace_period"].removesuffix("s")),
        pod["terminationGracePeriodSeconds"],
        int(re.findall(r"^TimeoutStopSec=(\d+)$", text("linspec.service"), flags=re.M)[0]),
    ]
    assert min(given) > needed
    named = set(re.findall(r"embedded-[a-z]+", "".join(map(text, SERVERS))))
    assert named and all(resolve(name).is_dir() for name in named)
    scripts = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8"))
    command = scripts["project"]["scripts"]["linspec"].partition(":")
    assert callable(getattr(importlib.import_module(command[0]), command[2]))
    assert 'ENTRYPOINT ["linspec", "serve"]' in text("Dockerfile")


def test_what_is_written_lies_in_volumes_that_may_be_written() -> None:
    """A root file system that is read only has a cache of models nowhere else."""
    image, compose = text("Dockerfile"), documents("compose.yaml")[0]["services"]["server"]
    (home,) = re.findall(r"^VOLUME (\S+)$", image, flags=re.M)
    assert f"LINSPEC_CACHE={home}/" in image and f"--home-dir {home}" in image
    assert compose["read_only"] and compose["volumes"] == [f"models:{home}"]
    container = documents("kubernetes.yaml")[1]["spec"]["template"]["spec"]["containers"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {each["mountPath"] for each in container["volumeMounts"]} == {home, "/tmp"}
    unit = text("linspec.service")
    assert f"WorkingDirectory={home}" in unit and f"LINSPEC_CACHE={home}/" in unit
