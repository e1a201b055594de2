"""The scripts of launch/: what they run, and that they clean up after it."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import yaml
from conftest import ROOT, environment, lines

SCRIPTS = sorted((ROOT / "launch").glob("*.s[hb]*"))
CODE = "flaxmlm configs launch pyproject.toml setup.cfg README.md LICENSE"
CONFIG = "--config=configs/quickstart.py"
SLOW = pytest.mark.slow
# Stands in for python: training that takes no time, by what FAKE says.
FAKE = r"""#!/usr/bin/env bash
[[ $1 == -m ]] || exec {python} "$@"
for arg; do [[ $arg != --workdir=* ]] || workdir=${{arg#*=}}; done
me=${{JAX_PROCESS_ID:-0}}
mkdir -p "$workdir"
echo "$me $JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS $JAX_NUM_CPU_DEVICES" \
  "$JAX_PLATFORMS $*" >>"$workdir/started"
echo "process $me prints"
wait_for_signal() {{
  signals=0
  trap 'signals=$((signals + 1))' INT TERM
  echo "$$" >>"$workdir/ready"
  while ((signals == 0)); do sleep 0.05; done
  sleep 0.3
  echo "$me $signals" >>"$workdir/signals"
  echo "stopped after step 3 of 10; the same line again goes on"
}}
case $FAKE in
  done) echo "done in 1 s; try it:" ;;
  bad) echo "error: unknown key" >&2; exit 2 ;;
  crash) echo "Traceback" >&2; exit 1 ;;
  stalls) echo "error: process 1 stalls: step 7 takes more than 300 s" >&2
    echo "Aborted" >&2; exit 134 ;;
  forever) wait_for_signal ;;
  one-dies) ((me == 1)) && sleep 0.5 && exit 7; wait_for_signal ;;
  deaf) ((me == 1)) && sleep 0.5 && exit 7
    trap '' INT TERM; echo "$$" >"$workdir/deaf"
    for ((i = 0; i < 600; i++)); do sleep 0.1; done ;;
esac
"""


def tiny(steps: int) -> list[str]:
  """Arguments of a run that is long enough to be interrupted."""
  return [
    CONFIG,
    f"--config.train.steps={steps}",
    "--config.model.layers=1",
    "--config.model.width=32",
    "--config.model.ffn=64",
    "--config.train.batch_size=8",
    "--config.optimizer.warmup_steps=10",
    "--config.checkpoint.every=20",
    "--config.eval.every=0",
    "--config.eval.rows=64",
    "--config.log.every=5",
  ]


def make_cloud(folder: pathlib.Path) -> pathlib.Path:
  """A copy of the project; beside it, stand-ins for what the network has."""
  project, programs = folder / "project", folder / "bin"
  for name in CODE.split():
    source = ROOT / name
    if source.is_dir():
      no_caches = shutil.ignore_patterns("__pycache__")
      shutil.copytree(source, project / name, ignore=no_caches)
    else:
      shutil.copy(source, project / name)
  (project / "launch" / "cloud.env").write_text(
    "PROJECT=my-project\nNAME=nora\nZONE=us-west4-a\nACCELERATOR=v5litepod-8\n"
    "RUNTIME=v2-alpha-tpuv5-lite\nPOLL_SECONDS=0.2\nREGION=us-west4\n"
    "GKE_ACCELERATOR=tpu-v5-lite-podslice\nGKE_TOPOLOGY=4x8\n"
    "GKE_CHIPS_PER_HOST=4\nBUCKET=gs://my-bucket\n"
  )
  (folder / "machines").mkdir()
  programs.mkdir()
  stand_in = (ROOT / "tests" / "stand_in_cloud.py").read_text()
  for name in ("gcloud", "uv"):
    (programs / name).write_text(f"#!{sys.executable} -IS\n{stand_in}")
  (programs / "python").write_text(FAKE.format(python=sys.executable))
  for path in programs.iterdir():
    path.chmod(0o755)
  return project


@pytest.fixture
def cloud(tmp_path) -> Iterator[pathlib.Path]:
  cloud = make_cloud(tmp_path)
  yield cloud
  # What a test that failed has left running.
  (tmp_path / "faults").unlink(missing_ok=True)
  for name in machines(cloud):
    line = ["gcloud", "compute", "tpus", "tpu-vm", "delete", name]
    subprocess.run(line, env=variables(cloud), check=True)


def variables(cloud: pathlib.Path, **more: str) -> dict[str, str]:
  programs = cloud.parent / "bin"
  return environment() | {
    "CLOUD": str(cloud.parent),
    "PATH": f"{programs}:{os.environ['PATH']}",
    "TRAIN": str(programs / "python"),
    **more,
  }


def launch(
  cloud: pathlib.Path, *args: str, code: int = 0, timeout=60, **more: str
) -> str:
  """Runs a script; returns all that it printed."""
  done = subprocess.run(
    [f"launch/{args[0]}", *args[1:]],
    cwd=cloud,
    env=variables(cloud, **more),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=timeout,
  )
  assert done.returncode == code, done.stdout
  return done.stdout


def begin(cloud: pathlib.Path, *args: str, **more: str) -> subprocess.Popen:
  """Starts a script in a terminal's foreground group of its own."""
  return subprocess.Popen(
    [f"launch/{args[0]}", *args[1:]],
    cwd=cloud,
    env=variables(cloud, **more),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
    preexec_fn=heed_signals,
  )


