"""Inventory control by HDPO: train on some scenarios, keep the weights that cost least on others, report the cost on a third kind."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from offrl.agents import hdpo
from offrl.agents.hdpo import HDPO, Shape
from offrl.core.checkpoint import Checkpoints, check_meta, restore
from offrl.core.config import ConfigError, Range, digest, nearest, validate
from offrl.core.interrupt import Interrupt
from offrl.core.types import Metrics, State
from offrl.envs.inventory import rollout, solve
from offrl.envs.inventory.demand import Observed
from offrl.envs.inventory.files import load
from offrl.envs.inventory.policies import rounded
from offrl.envs.inventory.scenario import rows
from offrl.envs.inventory.settings import SETTINGS, OneStoreBacklog, OneStoreLost, Serial, Transshipment
from offrl.recipes.common import settle
from offrl.recipes.config import layered
from offrl.recipes.planner import described
from offrl.training import hooks
from offrl.training.fit import fit
from offrl.training.run import FORMAT, Finished, Run, RunError, read_json, versions, write_json
from offrl.training.scenarios import Scenarios

N = TypeVar("N")
CHUNK = 4096  # scenarios that are evaluated at once
COMPILED = 500  # gradient steps that repay compiling a period


@dataclass(frozen=True)
class FromFile:
    """A network of one's own in a YAML file, whose demand is split by time."""

    train: Annotated[float, Range(0, 1)] = 0.6
    """Share of the periods that is trained on."""
    dev: Annotated[float, Range(0, 1)] = 0.2
    """Share of the periods, the ones that follow, by which weights are chosen; what is left is the test."""
    window: Annotated[int, Range(0)] = 16
    """Periods of past demand that a policy sees."""
    warm_up: Annotated[int, Range(0)] = 16
    """First periods of dev and test that are simulated and not counted."""


@dataclass(frozen=True)
class Config(Generic[N]):
    """All that a run can be told. What `learns` names decides what is learned and names the run's folder."""

    learns: ClassVar[tuple[str, ...]] = ("agent", "network", "batch_size", "whole")

    network: N
    agent: hdpo.Config = hdpo.Config()
    batch_size: Annotated[int, Range(1)] = 1024
    """Scenarios in a batch."""
    whole: bool = False
    """Round orders to whole units wherever a policy is evaluated or used; training does not."""
    steps: Annotated[int, Range(1)] = 3000
    """Gradient steps."""
    log_every: Annotated[int, Range(1)] = 50
    """Gradient steps between rows of the log."""
    eval_every: Annotated[int, Range(1)] = 50
    """Gradient steps between evaluations on the dev scenarios, by which the best weights are kept."""
    checkpoint_every: Annotated[int, Range(1)] = 500
    """Gradient steps between checkpoints."""
    mode: Literal["auto", "eager", "compile"] = "auto"
    """Whether a period is one compiled graph; auto: from 500 steps on, where there is a C++ compiler."""


