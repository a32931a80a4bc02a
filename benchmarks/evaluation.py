"""Which way of stepping environments costs least, each as a ratio of one plain Gymnasium loop after another.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--episodes 10] [--rounds 7]

The ways take turns, so that whatever else the machine does falls on all of them; a ratio is the median over rounds of (one
at a time) / (this way), above 1 being faster. `rollout` steps MuJoCo's physics in its own threads and works rewards out of the states:
it needs the formulas of every robot again, and its returns are not those of Gymnasium to the last bit.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from offrl.envs.make import make
from offrl.training.evaluate import evaluate


def policy(obs_size: int, action_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(obs_size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, action_size), nn.Tanh())


@torch.no_grad()
def one_at_a_time(act: Any, env_id: str, episodes: int) -> tuple[np.ndarray, int]:
    env, returns, steps = make(env_id), np.zeros(episodes), 0
    for i in range(episodes):
        obs, ended = env.reset(seed=i)[0], False
        while not ended:
            action = act(torch.from_numpy(obs.astype(np.float32))[None])[0].numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[i] += reward
            steps += 1
            ended = terminated or truncated
    env.close()
    return returns, steps


@torch.no_grad()
def lockstep(act: Any, env_id: str, episodes: int, shrink: bool, strip: bool) -> tuple[np.ndarray, int]:
    """The loop of offrl.training.evaluate without its checks; `shrink` leaves ended episodes out of the policy's batch."""
    envs = [make(env_id) for _ in range(episodes)]
    limit = envs[0].spec.max_episode_steps
    envs = [env.unwrapped for env in envs] if strip else envs
    returns, lengths = np.zeros(episodes), np.zeros(episodes, int)
    batch = np.stack([env.reset(seed=i)[0] for i, env in enumerate(envs)]).astype(np.float32)
    playing = list(range(episodes))
    while playing:
        actions = act(torch.from_numpy(batch[playing] if shrink else batch)).numpy()
        going = []
        for row, i in enumerate(playing):
            batch[i], reward, terminated, truncated, _ = envs[i].step(actions[row if shrink else i])
            returns[i] += reward
            lengths[i] += 1
            if not (terminated or truncated or lengths[i] >= limit):
                going.append(i)
        playing = going
    return returns, int(lengths.sum())


@torch.no_grad()
def rollout(act: Any, env_id: str, episodes: int, threads: int) -> tuple[np.ndarray, int]:
    import mujoco
    from mujoco.rollout import Rollout

    envs = [make(env_id).unwrapped for _ in range(episodes)]
    first, spec = envs[0], mujoco.mjtState.mjSTATE_FULLPHYSICS
    model, hops = first.model, env_id.startswith("Hopper")
    state = np.empty((episodes, mujoco.mj_stateSize(model, spec)))
    for i, env in enumerate(envs):
        env.reset(seed=i)
        mujoco.mj_getState(model, env.data, state[i], spec)
    datas = [mujoco.MjData(model) for _ in range(threads)]
    qpos, qvel = slice(1, 1 + model.nq), slice(1 + model.nq, 1 + model.nq + model.nv)
    returns, steps, playing = np.zeros(episodes), 0, np.arange(episodes)
    with Rollout(nthread=threads if threads > 1 else 0) as physics:
        for _ in range(1000):
            now = state[playing]
            velocity = np.clip(now[:, qvel], -10, 10) if hops else now[:, qvel]
            actions = act(torch.from_numpy(np.concatenate([now[:, qpos][:, 1:], velocity], 1).astype(np.float32))).numpy()
            control = np.repeat(actions[:, None].astype(np.float64), first.frame_skip, 1)
            following = physics.rollout([model] * len(playing), datas, now, control)[0][:, -1]
            forward = (following[:, 1] - now[:, 1]) / first.dt
            going = np.ones(len(playing), bool)
            if hops:
                going = (following[:, 2] > 0.7) & (np.abs(following[:, 3]) < 0.2) & (np.abs(following[:, 3:]) < 100).all(1)
            returns[playing] += forward + hops * going - first._ctrl_cost_weight * np.square(actions).sum(1)
            state[playing] = following
            steps += len(playing)
            playing = playing[going]
            if len(playing) == 0:
                break
    return returns, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--envs", nargs="+", default=["HalfCheetah-v5", "Hopper-v5"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ways: dict[str, Any] = {
        "one at a time": one_at_a_time,
        "lockstep, wrappers kept": partial(lockstep, shrink=False, strip=False),
        "lockstep, ended rows left out": partial(lockstep, shrink=True, strip=True),
        "lockstep, all rows": partial(lockstep, shrink=False, strip=True),
        "offrl.training.evaluate": lambda act, env_id, n: (lambda e: (e.returns, int(e.lengths.sum())))(evaluate(act, env_id, n)),
        "mujoco.rollout, 1 thread": partial(rollout, threads=1),
        "mujoco.rollout, 2 threads": partial(rollout, threads=2),
    }
    for env_id in args.envs:
        env = make(env_id)
        act = policy(env.observation_space.shape[0], env.action_space.shape[0])
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        results: dict[str, tuple[np.ndarray, int]] = {}
        for _ in range(args.rounds):
            for name, way in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                results[name] = way(act, env_id, args.episodes)
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        plain, base = results["one at a time"][0], np.array(seconds["one at a time"])
        print(f"\n{env_id}: {args.episodes} episodes, {results['one at a time'][1]} steps, {np.median(base[:, 0]):.2f} s one at a time")
        print(f"{'':32}{'speed (wall)':>14}{'speed (CPU)':>14}{'steps':>8}  largest difference of a return")
        for name, (returns, steps) in results.items():
            wall, cpu = np.median(base / np.array(seconds[name]), axis=0)
            print(f"{name:32}{wall:14.2f}{cpu:14.2f}{steps:8}  {np.abs(returns - plain).max():.2g}")


if __name__ == "__main__":
    main()