def heed_signals() -> None:
  """A shell that runs the tests in the background has them ignored."""
  for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)


def train(*args: str) -> None:
  subprocess.run(
    [sys.executable, "-m", "flaxmlm.train", *args],
    cwd=ROOT,
    env=environment(),
    check=True,
    timeout=900,
  )


def wait_for(condition, process=None, seconds=60):
  end = time.monotonic() + seconds
  while not condition():
    assert process is None or process.poll() is None, process.stdout.read()
    assert time.monotonic() < end
    time.sleep(0.05)


def count(path: pathlib.Path) -> int:
  return len(path.read_text().splitlines()) if path.exists() else 0


def calls(cloud: pathlib.Path, part: str) -> list[str]:
  """The command lines with `part` that reached the stand-ins."""
  path = cloud.parent / "calls"
  text = path.read_text() if path.exists() else ""
  return [line for line in text.splitlines() if part in line]


def machines(cloud: pathlib.Path) -> list[str]:
  return [path.name for path in (cloud.parent / "machines").iterdir()]


def needs(*programs: str) -> None:
  for name in programs:
    if not shutil.which(name):
      pytest.skip(f"{name} isn't installed")


# Every command, as each script shows it.
POD = ["tpu_pod.sh", "run", "--spot", "--workdir=gs://b/run", CONFIG]
VM = ["tpu_vm.sh", "run", "--workdir=runs/x", CONFIG]
GKE = ["gke.sh", "run", "--spot", "--workdir=gs://b/run", CONFIG]
DATAFLOW = ["prepare_dataflow.sh", "run", "--out=gs://b/store", CONFIG]
SHOWN = [
  *(POD, VM, GKE, DATAFLOW),
  *([script[0], verb] for script in (POD, VM) for verb in ("status", "log")),
  *([GKE[0], verb] for verb in ("status", "log", "delete")),
  *([DATAFLOW[0], verb] for verb in ("status", "delete")),
  [VM[0], "fetch", "--workdir=runs/x"],
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> list[str]:
  """All command lines that dry runs show; nothing else has happened."""
  cloud = make_cloud(tmp_path_factory.mktemp("dry"))
  before = sorted(cloud.parent.rglob("*"))
  text = "\n".join(launch(cloud, *args, "--dry-run") for args in SHOWN)
  assert sorted(cloud.parent.rglob("*")) == before
  return sorted(set(text.splitlines()))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_clean(path):
  subprocess.run(["bash", "-n", path], check=True)
  beside = pathlib.Path(sys.executable).parent / "shellcheck"
  shellcheck = shutil.which("shellcheck") or shutil.which(str(beside))
  if not shellcheck:
    pytest.skip("shellcheck isn't installed; the test extra has it")
  done = subprocess.run(
    [shellcheck, "-x", "-P", "SCRIPTDIR", path], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


def test_gcloud_knows_the_commands(shown, tmp_path):
  needs("gcloud")
  good = [line for line in shown if line.startswith("gcloud ")]
  assert len(good) > 15
  bad = [
    "gcloud compute tpus tpu-vm create nora --zone=us-west4-a --typo=1",
    "gcloud compute tpus queued-resources create nora --zone=us-west4-a",
  ]
  path = tmp_path / "commands.json"
  path.write_text(json.dumps([{"command_string": c} for c in good + bad]))
  done = subprocess.run(
    ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={path}"],
    env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "sdk")},
    capture_output=True,
    text=True,
    timeout=300,
  )
  if "Invalid choice" in done.stderr:
    pytest.skip("this gcloud has no lint-gcloud-commands")
  results = json.loads(done.stdout)
  errors = [r["error_message"] for r in results]
  assert errors[: len(good)] == [None] * len(good)
  assert "unrecognized arguments: --typo" in errors[-2]
  assert "must be specified" in errors[-1]


