"""pyproject.toml (ranges), requirements.lock (exact versions) and environment.yml (the same for conda) must agree."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
SYSTEMS = {"linux": ("posix", "x86_64"), "darwin": ("posix", "arm64"), "win32": ("nt", "AMD64")}
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS["lab"] + EXTRAS["dev"]]


def marker_env(python, system="linux"):
    os_name, machine = SYSTEMS[system]
    return {
        "python_version": python,
        "python_full_version": python + ".5",
        "sys_platform": system,
        "os_name": os_name,
        "platform_machine": machine,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


def applies(requirement, env):
    return requirement.marker is None or requirement.marker.evaluate(env)


def pin(requirement):
    """The exact version of `name==version`."""
    (only,) = requirement.specifier
    assert only.operator == "==" and not only.version.endswith("*"), f"{requirement} is not an exact version"
    return Version(only.version)


def locked(python, system="linux"):
    """{name: version} that pip takes from requirements.lock there."""
    versions, env = {}, marker_env(python, system)
    for line in (REPO / "requirements.lock").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text and applies(requirement := Requirement(text), env):
            name = canonicalize_name(requirement.name)
            assert name not in versions, f"{name} is pinned twice for Python {python} on {system}"
            versions[name] = pin(requirement)
    return versions


def conda_environment():
    """(conda packages, pip requirements, pip options) of environment.yml."""
    packages = yaml.safe_load((REPO / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pip = next(entry["pip"] for entry in packages if isinstance(entry, dict))
    options = [text for text in pip if text.startswith("-")]
    return [e for e in packages if isinstance(e, str)], [Requirement(t) for t in pip if t not in options], options


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_holds_every_direct_dependency_inside_its_range(python, system):
    versions = locked(python, system)
    for requirement in DIRECT:
        if applies(requirement, marker_env(python, system)):
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement.name} is missing from requirements.lock: run `make lock`"
            assert version in requirement.specifier, (
                f"requirements.lock has {requirement.name} {version}: {requirement}"
            )


def test_environment_yml_has_the_versions_of_the_lock():
    versions = locked("3.12")
    different = []
    for requirement in conda_environment()[1]:
        in_lock = versions.get(canonicalize_name(requirement.name))
        if in_lock != pin(requirement):
            different.append(f"{requirement.name}: environment.yml {pin(requirement)}, lock {in_lock}")
    assert not different, different


def test_environment_yml_names_every_direct_dependency_and_the_course():
    conda, pinned, options = conda_environment()
    wanted = {canonicalize_name(r.name) for r in DIRECT if applies(r, marker_env("3.12"))}
    assert {canonicalize_name(r.name) for r in pinned} == wanted
    assert "python=3.12" in conda and "-e ." in options and "-c requirements.lock" in options


def test_colab_keeps_its_notebook_server():
    core = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
    assert not {"jupyterlab", "notebook", "jupyter-server", "ipykernel"} & set(core)
    assert Version("7.7.1") in core["ipywidgets"].specifier  # what Colab comes with


def test_environment_yml_has_what_the_course_promises():
    promised = "jupyterlab torch torchvision diffusers transformers accelerate matplotlib ipywidgets nbval"
    assert set(promised.split()) <= {canonicalize_name(r.name) for r in conda_environment()[1]}


def test_supported_pythons_are_the_tested_ones():
    declared = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert declared == PYTHONS
    assert PROJECT["requires-python"] == ">=3.10,<3.14"


def test_lock_names_no_host_and_no_folder():
    found = re.search(
        r"(?m)^-|://|file:|(?<!\S)/\S+|(?<!\S)\.{1,2}/", (REPO / "requirements.lock").read_text(encoding="utf-8")
    )
    assert found is None, found


def test_pre_commit_runs_the_ruff_of_the_lock():
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (ruff,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit")]
    assert ruff == f"v{locked('3.12')['ruff']}"
