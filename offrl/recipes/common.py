"""From a recipe's name and a dataset to trained, evaluated runs: config layers, run folders, seeds, resuming."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl.core import registry
from offrl.core.checkpoint import check_meta, restore
from offrl.core.config import digest, validate
from offrl.core.interrupt import Interrupt
from offrl.data.dataset import Dataset
from offrl.data.info import transition_weighted_return
from offrl.data.load import load_dataset
from offrl.data.transforms import scale_and_shift, with_reward
from offrl.envs.make import EnvError, env_for, make
from offrl.envs.scores import normalize
from offrl.nn.normalize import fitted
from offrl.recipes.config import Config, family, resolve
from offrl.stats import iqm, mean_ci
from offrl.training import hooks
from offrl.training.accelerate import best_mode
from offrl.training.fit import fit, stack
from offrl.training.run import FORMAT, Finished, Run, RunError, read_about, read_json, versions, write_json

FINAL_SEED = 10_000  # the final evaluation's episodes, other than those seen during training


def name_of(dataset: Any) -> str:
    """What a dataset is called in configs and folders: its id, or the stem of its path."""
    if isinstance(dataset, Dataset):
        return dataset.spec.dataset_id or f"arrays-{dataset.fingerprint[:8]}"
    text = str(dataset)
    return Path(text).stem if Path(text).exists() else text


def folder_of(runs: str | Path, recipe: str, name: str, config: Config, data: Dataset) -> Path:
    """runs/RECIPE/DATASET/HASH, the hash being over what decides the result."""
    learns = {key: value for key, value in asdict(config).items() if key in config.learns}
    return Path(runs) / recipe / re.sub(r"[^\w.-]+", "-", name) / digest(learns | {"data": data.fingerprint})


def train(
    recipe: str,
    dataset: Any,
    config: Config | dict[str, Any] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    preset: str | None = None,
    runs: str | Path = "runs",
    fresh: bool = False,
    stacked: bool = False,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    stage: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    **reading: Any,
) -> list[Path]:
    """Train a recipe's agent on a dataset, evaluate it, and return each seed's run folder.

    dataset: a Dataset, or what `load_dataset` takes (`reading` is passed on to it). config: a resolved Config, or
    nested overrides such as {"agent": {"alpha": 40.0}, "steps": 100_000}. Seeds run one after another, or as one with
    `stacked`. An unfinished run goes on where it stopped; a finished one is left as it is without `fresh`, and goes
    on if `steps` asks for more. `name` is what the dataset is called in the run's folder: its id or its file's, unless told
    otherwise. `progress(done, steps)` is called now and then, `stage(what, done, of)` during what comes before the
    first gradient step, `say` told what was decided.

    Raises RunError (Finished if all were), ConfigError, DataError, Diverged, Interrupted.
    """
    data = dataset if isinstance(dataset, Dataset) else load_dataset(dataset, **reading)
    name = name or name_of(dataset)
    config = validate(config) if isinstance(config, Config) else resolve(recipe, name, preset, config)
    if data.reward.ndim != 1:
        raise RunError(f"{recipe} learns from one reward; {name} has {data.reward.shape[1]} objectives")
    folder = folder_of(runs, recipe, name, config, data)
    groups = [list(seeds)] if stacked and len(seeds) > 1 else [[seed] for seed in seeds]
    finished = []
    for group in groups:
        session = Session(recipe, name, data, config, group, folder, fresh, say)
        try:
            session.run(progress or (lambda done, steps: None), stage or (lambda what, done, of: None))
        except Finished as error:
            finished.append(error)
    settle(finished, len(groups), say)
    return [folder / str(seed) for seed in seeds]


def settle(finished: Sequence[Finished], of: int, say: Callable[[str], None]) -> None:
    """Raises the first if all there was to do had been done before; says so of those that had."""
    if len(finished) == of:
        raise finished[0]
    for error in finished:
        say(str(error))


class Session:
    """One process's share of a training: one seed, or several as one stack."""

    def __init__(self, recipe, name, data: Dataset, config: Config, seeds: list[int], folder: Path, fresh: bool, say):
        self.recipe, self.data, self.config, self.seeds, self.say = recipe, data, config, seeds, say
        self.stacked, self.models = len(seeds) > 1, folder.parents[2] / "models"
        self.device = device(config.device)
        self.family, algorithm = family(recipe)
        if self.stacked and not self.family.STACKS:
            raise RunError(f"the seeds of {recipe} do not train as one stack: --how processes")
        self.agent = registry.agent_class(algorithm)(config.agent, data.spec)
        if getattr(self.agent, "on_policy", False):
            raise RunError(f"{recipe} learns from rollouts of its own policy, not from a dataset: give `fit` an OnPolicy (docs/online.md)")
        self.steps = -(-config.steps // self.agent.period) * self.agent.period
        self.env = self._env()
        about = {
            "format": FORMAT, "recipe": recipe, "algorithm": algorithm, "agent": json.loads(json.dumps(asdict(config.agent))),
            "spec": data.spec.to_json(), "env": self.env, "data": {
                "name": name, "fingerprint": data.fingerprint, "rows": len(data), "episodes": data.episodes,
                "return_mean": transition_weighted_return(data),
            }, "reward": dict(zip(("transform", "scale", "shift"), (config.reward, *scale_and_shift(config.reward, data)))),
            "versions": versions(),
        }  # fmt: skip
        board = {"tensorboard": config.tensorboard}
        if config.wandb:
            board["wandb"] = {"project": config.wandb}
        self.runs = [Run(folder / str(seed), about | {"seed": seed}, config, fresh, **board) for seed in seeds]

    def _env(self) -> str | None:
        if self.config.env is not None:
            return self.config.env
        try:
            env = env_for(self.data.spec)
            make(env).close()
        except (EnvError, ImportError) as error:
            self.say(f"no evaluation: {error}")
            return None
        return env

    def run(self, progress: Callable[[int, int], None], stage: Callable[[str, int, int], None]) -> None:
        def staged(what: str, done: int, of: int) -> None:
            if interrupt.requested:
                raise hooks.Interrupted("stopped before the first update; the same command begins anew")
            stage(what, done, of)

        with ExitStack() as opened:
            for run in self.runs:
                opened.enter_context(run)
            interrupt = opened.enter_context(Interrupt())
            state, start = self._resume()
            self._train(state, start, interrupt, progress, staged)

    def _resume(self):
        """The state to go on from and its step; logs are cut back to it."""
        self.source_state: dict[str, Any] = {}
        fresh = [self.agent.init(seed) for seed in self.seeds]
        scale = fitted(self.data, self.config.normalize)
        fresh = [state | {"normalizer": scale} for state in fresh]
        saved = [run.checkpoints.latest() for run in self.runs]
        starts = {0 if each is None else each.step for each in saved}
        if len(starts) > 1:
            raise RunError(f"the seeds {self.seeds} have come to different steps, {sorted(starts)}: continue them unstacked")
        start = starts.pop()
        states = []
        for run, state, each in zip(self.runs, fresh, saved):
            if each is not None:
                check_meta(each.meta, run.meta)
                self.source_state = each.tree.pop("source", {})
                state = restore(each.tree, state)
            if self.config.skip_nonfinite:
                state["skipped"] = torch.tensor(each.meta.get("skipped", 0) if each else 0)
            run.log.truncate(start)
            states.append(state)
        if start >= self.steps and all(self._evaluated(run, start) for run in self.runs):
            raise Finished(f"{self.runs[0].folder} is finished at step {start}; --fresh trains it anew, more --steps go on from there")
        return states, start

    def _evaluated(self, run: Run, step: int) -> bool:
        """Whether nothing is left to be done at the end: a kill may have fallen into the last evaluation."""
        path = run.folder / "result.json"
        return self.env is None or (path.exists() and read_json(path)["step"] == step)

    def _as_begun(self, key: str, asked: str, start: int) -> str:
        """What was asked for, or for "auto" that with which the run began: only so are results equal bit for bit."""
        before = self.runs[0].folder
        return read_about(before).get(key, "auto") if asked == "auto" and start and (before / "run.json").exists() else asked

    def _mode(self, start: int) -> str:
        on_gpu = self.device.startswith("cuda")
        if self.config.mode == "cudagraph" and not on_gpu:
            raise RunError(f"mode cudagraph needs a GPU; the device is {self.device}")
        mode = self._as_begun("mode", self.config.mode, start)
        if mode == "auto" or (mode == "cudagraph" and not on_gpu):  # begun on a GPU, continued without
            mode, why = best_mode(self.device, self.steps)
            self.say(f"mode {mode}: {why}")
        return mode

    def _sampling(self, start: int) -> str:
        sampling = self._as_begun("sampling", self.config.sampling, start)
        return sampling if sampling != "auto" else "blocks" if self.data.mapped else "replay"

    def _train(self, states, start, interrupt, progress, stage) -> None:
        c, agent, mode, sampling = self.config, self.agent, self._mode(start), self._sampling(start)
        if self.env is not None:  # one step of it: better refused now than after hours
            hooks.evaluate_state(agent, states[0], self.env, 1, time_limit=1)
        for run in self.runs:
            run.about |= {"mode": mode, "sampling": sampling}
            run.begin()
        state = stack(states) if self.stacked else states[0]
        state = hooks.tree_map(lambda leaf: leaf.to(self.device), state)
        seeds, reward = self.seeds if self.stacked else self.seeds[0], self.runs[0].about["reward"]
        data = with_reward(self.data, reward["scale"], reward["shift"])
        source = self.family.source(agent, data, c, seeds, self.device, sampling, models=self.models, say=self.say, stage=stage)
        source.load_state_dict(self.source_state)
        save = hooks.checkpoint_hook(self.runs, self.stacked, c.skip_nonfinite, source)
        each = [(c.log_every, hooks.log_hook(self.runs, self.stacked, start, c.skip_nonfinite, source))]
        if self.env is not None and c.eval_episodes:
            each.append((c.eval_every, hooks.evaluate_hook(agent, self.runs, self.stacked, self.env, c.eval_episodes)))
        each += [(c.checkpoint_every, save), (agent.period, hooks.stop_hook(interrupt, save))]
        each.append((max(100, self.steps // 1000), hooks.progress_hook(lambda done: progress(done, self.steps))))
        last = (self.steps, lambda step, state, metrics: step % c.checkpoint_every and save(step, state, metrics))
        progress(start, self.steps)
        state = fit(agent, state, source, self.steps, [*each, last], start, seeds=seeds, mode=mode, precision=c.precision)
        if self.env is not None:
            for run, own in hooks.per_seed(self.runs, state, self.stacked):
                played = hooks.evaluate_state(agent, own, self.env, c.final_episodes, seed=FINAL_SEED)
                write_json(run.folder / "result.json", result(played, self.data.spec, self.env, max(start, self.steps)))


def device(name: str) -> str:
    """The device of that name, or the best there is for "auto". Raises RunError where it cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise RunError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def result(played: Any, spec: Any, env: str, step: int) -> dict[str, Any]:
    """What an evaluation found, for result.json: every episode, and means with 95 % intervals of return and, if known, score."""
    found = {"env": env, "step": step, "episodes": len(played.returns), "time_limit": played.time_limit, "seeds": played.seeds.tolist()}
    found |= {"returns": played.returns.tolist(), "lengths": played.lengths.tolist(), "return": _estimate(played.returns)}
    if spec.ref_min is not None and spec.ref_max is not None:
        found["score"] = _estimate(normalize(played.returns, spec.ref_min, spec.ref_max))
    return found


def _estimate(values: np.ndarray) -> dict[str, Any]:
    mean, low, high = mean_ci(values)
    return {"mean": mean, "interval": [low, high] if len(values) > 1 else None, "iqm": iqm(values)}