def test_kubectl_knows_the_commands(shown, tmp_path):
  needs("kubectl")
  good = [line for line in shown if line.startswith("kubectl ")]
  assert len(good) >= 7

  def error(command: str) -> str:
    return subprocess.run(
      shlex.split(command),
      env=os.environ | {"KUBECONFIG": str(tmp_path / "none")},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=60,
    ).stderr

  for command in good:
    # All that is wrong is that there is no such cluster.
    assert re.search(
      'context "gke_my-project_us-west4_nora" does not exist'
      "|context was not found for specified context: gke_my-project_us-west4",
      error(command),
    )
  assert "unknown flag" in error(f"{good[0]} --typo")


def jobset(cloud: pathlib.Path, *args: str) -> dict:
  text = launch(cloud, *GKE[:2], *args, "--dry-run")
  return yaml.safe_load(
    re.search(r"^apiVersion.*?(?=^kubectl)", text, re.M | re.S)[0]
  )


def test_the_jobset_is_one(cloud):
  # jobset.x-k8s.io/v1alpha2, batch/v1 and v1 as their references describe
  # them: the fields in use, all of them required here.
  schema = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
      "name": "nora",
      "annotations": {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": str,
      },
    },
    "spec": {
      "failurePolicy": {
        "maxRestarts": int,
        "rules": [
          {"name": str, "action": "FailJobSet", "onJobFailureReasons": [str]}
        ],
      },
      "replicatedJobs": [
        {
          "name": str,
          "replicas": 1,
          "template": {
            "spec": {
              "completionMode": "Indexed",
              "completions": 8,  # 4 x 8 chips, 4 a host
              "parallelism": 8,
              "backoffLimit": 0,
              "podFailurePolicy": {
                "rules": [
                  {
                    "action": "FailJob",
                    "onExitCodes": {
                      "containerName": "train",
                      "operator": "In",
                      "values": [int],
                    },
                  }
                ]
              },
              "template": {
                "spec": {
                  "restartPolicy": "Never",  # as podFailurePolicy wants it
                  "terminationGracePeriodSeconds": int,
                  "nodeSelector": {
                    "cloud.google.com/gke-tpu-accelerator": (
                      "tpu-v5-lite-podslice"
                    ),
                    "cloud.google.com/gke-tpu-topology": "4x8",
                    "cloud.google.com/gke-spot": "true",
                  },
                  "containers": [
                    {
                      "name": "train",
                      "image": str,
                      "imagePullPolicy": "Always",
                      "args": [str],
                      "ports": [{"containerPort": int}],
                      "resources": {
                        "requests": {"google.com/tpu": 4},
                        "limits": {"google.com/tpu": 4},
                      },
                    }
                  ],
                }
              },
            }
          },
        }
      ],
    },
  }

  def check(value, wanted, path):
    if isinstance(wanted, dict):
      assert value.keys() == wanted.keys(), path
      for name in wanted:
        check(value[name], wanted[name], f"{path}.{name}")
    elif isinstance(wanted, list):
      for index, item in enumerate(value):
        check(item, wanted[0], f"{path}[{index}]")
    elif isinstance(wanted, type):
      assert type(value) is wanted, path
    else:
      assert value == wanted, path

  odd = '--config.data.source=gs://b/a "b" \\ &c.txt'
  args = ["--workdir=gs://b/run", odd]
  made = jobset(cloud, *args, "--spot")
  check(made, schema, "JobSet")
  job = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  assert job["spec"]["containers"][0]["args"] == args
  # A pod's name has the JobSet's and two numbers; 63 letters are the most.
  assert len(f"{'n' * 40}-slice-0-9999-abcde") <= 63
  plain = jobset(cloud, *args)["spec"]["replicatedJobs"][0]["template"]
  selector = plain["spec"]["template"]["spec"]["nodeSelector"]
  assert "cloud.google.com/gke-spot" not in selector


