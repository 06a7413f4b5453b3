"""The files for servers are sound, and name what there is."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("prometheus_client", reason="the server needs the extra serve")

from linspec.serve.metrics import PREFIX, metric_names

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
