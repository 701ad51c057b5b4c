"""The recipes: scripts with stand-ins, options parsed, objects checked."""

import ast
import json
import os
from pathlib import Path
import re
import subprocess

import pytest
import yaml

from train.commands.arguments import parse_preset
from train.commands.train import TrainArgs
from train.devices import processes

_RECIPES = Path(__file__).parents[2] / "recipes"
_PRESET = ("pile-157m-rebased", "--data.path", "/shared/tokens")


def _stand_in(folder: Path, name: str, code: int = 0) -> None:
  """Write a program that notes its arguments, one a line, and exits."""
  path = folder / name
  path.write_text(
    f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {folder}/{name}.args\nexit {code}\n"
  )
  path.chmod(0o755)


def _run(folder: Path, script: str, *args: str, **variables: str):
  path = f"{folder}:{os.environ['PATH']}"
  return subprocess.run(
    ["bash", str(_RECIPES / script), *args],
    env={"PATH": path, **variables},
    capture_output=True,
    text=True,
  )


def _parsed(words: list[str]) -> TrainArgs:
  """Return the arguments of `rebased train`, as the command parses them."""
  assert words[:2] == ["rebased", "train"]
  return parse_preset(TrainArgs, "train", words[2:])[1]


@pytest.mark.parametrize(
  ("code", "restarts", "again"),
  [
    (0, 0, False),
    (1, 0, False),
    (2, 0, False),
    (3, 0, True),
    (4, 0, True),
    (138, 0, True),
    (138, 100, False),
    (143, 2, True),
  ],
)
def test_slurm_queues_again_what_can_be_resumed(
  tmp_path: Path, code: int, restarts: int, again: bool
) -> None:
  _stand_in(tmp_path, "srun", code)
  _stand_in(tmp_path, "scontrol")
  done = _run(
    tmp_path,
    "slurm.sh",
    *_PRESET,
    SLURM_JOB_ID="17",
    SLURM_RESTART_COUNT=str(restarts),
  )
  assert done.returncode == code and done.stderr == ""
  queued = tmp_path / "scontrol.args"
  assert queued.exists() == again
  if again:
    assert queued.read_text().split() == ["requeue", "17"]
  option, *words = (tmp_path / "srun.args").read_text().splitlines()
  assert option == "--kill-on-bad-exit=0"
  parsed = _parsed(words)
  # The same folder after each restart.
  assert parsed.run_dir == "runs/pile-157m-rebased-17"
  assert parsed.distributed == "auto"


def test_slurm_signals_the_processes_before_the_limit() -> None:
  options = re.findall(
    r"^#SBATCH (\S+)$", (_RECIPES / "slurm.sh").read_text(), re.MULTILINE
  )
  assert "--signal=USR1@300" in options and "--requeue" in options
  # One process for each GPU, as jax expects under SLURM.
  assert {"--ntasks-per-node=8", "--gpus-per-node=8"} <= set(options)


def test_xpk_gets_the_command(tmp_path: Path) -> None:
  _stand_in(tmp_path, "xpk")
  places = dict(CLUSTER="c", ZONE="z", IMAGE="i", BUCKET="gs://b")
  spaced = ("pile-157m-rebased", "--data.path", "/data/my tokens")
  done = _run(tmp_path, "xpk.sh", "first", *spaced, **places)
  assert (done.returncode, done.stderr) == (0, "")
  words = (tmp_path / "xpk.args").read_text().splitlines()
  command = words[words.index("--command") + 1]
  said = subprocess.check_output(
    ["bash", "-c", f"printf '%s\\n' {command}"], text=True
  )
  parsed = _parsed(said.splitlines())
  assert parsed.run.data.path == ("/data/my tokens",)
  assert parsed.run_dir == "gs://b/runs/first"


@pytest.mark.parametrize("script", ["slurm.sh", "xpk.sh"])
def test_scripts_say_how_they_are_used(script: str, tmp_path: Path) -> None:
  done = _run(tmp_path, script)
  assert done.returncode == 2 and "usage: " in done.stderr


def test_kubernetes_objects_fit_each_other() -> None:
  text = (_RECIPES / "kubernetes.yaml").read_text()
  service, job = yaml.safe_load_all(text)
  assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
  assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
  name = job["metadata"]["name"]
  # A headless service, which the pods are part of, gives them their names.
  assert service["spec"]["clusterIP"] == "None"
  assert service["spec"]["selector"] == {"job-name": name}
  pods = job["spec"]["template"]["spec"]
  assert pods["subdomain"] == service["metadata"]["name"]
  assert job["spec"]["completionMode"] == "Indexed"
  # A failure policy needs pods that are not restarted in place.
  assert pods["restartPolicy"] == "Never"
  (container,) = pods["containers"]
  rules = job["spec"]["podFailurePolicy"]["rules"]
  assert rules[0]["onExitCodes"]["containerName"] == container["name"]
  volumes = {volume["name"] for volume in pods["volumes"]}
  assert {mount["name"] for mount in container["volumeMounts"]} == volumes
  (index,) = container["env"]
  parsed = _parsed(["rebased", *container["args"]])
  where = parsed.distributed.replace(f"$({index['name']})", "1")
  place = processes._parse(where)
  assert place.host == f"{name}-0.{pods['subdomain']}"
  assert place.count == job["spec"]["completions"] == job["spec"]["parallelism"]
  assert container["ports"] == [{"containerPort": place.port}]


def test_the_image_gets_what_the_package_needs() -> None:
  text = (_RECIPES / "Dockerfile").read_text()
  copied = set()
  for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
    copied |= set(line.split()[:-1])
  for name in copied:
    assert (_RECIPES.parent / name).exists(), name
  ignore = (_RECIPES / "Dockerfile.dockerignore").read_text().splitlines()
  assert {line[1:] for line in ignore if line.startswith("!")} == copied
  project = (_RECIPES.parent / "pyproject.toml").read_text()
  for name in ("pallas_kernels", "rebased_jax", "train", "README.md"):
    assert name in copied and f'"{name}"' in project
  tried = re.search(r"^RUN \S+ (rebased (?:.*\\\n)*.*) &&", text, re.MULTILINE)
  assert tried is not None
  words = tried[1].replace("\\\n", " ").split()
  assert _parsed(words).run.steps == 2
  first = re.search(r'ENTRYPOINT \["(\w+)"\]\nCMD (\[.*\])', text)
  assert first is not None
  assert _parsed([first[1], *json.loads(first[2])]).run.steps > 1


def test_the_notebook_is_python_without_outputs() -> None:
  notebook = json.loads((_RECIPES / "colab.ipynb").read_text())
  cells = [x for x in notebook["cells"] if x["cell_type"] == "code"]
  assert notebook["nbformat"] == 4 and len(cells) > 5
  for cell in cells:
    assert cell["outputs"] == [] and cell["execution_count"] is None
    lines = [x for x in cell["source"] if x[0] not in "%!"]
    ast.parse("".join(lines))