def test_the_image_has_what_the_dockerfile_names():
  text = (ROOT / "launch" / "Dockerfile").read_text()
  entry = json.loads(re.search(r"^ENTRYPOINT (.*)", text, re.M)[1])
  assert os.access(ROOT / entry[0], os.X_OK)
  extras = (ROOT / "setup.cfg").read_text()
  assert f"\n{re.search('EXTRA=(.*)', text)[1].split()[0]} = " in extras


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("PROJECT", ""),
    ("ZONE", "us-west4"),
    ("NAME", "Nora"),
    ("ACCELERATOR", "v5e"),
    ("RUNTIME", "two words"),
    ("POLL_SECONDS", "soon"),
    ("ALSO_COPY", "/etc/passwd"),
  ],
)
def test_a_wrong_key_is_named(cloud, key, value):
  path = cloud / "launch" / "cloud.env"
  old = re.sub(rf"^{key}=.*\n", "", path.read_text(), flags=re.M)
  path.write_text(f"{old}{key}='{value}'\n")
  error = launch(cloud, *VM, code=2)
  assert error.startswith(f"error: launch/cloud.env: {key}")
  assert error.count("\n") == 1
  assert not calls(cloud, "")


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["tpu_vm.sh", "run"], "name the run: --workdir=DIR"),
    (["tpu_vm.sh", "run", "--workdir", "runs/x"], "in one piece"),
    (["tpu_vm.sh", "run", "--workdir=../x"], "write it without .."),
    ([*VM, "--spot"], "--spot is for launch/tpu_pod.sh"),
    (["tpu_vm.sh", "trian"], "trian: there is run, status"),
    (["tpu_pod.sh", "run", "--workdir=runs/x"], "on a pod it is gs://BUCKET"),
    ([*VM, "--config=nowhere.py"], "there is no such file"),
    ([*VM, "--config=/etc/passwd"], "outside this folder"),
    (["gke.sh", "run", "--workdir=runs/x"], "on GKE, gs://BUCKET"),
    (["prepare_dataflow.sh", "run", "--out=x"], "--out=gs://BUCKET"),
    (["local.sh", "--workdir=x"], "--processes=?: say how many"),
    (["local.sh", "--processes=0", "--workdir=x"], "--processes=0"),
    (["local.sh", "--processes=2"], "name the run"),
  ],
)
def test_a_mistake_is_answered_with_a_line(cloud, args, message):
  needs("kubectl" if args[0] == "gke.sh" else "bash")
  error = launch(cloud, *args, code=2)
  assert error.startswith("error: ") and error.count("\n") == 1
  assert message in error
  assert not calls(cloud, "")


