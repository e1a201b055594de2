"""Numbers that aren't finite never get into a state, and are told of."""

import json
import os
import shutil
import statistics
import subprocess
import sys

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_training as training
from conftest import ROOT, environment, lines, program

from flaxmlm import InputError, config
from flaxmlm.storage import saves
from flaxmlm.training import chain, checkpoints, incidents, sharding
from flaxmlm.training import step as steps

LAST = 12
ARGS = [
  "--config=configs/quickstart.py",
  f"--config.train.steps={LAST}",
  "--config.train.batch_size=8",
  "--config.train.max_bad_steps=3",
  "--config.model.layers=1",
  "--config.optimizer.warmup_steps=2",
  "--config.checkpoint.every=4",
  "--config.checkpoint.keep=9",
  "--config.eval.every=0",
  "--config.eval.rows=16",
  "--config.log.every=2",
]


def make_step(c, devices, *, objective=None, optimizer=None, **axes):
  """Returns a mesh, `init` and a train step, of parts that may be others."""
  mesh, model, usual, _, _ = training.parts(c, devices, **axes)
  usual_optimizer = training.optimizers.make_optimizer(c.optimizer, steps=20)
  optimizer = optimizer or usual_optimizer
  init, places = steps.make_init(model.init, optimizer, mesh)
  train_step = steps.make_train_step(
    model,
    objective(usual) if objective else usual,
    optimizer,
    optax.constant_schedule(0.0),
    mesh=mesh,
    state_sharding=places,
    microbatches=c.train.microbatches,
  )
  return mesh, init, train_step


def train_on(mesh, train_step, state, numbers):
  """Makes a step for each of the batches; returns the sums of the last."""
  for number in numbers:
    rows = sharding.put_rows(mesh, training.batch(number))
    state, sums = train_step(state, rows, jax.random.key(1))
  return state, jax.device_get(sums)


def copy(state):
  """A copy on the host: what is given to a step is donated."""
  return jax.tree.map(np.array, jax.device_get(state))