def resolve(name: str, preset: str | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """The config for a setting, by name, or for the YAML file of a network. Raises ConfigError."""
    if Path(name).suffix in (".yaml", ".yml"):
        network: Any = FromFile()
    elif name in SETTINGS:
        network = SETTINGS[name]()
    else:
        raise ConfigError(f"no setting {name!r}{nearest(name, SETTINGS)}; or name the YAML file of a network")
    return layered(Config(network=network), "hdpo", name, preset, overrides)


def problem_of(name: str, config: Config) -> Any:
    """The network and its scenarios. Raises NetworkError for a file that is wrong, RunError for demand that is too short."""
    c = config.network
    if not isinstance(c, FromFile):
        return c.problem()
    network, history = load(name)
    if history is None:
        raise RunError(f"{name} names no demand: `demand: FILE.csv`")
    try:
        problem = Observed.split(network, history, (c.train, c.dev), c.window, c.warm_up)
    except ValueError as error:
        raise RunError(f"{name}: {error}") from None
    if (still := problem.mean.mean(1) <= 0).any():
        item = history.items[int(still.int().argmax())]
        what = f"nothing of {item}" if item else "nothing"
        raise RunError(f"{name}: {what} is asked for in the periods that are trained on; leave it out, or train on more (--network.train)")
    for split in problem.spans:
        if network.longest >= (periods := problem.horizon(split).periods):
            raise RunError(
                f"{name}: what is ordered with a lead time of {network.longest} never arrives in {split}, which has {periods} periods"
            )
    return problem


def reference(setting: Any) -> tuple[str, float] | None:
    """What is known of the least cost for each period and store: ("optimum" or "lower bound", cost)."""
    if isinstance(setting, OneStoreBacklog):
        s = setting
        return "optimum", solve.newsvendor_normal(s.mean, s.std, s.lead_time, s.holding, s.underage).cost
    if isinstance(setting, OneStoreLost):
        return "optimum", solve.lost_sales(setting.mean, setting.lead_time, setting.holding, setting.underage)
    if isinstance(setting, Serial):
        return "optimum", solve.clark_scarf(*setting.stages(), setting.underage, setting.mean, setting.std).cost
    if isinstance(setting, Transshipment):
        demand = setting.demand()
        covariance = (demand.root.double() @ demand.root.double().T).numpy()
        return "lower bound", solve.transshipment_bound(covariance, setting.lead_time, 3, setting.holding, setting.underage)
    return None


def train(
    name: str,
    config: Config | dict[str, Any] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    preset: str | None = None,
    runs: str | Path = "runs",
    fresh: bool = False,
    progress: Callable[[int, int], None] = lambda done, steps: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Train a policy for a setting or for a YAML file's network, and return each seed's run folder.

    Its result.json has the cost on the test scenarios of the weights that cost least on the dev scenarios, for each scored period and
    store. An unfinished run goes on where it stopped. Raises RunError (Finished if there is nothing left to do), ConfigError, NetworkError.
    """
    config = validate(config) if isinstance(config, Config) else resolve(name, preset, config)
    problem = problem_of(name, config)
    learns = {key: value for key, value in asdict(config).items() if key in config.learns}
    stem = Path(name).stem
    folder = Path(runs) / "hdpo" / re.sub(r"[^\w.-]+", "-", stem) / digest(learns | {"data": fingerprint(problem)})
    finished = []
    for seed in seeds:
        try:
            _train(name, config, problem, seed, folder / str(seed), fresh, progress)
        except Finished as error:
            finished.append(error)
    settle(finished, len(seeds), say)
    return [folder / str(seed) for seed in seeds]


def fingerprint(problem: Any) -> str:
    """Of what is simulated: the network and all its history, or the first of the scenarios that a setting draws."""
    net, recorded = problem.network, isinstance(problem, Observed)
    demand = problem.history.demand if recorded else problem.scenario("train", 0, 1).demand
    parts = {key: value.tolist() for key, value in net.values._asdict().items()}
    parts |= {"nodes": net.nodes, "edges": net.edges, "unmet": net.unmet, "objective": net.objective}
    return digest(parts | {"demand": hashlib.sha256(demand.contiguous().numpy().tobytes()).hexdigest()})


def _train(name: str, config: Config, problem: Any, seed: int, folder: Path, fresh: bool, progress: Any) -> None:
    whole, long = problem.scenario("train"), config.steps >= COMPILED and shutil.which("g++") is not None
    compiled = config.mode == "compile" or config.mode == "auto" and long
    agent = HDPO(config.agent, problem.network, Shape.of(whole), "inductor" if compiled else None)
    path = str(Path(name).resolve()) if isinstance(config.network, FromFile) else name
    about = {
        "format": FORMAT, "recipe": "hdpo", "algorithm": "hdpo", "agent": json.loads(json.dumps(asdict(config.agent))), "seed": seed,
        "spec": {"nodes": problem.network.nodes, "edges": problem.network.edges}, "env": None,
        "data": {"name": Path(name).stem, "path": path, "fingerprint": fingerprint(problem), "scenarios": len(whole.demand)},
        "versions": versions(), **described(problem, whole, config.whole),
    }  # fmt: skip
    about = json.loads(json.dumps(about))
    with Run(folder, about, config, fresh) as run, Interrupt() as interrupt:
        best = Best(agent, problem, run, config.whole)
        state, start, saved = agent.init(seed), 0, run.checkpoints.latest()
        if saved is not None:
            check_meta(saved.meta, run.meta)
            best.load_state_dict(saved.tree.pop("source", {}))
            state, start = restore(saved.tree, state), saved.step
        if start >= config.steps and (folder / "result.json").exists() and read_json(folder / "result.json")["step"] == start:
            raise Finished(f"{folder} is finished at step {start}; --fresh trains it anew, more --steps go on from there")
        run.log.truncate(start)
        run.begin()
        save = hooks.checkpoint_hook([run], False, source=best)
        every = [(config.log_every, hooks.log_hook([run], False, start)), (config.eval_every, best), (config.checkpoint_every, save)]
        every += [(1, hooks.stop_hook(interrupt, save)), (10, hooks.progress_hook(lambda done: progress(done, config.steps)))]
        every += [
            (config.steps, hook) for hook, each in ((best, config.eval_every), (save, config.checkpoint_every)) if config.steps % each
        ]
        source = Scenarios(partial(rows, whole), len(whole.demand), config.batch_size, seed)
        progress(start, config.steps)
        fit(agent, state, source, config.steps, every, start, seeds=seed)
        result = best.result(max(start, config.steps))
        if (least := reference(config.network)) is not None:
            result["reference"] = dict(zip(("kind", "cost"), least))
        write_json(folder / "result.json", result)


class Best:
    """A hook that evaluates the policy on the dev scenarios and keeps the weights of the lowest cost, in the run's folder `best`.

    They are saved with each checkpoint, too, so that a run that is cut keeps what an uncut one would.
    """

    def __init__(self, agent: HDPO, problem: Any, run: Run, whole: bool):
        self.agent, self.problem, self.run, self.whole = agent, problem, run, whole
        self.folder, self.cost, self.kept = Checkpoints(run.folder / "best", keep=1), math.inf, {}

    def evaluate(self, state: State, split: str) -> rollout.Evaluation:
        policy: Callable[..., Tensor] = partial(self.agent.act, state)
        horizon = self.problem.horizon(split)
        batches = self.problem.batches(split, CHUNK)
        return rollout.evaluate(self.agent.simulator, rounded(policy) if self.whole else policy, batches, horizon.warm_up)

    def __call__(self, step: int, state: State, metrics: Metrics) -> None:
        cost = self.evaluate(state, "dev").cost
        self.run.log.write(step, {"dev/cost": cost})
        if cost < self.cost:
            self.cost, self.kept = cost, {"params": state["params"], "step": torch.tensor(step)}
            self.folder.save(step, {"params": state["params"]}, self.run.meta | {"dev": cost})

    def state_dict(self) -> dict[str, Any]:
        return self.kept and self.kept | {"dev": torch.tensor(self.cost, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.cost, self.kept = float(state.pop("dev")), state

    def result(self, step: int) -> dict[str, Any]:
        """What the kept weights cost on the test scenarios."""
        if not self.kept:
            raise RunError(f"{self.run.folder}: no cost on the dev scenarios was finite")
        found = self.evaluate(self.kept, "test")
        parts = {part: getattr(found, part) for part in ("holding", "underage", "procurement")}
        error = found.error if math.isfinite(found.error) else None
        return {"step": step, "best_step": int(self.kept["step"]), "dev": self.cost, "cost": found.cost, "error": error} | parts