def test_a_missing_or_misspelt_env_file_is_named(cloud):
  path = cloud / "launch" / "cloud.env"
  path.write_text(path.read_text() + "ZONES=us-west4-a\n")
  assert "'ZONES=us-west4-a' isn't KEY=VALUE" in launch(cloud, *VM, code=2)
  path.unlink()
  assert "cloud.env is missing; copy" in launch(cloud, *VM, code=2)


def test_the_example_has_every_key(cloud):
  example = (ROOT / "launch" / "cloud.env.example").read_text()
  keys = re.findall(r"^([A-Z_]+)=", example, re.M)
  common = (ROOT / "launch" / "common.sh").read_text()
  checked = re.findall(r"^  \[([A-Z_]+)\]=", common, re.M)
  assert keys and sorted(keys) == sorted(checked)
  (cloud / "launch" / "cloud.env").write_text(example)
  launch(cloud, *VM, "--dry-run")


# One VM and its end.


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=SLOW)])
def test_a_run_on_a_vm_leaves_nothing_but_its_workdir(cloud, workers):
  needs("tmux")
  out = launch(cloud, *VM, FAKE="done", WORKERS=str(workers))
  assert "all steps are done" in out and "nora: nothing is left" in out
  assert machines(cloud) == []
  assert (
    (cloud / "runs/x/started")
    .read_text()
    .endswith(f"-m flaxmlm.train --workdir=runs/x {CONFIG}\n")
  )
  assert len(calls(cloud, "uv pip install")) == workers


def test_the_guide_shows_what_the_scripts_do(cloud):
  example = (ROOT / "launch" / "cloud.env.example").read_text()
  env = example.replace("NAME=flaxmlm", "NAME=novels")
  (cloud / "launch" / "cloud.env").write_text(env)
  (cloud / "stores" / "novels").mkdir(parents=True)
  guide = (ROOT / "docs" / "launch.md").read_text()
  lines = re.findall(r"^launch/(tpu_\w+\.sh run .*)$", guide, re.M)
  vm, pod = (launch(cloud, *shlex.split(t), "--dry-run") for t in lines)
  assert f"```\n{vm.split(chr(10), 1)[1]}```" in guide
  create = next(t for t in pod.splitlines() if "create" in t)
  assert f"{create}\n...\n{pod.splitlines()[-1]}\n" in guide


def test_what_the_arguments_name_travels(cloud):
  for name in ("texts/a.txt", "texts/b c.txt", "also.py", "stays.txt"):
    path = cloud / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
  env = cloud / "launch" / "cloud.env"
  env.write_text(env.read_text() + "ALSO_COPY=also.py\n")
  source = "--config.data.source=texts/*.txt"
  out = launch(cloud, *VM, source, "--dry-run")
  [line] = [t for t in out.splitlines() if t.startswith("tar -czf /tmp/flax")]
  names = set(shlex.split(line)[4:])
  assert names - set(CODE.split()) == {
    *("texts/a.txt", "texts/b c.txt", "also.py", "configs/quickstart.py")
  }


@pytest.mark.parametrize(
  "fault", ["create", "scp", "uv ", "worker.sh start", "worker.sh state"]
)
@pytest.mark.parametrize(
  "script",
  [
    pytest.param(VM, marks=SLOW, id="vm"),
    pytest.param([*POD[:3], "--workdir=/tmp", CONFIG], id="pod"),
  ],
)
def test_a_script_that_fails_in_the_middle_leaves_no_machine(
  cloud, script, fault
):
  (cloud.parent / "faults").write_text(fault)
  out = launch(cloud, *script, FAKE="done", code=1)
  assert "gave up on nora after 3 tries" in out
  assert "nora: nothing is left" in out
  assert machines(cloud) == []