def assert_equal(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def nan_loss(objective):
  """A batch with NaN in it."""

  def corrupt(*args):
    example = objective.corrupt(*args)
    return example._replace(weights=example.weights.at[3, 0].set(jnp.nan))

  return objective._replace(corrupt=corrupt)


def nan_gradient(objective):
  """The loss as ever, and a root whose derivative is 0 * inf."""

  def run(model, params, *args):
    hidden, sums = objective.run(model, params, *args)
    scale = params["encoder"]["layer_0"]["output_norm"]["scale"]
    still = jnp.sqrt(jnp.sum(scale - jax.lax.stop_gradient(scale)) ** 2)
    task = sums["masked"] | {"nll": sums["masked"]["nll"] + still}
    return hidden, sums | {"masked": task}

  return objective._replace(run=run)


PLACES = [
  (1, 1, {}),
  (8, 1, {}),
  pytest.param((1, 4, {}), marks=pytest.mark.slow),
  pytest.param((4, 2, {"fsdp": 2}), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=PLACES)
def place(request):
  """Keys, devices and axes, and what a run there is made of."""
  devices, microbatches, axes = request.param
  c = training.tiny(train__microbatches=microbatches, model__dropout=0.1)
  return (c, devices, axes), make_step(c, devices, **axes)


def test_a_good_step_is_the_same_to_the_bit_without_the_check(
  monkeypatch, place
):
  (c, devices, axes), (mesh, init, checked) = place
  results = [train_on(mesh, checked, init(jax.random.key(0)), range(4))[0]]
  monkeypatch.setattr(steps, "_choose", lambda fine, new, old: new)
  _, _, unchecked = make_step(c, devices, **axes)
  results += [train_on(mesh, unchecked, init(jax.random.key(0)), range(4))[0]]
  assert_equal(*results)
  assert results[0].step == 4


@pytest.mark.parametrize("wrong", [nan_loss, nan_gradient])
def test_a_skipped_step_leaves_the_state_as_it_is(wrong, place):
  (c, devices, axes), (mesh, init, good) = place
  _, _, bad = make_step(c, devices, objective=wrong, **axes)
  state, sums = train_on(mesh, good, init(jax.random.key(0)), range(2))
  assert sums["step"]["skipped"] == 0
  before = copy(state)
  state, sums = train_on(mesh, bad, state, [2])
  assert sums["step"]["skipped"] == 1
  assert np.isfinite(incidents.loss(sums, {"masked": 1.0})) == (
    wrong is nan_gradient
  )
  assert not np.isfinite(sums["step"]["grad_norm"])
  assert_equal(copy(state), before._replace(step=np.int32(3)))
  # And it goes on as if that batch had never been.
  state, _ = train_on(mesh, good, state, [3])
  moved = jax.tree.map(
    lambda x, y: bool(np.any(np.asarray(x) != y)), state.params, before.params
  )
  assert any(jax.tree.leaves(moved))
  placed = jax.tree.map(
    lambda x, like: jax.device_put(x, like.sharding), before, state
  )
  again = placed._replace(step=state.step * 0 + 3)
  assert_equal(state, train_on(mesh, good, again, [3])[0])


def test_an_update_that_overflows_leaves_each_element_that_it_would(
  monkeypatch,
):
  # Of gradients about 1e-6 to 1: some overflow, some don't.
  optimizer = optax.chain(optax.scale(1e20), optax.scale(1e20))
  c, results = training.tiny(), []
  for checked in (True, False):
    if not checked:
      monkeypatch.setattr(steps, "_choose", lambda fine, new, old: new)
    mesh, init, train_step = make_step(c, 1, optimizer=optimizer)
    state = init(jax.random.key(0))
    before = copy(state)
    results.append(copy(train_on(mesh, train_step, state, [0])[0]))
  got, unchecked = results
  overflown = sum(
    np.count_nonzero(~np.isfinite(x)) for x in jax.tree.leaves(unchecked.params)
  )
  assert overflown > 100
  want = jax.tree.map(
    lambda new, old: np.where(np.isfinite(new), new, old),
    unchecked.params,
    before.params,
  )
  assert_equal(got.params, want)


def test_weights_that_are_infinite_are_left_alone_and_refused_at_the_start(
  place,
):
  _, (mesh, init, train_step) = place
  state = init(jax.random.key(0))
  incidents.check_finite(state, "here")
  layer = state.params["encoder"]["layer_0"]
  layer["query"]["kernel"] = layer["query"]["kernel"].at[3, 5].set(jnp.inf)
  before = copy(state)
  name = "params/encoder/layer_0/query/kernel"
  with pytest.raises(InputError, match=f"here: {name} has numbers"):
    incidents.check_finite(state, "here")
  state, sums = train_on(mesh, train_step, state, [0])
  assert sums["step"]["skipped"] == 1
  assert_equal(copy(state), before._replace(step=np.int32(1)))


@pytest.mark.parametrize(
  "rate",
  [
    *(pytest.param(rate, marks=pytest.mark.slow) for rate in (1e1, 1e6)),
    3e38,
  ],
)
def test_no_learning_rate_is_high_enough(rate):
  c = training.tiny(
    optimizer__peak_lr=rate,
    optimizer__warmup_steps=0,
    optimizer__schedule="constant",
    optimizer__weight_decay=0.5,
  )
  mesh, init, train_step = make_step(c, 1)
  state = init(jax.random.key(0))
  for number in range(12):
    state, sums = train_on(mesh, train_step, state, [number])
    incidents.check_finite(state, "after a step")
  if rate > 1e30:
    guard = incidents.Guard(limit=3, shares={"masked": 1.0}, tell=dict)
    with pytest.raises(incidents.DivergedError, match="step 12: parameters"):
      guard.measure(12, state.params)


def sums_of(loss: float, *, skipped: bool = False) -> dict:
  return {
    "masked": {"nll": jnp.float32(6 * loss), "weight": jnp.float32(6)},
    "step": {
      "skipped": jnp.float32(skipped),
      "grad_norm": jnp.float32(np.nan if skipped else 1),
    },
  }


def test_too_many_in_a_row_are_noticed_two_steps_later():
  told = []
  guard = incidents.Guard(limit=3, shares={"masked": 1.0}, tell=told.append)
  bad = {3, 4, 7, 8, 9, 10}
  for step in range(1, 11):
    guard.note(step, sums_of(2.0, skipped=step in bad))
    assert [one["step"] for one in told] == sorted(
      number for number in bad if number <= step - 2
    )
  with pytest.raises(incidents.DivergedError, match="step 9: 3 updates in"):
    guard.settle()
  assert [one["skipped_in_a_row"] for one in told] == [1, 2, 1, 2, 3]
  assert {one["what"] for one in told} == {"grad_norm"}


def guard_of(told: list, memory: dict | None = None) -> incidents.Guard:
  return incidents.Guard(
    limit=3, shares={"masked": 1.0}, tell=told.append, memory=memory
  )


def test_jumps_of_the_loss_are_told_from_noise():
  random, told = np.random.default_rng(0), []
  losses = 2 + 8 * np.exp(-np.arange(600) / 100)
  losses *= np.exp(random.normal(0, 0.05, 600))
  jumps = [300, 301, 302, 450]
  losses[jumps] *= 2
  guard = guard_of(told)
  for number, one in enumerate(losses, 1):
    guard.note(number, sums_of(one))
  guard.settle()
  assert guard.count_jumps() == len(jumps) and guard.count_jumps() == 0
  assert [one["step"] for one in told] == [301, 451]
  before = [float(np.float32(6 * x)) / 6 for x in losses[200:300]]
  median = statistics.median(before)
  spread = 1.4826 * statistics.median(abs(x - median) for x in before)
  value = float(np.float32(6 * losses[300])) / 6
  assert told[0]["median"] == pytest.approx(median)
  assert told[0]["z"] == pytest.approx((value - median) / spread)


def test_a_guard_goes_on_where_one_before_has_ended():
  random, told, halves = np.random.default_rng(1), [], []
  losses = np.exp(random.normal(0, 0.05, 200))
  losses[[98, 99, 100, 150]] *= 3
  each = [sums_of(x, skipped=n in (97, 99)) for n, x in enumerate(losses)]
  one = guard_of(told)
  for number, sums in enumerate(each):
    one.note(number, sums)
  one.settle()
  assert {x["kind"] for x in told} == {"loss_spike", "non_finite"}
  memory = {}
  for first in range(0, 200, 25):  # a save comes in the midst of a jump, too
    guard = guard_of(halves, json.loads(json.dumps(memory)))
    for number in range(first, first + 25):
      guard.note(number, each[number])
    guard.settle()
    memory = guard.memory
  assert repr(halves) == repr(told) and memory == one.memory


def test_a_step_that_was_skipped_is_no_jump():
  told = []
  guard = guard_of(told)
  each = [sums_of(2.0)] * 30 + [sums_of(np.nan, skipped=True)] * 2
  for number, sums in enumerate([*each, *each]):
    guard.note(number, sums)
  guard.settle()
  assert guard.count_jumps() == 0
  assert {one["kind"] for one in told} == {"non_finite"}


def test_an_incident_is_written_once_and_as_json(tmp_path):
  nan = {"step": 3, "kind": "non_finite", "what": "loss", "loss": np.nan}
  nan |= {"grad_norm": np.inf, "skipped_in_a_row": 1, "rollbacks": 0}
  said = []
  for _ in range(2):
    tell = incidents.open_book(str(tmp_path), anew=False, say=said.append)
    tell(nan)
    tell(nan | {"rollbacks": 1})
    with open(tmp_path / incidents.FILE, "a") as file:
      file.write('{"step": 9, "kin')  # a kill
  assert len(said) == 4 and "loss nan, gradient norm inf" in said[0]
  tell = incidents.open_book(str(tmp_path), anew=False, say=said.append)
  there = lines(tmp_path / incidents.FILE)
  assert [one["rollbacks"] for one in there] == [0, 1]
  assert there[0]["loss"] is None is there[0]["grad_norm"]
  incidents.open_book(str(tmp_path), anew=True, say=said.append)
  assert lines(tmp_path / incidents.FILE) == []


def test_rows_are_left_out_once_for_each_rollback(tmp_path):
  config = {"train": {"batch_size": 8, "continue_from": None}, "seed": 0}
  config["data"] = {"row_length": 128}
  skips = [(4, 32), (8, 16), (4, 8)]
  phase = chain.Phase("run", config, "store", 0, 12, 0, skips)
  first = [phase.row_offset(step) + 8 * step for step in range(12)]
  assert first[:4] == [0, 8, 16, 24]
  assert first[4:8] == [40 + x for x in (32, 40, 48, 56)]
  assert first[8:] == [56 + x for x in (64, 72, 80, 88)]
  chain.write_chain(str(tmp_path), [phase._replace(skips=())])
  os.makedirs(tmp_path / "checkpoints" / "12")
  chain.write_skips(str(tmp_path), phase)
  [found] = chain.read_chain(str(tmp_path))
  assert [tuple(one) for one in found.skips] == skips
  after = {**config, "train": {"batch_size": 4, "continue_from": str(tmp_path)}}
  *_, own = chain.find_chain("next", after, "store")
  assert own.row_offset(12) + 12 * 4 == first[-1] + 8
  # A run that begins there anew has left nothing out.
  chain.write_chain(str(tmp_path), [phase._replace(skips=())])
  assert chain.read_chain(str(tmp_path))[0].skips == []


def test_a_checkpoint_knows_the_rollbacks_before_it():
  config = {"train": {"batch_size": 8}}
  own = chain.Phase("run", config, "store", 0, 12, 0)
  noted = json.loads(json.dumps(own._replace(skips=[(4, 32)]).place))
  assert noted["row_offset"] == 0

  def check(step: int, skips: list, noted: dict | None) -> None:
    chain.check_place("run", own._replace(skips=skips), step, noted)

  check(8, [(4, 32)], noted)
  check(8, [(4, 32), (8, 16), (8, 8)], noted)  # back to it, twice
  check(8, [(4, 32), (12, 16)], noted)  # back to one that is damaged now
  check(8, [(4, 32)], None)
  check(8, [], {k: v for k, v in noted.items() if k != "skips"})
  for skips in ([], [(4, 24)], [(8, 32)], [(4, 32), (4, 8)]):
    with pytest.raises(InputError, match=r"run/rollbacks\.json is missing, or"):
      check(8, skips, noted)
  with pytest.raises(InputError, match=r"run/chain\.json is missing.*: 3 -> 0"):
    check(8, [(4, 32)], noted | {"first_step": 3})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  out = tmp_path_factory.mktemp("numbers") / "store"
  program("prepare", "--config=configs/quickstart.py", f"--out={out}")
  return f"--config.data.store={out}"


def poisoned(workdir, poison: str, *args: str, code: int = 0) -> str:
  first_and_end = map(int, poison.split(":"))
  done = subprocess.run(
    [
      *(sys.executable, *faulty_runs.poison("batch", *first_and_end)),
      *(*ARGS, f"--workdir={workdir}", *args),
    ],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == code, done.stdout + done.stderr
  return done.stderr


def strict(workdir) -> list[dict]:
  """Metrics by readers that know no NaN, without what hangs on the clock."""

  def refuse(name):
    raise ValueError(name)

  clock = ("tokens_per_second", "mfu", "host_share")
  return [
    {
      name: value
      for name, value in json.loads(line, parse_constant=refuse).items()
      if not name.endswith(clock)
    }
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]


def load(workdir, step: int):
  state = checkpoints.ocp.load(str(workdir / "checkpoints" / str(step)))
  return jax.tree.map(np.asarray, state)


def numbers(workdir, store, *args: str, path) -> list[int]:
  """The row uses that `preview` shows, in order."""
  program(
    "preview", *ARGS, store, f"--workdir={workdir}", *args, f"--json={path}"
  )
  return [row["example"] for row in lines(path)]


@pytest.mark.slow
def test_a_bad_batch_is_skipped_named_and_shown(store, tmp_path):
  workdir = tmp_path / "run"
  said = poisoned(workdir, "44:45", store)  # a row of the batch of step 6
  [incident] = lines(workdir / incidents.FILE)
  assert incident["step"] == 6 and incident["examples"] == "40:48"
  assert incident["what"] == "loss" and incident["preview"] in said
  shown = incident["preview"].split()[3:]
  assert numbers(workdir, store, *shown, path=tmp_path / "rows") == [
    *range(40, 48)
  ]
  metrics = [one for one in strict(workdir) if "train/loss" in one]
  assert [one["train/skipped"] for one in metrics] == [0, 0, 1, 0, 0, 0]
  assert all(value is not None for one in metrics for value in one.values())
  # Schedules go by updates: step 6 has made none.
  options = config.from_json(str(workdir / "config.json")).optimizer
  schedule = training.optimizers.make_schedule(
    options, steps=LAST, peak=options.peak_lr
  )
  rates = [float(schedule(count)) for count in range(LAST - 1)]
  rates.insert(5, rates[4])
  for n, one in enumerate(metrics):
    want = rates[4] if n == 2 else np.mean(rates[2 * n : 2 * n + 2])
    assert one["train/learning_rate"] == pytest.approx(want, rel=1e-6)

  # Killed after step 4: it goes on to the same state, metrics and incidents.
  again = tmp_path / "again"
  shutil.copytree(workdir, again)
  for step in (8, 12):
    shutil.rmtree(again / "checkpoints" / str(step))
  poisoned(again, "44:45", store)
  assert_equal(load(again, LAST), load(workdir, LAST))
  assert strict(again) == strict(workdir)
  assert len(lines(again / incidents.FILE)) == 1
  _, opt_state = load(again, LAST)["params"], load(again, LAST)["opt_state"]
  counts = {int(x) for x in jax.tree.leaves(opt_state) if x.shape == ()}
  assert counts == {LAST - 1}


@pytest.mark.slow
def test_stopped_or_sent_back_past_the_bad_rows(store, tmp_path):
  stopped, back = tmp_path / "stopped", tmp_path / "back"
  said = poisoned(stopped, "40:64", store, code=1)
  [error] = [one for one in said.splitlines() if one.startswith("error")]
  assert "step 8: 3 updates in a row were skipped" in error
  assert "the checkpoint of step 4 is there" in error
  assert "Traceback" not in said
  assert saves.list_steps(str(stopped / "checkpoints")) == [4]
  incidents.check_finite(load(stopped, 4), "step 4")

  rollback = "--config.train.on_divergence=rollback"
  poisoned(back, "40:64", store, rollback)
  kinds = [one["kind"] for one in lines(back / incidents.FILE)]
  assert kinds == ["non_finite"] * 3 + ["rollback"]
  skips = json.loads((back / chain.ROLLBACKS).read_text())
  assert skips == [{"step": 4, "rows": 32}]
  own = numbers(back, store, "--steps=0:12", path=tmp_path / "rows")
  assert own == [*range(32), *range(64, 128)]
  was = ["--steps=5:6", "--rollbacks=0"]
  assert numbers(back, store, *was, path=tmp_path / "rows") == [*range(40, 48)]
  steps_seen = [one["step"] for one in strict(back) if "train/loss" in one]
  assert steps_seen == [2, 4, 6, 8, 10, 12]
  assert all(one.get("train/skipped", 0) == 0 for one in strict(back))

  # The run that stopped goes on to the same; so does one that is killed later.
  poisoned(stopped, "40:64", store, rollback)
  assert_equal(load(stopped, LAST), load(back, LAST))
  for gone in ([12], [12, 8]):
    for step in gone:
      shutil.rmtree(back / "checkpoints" / str(step), ignore_errors=True)
    poisoned(back, "40:64", store, rollback)
    assert_equal(load(stopped, LAST), load(back, LAST))
  assert strict(stopped) == strict(back)


@pytest.mark.slow
def test_a_run_that_goes_back_too_often_stops(store, tmp_path):
  workdir = tmp_path / "run"
  said = poisoned(
    workdir,
    "40:9999",
    store,
    "--config.train.on_divergence=rollback",
    "--config.train.max_rollbacks=2",
    code=1,
  )
  kinds = [one["kind"] for one in lines(workdir / incidents.FILE)]
  assert kinds.count("rollback") == 2 and kinds[-1] == "stop"
  assert "gone back train.max_rollbacks=2 times" in said
  assert saves.list_steps(str(workdir / "checkpoints")) == [4]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_an_absurd_learning_rate_ends_with_a_line(store, tmp_path, policy):
  workdir = tmp_path / "run"
  said = program(
    "train",
    *ARGS,
    store,
    f"--workdir={workdir}",
    "--config.train.steps=200",
    "--config.optimizer.peak_lr=1e15",
    "--config.checkpoint.every=1",
    "--config.optimizer.weight_decay=0.1",
    f"--config.train.on_divergence={policy}",
    code=1,
  )
  assert "Traceback" not in said
  assert sum(one.startswith("error: step") for one in said.splitlines()) == 1
  kinds = [one["kind"] for one in lines(workdir / incidents.FILE)]
  assert kinds.count("rollback") == (3 if policy == "rollback" else 0)
  assert kinds[-1] == "stop"
  strict(workdir)
  folder = str(workdir / "checkpoints")
  assert saves.list_steps(folder)
  for step in saves.list_steps(folder):
    incidents.check_finite(load(workdir, step), f"step {step}")