@pytest.mark.parametrize(
  ("fake", "code", "starts"),
  [pytest.param("crash", 1, 3, marks=SLOW), ("bad", 2, 1)],
)
def test_training_that_fails_is_ended(cloud, fake, code, starts):
  needs("tmux")
  out = launch(cloud, *VM, FAKE=fake, code=code)
  assert ("Traceback" if fake == "crash" else "error: unknown key") in out
  assert machines(cloud) == []
  assert count(cloud / "runs/x/started") == starts


@pytest.mark.slow
def test_what_a_machine_has_isnt_replaced_by_what_was_fetched(cloud):
  needs("tmux")
  started = cloud / "runs/x/started"
  started.parent.mkdir(parents=True)
  started.write_text("once before\n")
  launch(cloud, *VM, FAKE="crash", code=1)
  assert count(started) == 1 + 3


@pytest.mark.parametrize(
  "number",
  [
    signal.SIGINT,
    pytest.param(signal.SIGTERM, marks=SLOW),
    pytest.param(signal.SIGHUP, marks=SLOW),
  ],
)
def test_an_interrupted_run_is_saved_and_fetched(cloud, number):
  needs("tmux")
  process = begin(cloud, *VM, FAKE="forever")
  home = cloud.parent / "machines/nora/0/home/flaxmlm/runs/x"
  wait_for(lambda: count(home / "ready") == 1, process)
  os.killpg(process.pid, number)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + number, out
  assert "cleaning up nora" in out and machines(cloud) == []
  assert (cloud / "runs/x/signals").read_text() == "0 1\n"
  # The same line goes on: what was fetched is on the next machine.
  launch(cloud, *VM, FAKE="done")
  assert count(cloud / "runs/x/started") == 2


@pytest.mark.slow
def test_a_killed_script_is_taken_over(cloud):
  needs("tmux")
  process = begin(cloud, *VM, FAKE="forever")
  home = cloud.parent / "machines/nora/0/home/flaxmlm/runs/x"
  wait_for(lambda: count(home / "ready") == 1, process)
  process.kill()
  process.communicate(timeout=60)
  assert machines(cloud) == ["nora"]
  assert "running | process 0 prints" in launch(cloud, "tpu_vm.sh", "status")
  process = begin(cloud, *VM, FAKE="done")
  wait_for(lambda: len(calls(cloud, "worker.sh state")) > 3, process)
  assert count(home / "started") == 1
  launch_pid = int((home.parent.parent / "train.log.pid").read_text())
  os.kill(launch_pid, signal.SIGTERM)  # it stops, and is started again: done
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0, out
  assert len(calls(cloud, "tpu-vm create")) == 1
  assert count(cloud / "runs/x/started") == 2
  assert machines(cloud) == []


@pytest.mark.slow
def test_kept_machines_are_deleted_by_hand(cloud):
  needs("tmux")
  out = launch(cloud, *VM, "--keep", FAKE="done")
  assert "costs money until: launch/tpu_vm.sh delete" in out
  assert machines(cloud) == ["nora"]
  launch(cloud, "tpu_vm.sh", "delete")
  assert machines(cloud) == []
  assert "nothing is left" in launch(cloud, "tpu_vm.sh", "delete")


def test_a_machine_that_cant_be_deleted_is_told_of(cloud):
  (cloud.parent / "faults").write_text("delete")
  out = launch(cloud, *VM, FAKE="bad", code=1)
  assert "COULD NOT DELETE nora (ready). It costs money" in out


@pytest.mark.slow
def test_spot_is_taken_away_and_the_run_goes_on(cloud, tmp_path):
  needs("tmux")
  args = tiny(200)
  train(*args, f"--workdir={tmp_path}/alone")
  store = f"--config.data.store={tmp_path}/alone/store"
  run = tmp_path / "share" / "run"
  process = begin(
    cloud,
    *("tpu_pod.sh", "run", "--spot", f"--workdir={run}", *args, store),
    TRAIN=sys.executable,
    POLL_SECONDS="0.5",
  )
  metrics = run / "metrics.jsonl"
  wait_for(
    lambda: metrics.exists() and '"step": 50,' in metrics.read_text(),
    process,
    seconds=600,
  )
  gcloud = str(cloud.parent / "bin" / "gcloud")
  line = [gcloud, "compute", "tpus", "tpu-vm", "preempt", "nora"]
  subprocess.run(line, env=variables(cloud), check=True)
  out, _ = process.communicate(timeout=600)
  assert process.returncode == 0, out
  assert "nora: preempted" in out and "all steps are done" in out
  assert machines(cloud) == []
  assert len(calls(cloud, "queued-resources create")) == 2
  again = cloud.parent / "gone/1/0/home/flaxmlm/train.log"
  assert re.search(r"^going on after step (\d+)", again.read_text(), re.M)

  def losses(folder: pathlib.Path) -> list[tuple]:
    names = ("step", "train/loss", "eval/loss", "train/grad_norm")
    return [
      tuple(line.get(name) for name in names)
      for line in lines(folder / "metrics.jsonl")
    ]

  assert losses(run) == losses(tmp_path / "alone")
  assert (run / "report.html").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_isnt_done(tmp_path):
  line = ["launch/worker.sh", "run", *tiny(100), f"--workdir={tmp_path}"]
  path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  keywords = {"cwd": ROOT, "env": environment() | {"PATH": path}}
  process = subprocess.Popen(line, **keywords)
  metrics = tmp_path / "metrics.jsonl"
  wait_for(
    lambda: metrics.exists() and '"step": 20,' in metrics.read_text(),
    seconds=600,
  )
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=300) == 75
  assert subprocess.run(line, **keywords, timeout=600).returncode == 0
  assert lines(metrics)[-1]["step"] == 100


# Slurm.


@pytest.mark.parametrize(("fake", "code"), [("done", 0), ("crash", 1)])
def test_slurm_ends_with_the_run(cloud, fake, code):
  (cloud.parent / "bin" / "srun").write_text(
    '#!/usr/bin/env bash\necho "srun $1" >>"$CLOUD/calls"\nexec "${@:2}"\n'
  )
  (cloud.parent / "bin" / "srun").chmod(0o755)
  args = ["slurm.sbatch", "--workdir=runs/x"]
  out = launch(cloud, *args, FAKE=fake, code=code, SLURM_SUBMIT_DIR=str(cloud))
  assert "process 0 prints" in out
  assert calls(cloud, "") == ["srun --kill-on-bad-exit=1"]


def test_slurm_queues_again_what_ran_out_of_time(cloud):
  for name, does in (("srun", 'exec "${@:2}"'), ("scontrol", "true")):
    path = cloud.parent / "bin" / name
    path.write_text(
      f'#!/usr/bin/env bash\necho "{name} $*" >>"$CLOUD/calls"\n{does}\n'
    )
    path.chmod(0o755)
  args = ["slurm.sbatch", "--workdir=runs/x"]
  process = begin(cloud, *args, FAKE="forever", SLURM_JOB_ID="17")
  wait_for(lambda: count(cloud / "runs/x/ready") == 1, process)
  # Slurm tells the steps, not the script.
  os.kill(int((cloud / "runs/x/ready").read_text()), signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 75, out
  assert calls(cloud, "scontrol") == ["scontrol requeue 17"]


def test_slurm_queues_again_what_stalled(cloud):
  # The task that stalled has exited 75; srun tells of the worst.
  for name, does in (("srun", 'exec "${@:2}"'), ("scontrol", "true")):
    path = cloud.parent / "bin" / name
    path.write_text(
      f'#!/usr/bin/env bash\necho "{name} $*" >>"$CLOUD/calls"\n{does}\n'
    )
    path.chmod(0o755)
  args = ["slurm.sbatch", "--workdir=runs/x"]
  launch(cloud, *args, FAKE="stalls", code=75, SLURM_JOB_ID="17")
  assert calls(cloud, "scontrol") == ["scontrol requeue 17"]


def test_the_directives_are_slurms():
  text = (ROOT / "launch" / "slurm.sbatch").read_text()
  head = text[: text.index("set -euo")]
  got = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", head, re.M))
  assert len(got) == text.count("#SBATCH")
  known = (
    "job-name nodes gpus-per-node ntasks-per-node cpus-per-task time signal"
    " requeue open-mode output"
  )
  assert set(got) == set(known.split())
  # JAX: a process a GPU.
  assert got["gpus-per-node"] == got["ntasks-per-node"]
  assert re.fullmatch(r"TERM@\d+", got["signal"])


# Several processes here.


def test_local_starts_all_and_tells_them_who_they_are(cloud):
  args = ["local.sh", "--processes=3", "--devices=2", "--workdir=runs/x"]
  out = launch(cloud, *args, "--config.seed=1 2", FAKE="done")
  assert "process 0 prints" in out and "process 1 prints" not in out
  for i in (1, 2):
    log = (cloud / f"runs/x/process-{i}.log").read_text()
    assert log == f"process {i} prints\ndone in 1 s; try it:\n"
  started = sorted((cloud / "runs/x/started").read_text().splitlines())
  addresses = {line.split()[2] for line in started}
  assert len(addresses) == 1
  [address] = addresses
  assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
  rest = "2 cpu -m flaxmlm.train --workdir=runs/x --config.seed=1 2"
  assert started == [f"{i} 3 {address} {rest}" for i in range(3)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_process_once(cloud, number):
  args = ["local.sh", "--processes=3", "--workdir=runs/x"]
  process = begin(cloud, *args, FAKE="forever")
  wait_for(lambda: count(cloud / "runs/x/ready") == 3, process)
  os.killpg(process.pid, number)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 0, out
  signals = sorted((cloud / "runs/x/signals").read_text().splitlines())
  assert signals == ["0 1", "1 1", "2 1"]


@pytest.mark.parametrize("fake", ["one-dies", "deaf"])
def test_if_one_dies_all_end(cloud, fake):
  args = ["local.sh", "--processes=3", "--workdir=runs/x"]
  began = time.monotonic()
  out = launch(cloud, *args, FAKE=fake, code=7)
  assert time.monotonic() - began < 30
  assert "process 1 ended with exit code 7" in out
  if fake == "deaf":
    pid = int((cloud / "runs/x/deaf").read_text())
    wait_for(lambda: not pathlib.Path(f"/proc/{pid}/cmdline").exists())


JOINS = """#!{python}
import os, sys
if sys.argv[1] == "-c":
  exec(sys.argv[2])
  sys.exit()
import jax
jax.distributed.initialize(
  num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
  process_id=int(os.environ["JAX_PROCESS_ID"]),
)
print("devices", jax.device_count(), jax.local_device_count())
"""


def test_jax_joins_by_these_variables(cloud):
  (cloud.parent / "bin" / "python").write_text(
    JOINS.format(python=sys.executable)
  )
  args = ["local.sh", "--processes=2", "--devices=3", "--workdir=runs/x"]
  assert "devices 6 3" in launch(cloud, *args, timeout=300)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
  if not any(
    "distributed.initialize" in path.read_text()
    for path in (ROOT / "flaxmlm").rglob("*.py")
  ):
    pytest.skip("train joins no other process yet")
  args = tiny(20)
  train(*args, f"--workdir={tmp_path}/alone")
  store = f"--config.data.store={tmp_path}/alone/store"
  path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  line = ["launch/local.sh", "--processes=2", f"--workdir={tmp_path}/two"]
  subprocess.run(
    [*line, *args, store],
    cwd=ROOT,
    env=environment() | {"PATH": path},
    check=True,
    timeout=600,
  )
  want, got = (lines(tmp_path / d / "metrics.jsonl") for d in ("alone", "two"))
  assert len(want) == len(got)
  for a, b in zip(want, got, strict=True):
    for name in a.keys() & {"step", "train/loss", "eval/loss"}:
      assert b[name] == pytest.approx(a[name], rel=1e-3)
