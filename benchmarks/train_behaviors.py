"""Train the behaviour policies of the `offrl/` datasets with Stable-Baselines3's SAC or sb3-contrib's TRPO, one robot a call.

    python benchmarks/train_behaviors.py hopper --algorithm sac --steps 300000
    python benchmarks/train_behaviors.py walker2d --algorithm trpo --steps 1500000

Every `--every` steps the actor's weights go to `OUT/ROBOT/STEP.safetensors`, under Stable-Baselines3's names, with the
measured returns beside them in `OUT/ROBOT/log.jsonl`, and all that a resume needs to `OUT/ROBOT/resume`: the same
command again goes on from there. A resume starts fresh episodes, so it is statistically, not bitwise, the same run.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import gymnasium as gym
import numpy as np
import torch
from safetensors.torch import save_file
from sb3_contrib import TRPO
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from offrl.envs.scores import normalize, reference

ENVS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
EPISODES = 5


def make_model(algorithm: str, robot: str, steps: int, seed: int):
    """SAC with the library's defaults; TRPO with the settings that its authors' zoo found for these robots."""
    if algorithm == "sac":
        return SAC("MlpPolicy", gym.make(ENVS[robot]), seed=seed, buffer_size=steps, learning_starts=5_000, device="cpu")
    envs = VecNormalize(DummyVecEnv([lambda: gym.make(ENVS[robot])] * 2), gamma=0.99)
    settings = {"n_steps": 1024, "batch_size": 128, "gae_lambda": 0.95, "gamma": 0.99, "learning_rate": 1e-3}
    solver = {"cg_max_steps": 25, "cg_damping": 0.1, "n_critic_updates": 20}
    return TRPO("MlpPolicy", envs, seed=seed, device="cpu", **settings, **solver)


def scaling(model) -> dict[str, torch.Tensor]:
    """The observations' running mean and variance, where the model has them."""
    stats = getattr(model.get_vec_normalize_env(), "obs_rms", None)
    return {} if stats is None else {"obs_mean": torch.tensor(stats.mean), "obs_var": torch.tensor(stats.var)}


def save_actor(model, path: pathlib.Path) -> None:
    module = model.actor if isinstance(model, SAC) else model.policy
    weights = {k: v.detach().float().clone() for k, v in (module.state_dict() | scaling(model)).items() if "value" not in k}
    kind = {"kind": "squashed-gaussian", "activation": "relu"} if isinstance(model, SAC) else {"kind": "gaussian", "activation": "tanh"}
    save_file(weights, path, metadata=kind)


def save_resume(model, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"parameters": model.get_parameters(), "steps": model.num_timesteps, "n_updates": model._n_updates}
    if isinstance(model, SAC):
        buffer, size = model.replay_buffer, model.replay_buffer.size()
        np.savez(folder / "new.npz", **{name: getattr(buffer, name)[:size] for name in ARRAYS})
        (folder / "new.npz").replace(folder / "replay.npz")
    else:
        env = model.get_vec_normalize_env()
        counts = {"count": env.obs_rms.count, "return_var": float(env.ret_rms.var), "return_count": env.ret_rms.count}
        saved["scaling"] = scaling(model) | counts
    torch.save(saved, folder / "new.pt")
    (folder / "new.pt").replace(folder / "model.pt")


def load_resume(model, folder: pathlib.Path) -> None:
    saved = torch.load(folder / "model.pt", weights_only=True)
    model.set_parameters(saved["parameters"])
    model.num_timesteps, model._n_updates = saved["steps"], saved["n_updates"]
    if isinstance(model, SAC):
        buffer = model.replay_buffer
        with np.load(folder / "replay.npz", allow_pickle=False) as arrays:
            for name in ARRAYS:
                getattr(buffer, name)[: len(arrays[name])] = arrays[name]
            buffer.pos = len(arrays["rewards"])
        buffer.full = buffer.pos == buffer.buffer_size
        buffer.pos %= buffer.buffer_size
    else:
        env, stats = model.get_vec_normalize_env(), saved["scaling"]
        env.obs_rms.mean, env.obs_rms.var, env.obs_rms.count = stats["obs_mean"].numpy(), stats["obs_var"].numpy(), stats["count"]
        env.ret_rms.var, env.ret_rms.count = np.float64(stats["return_var"]), stats["return_count"]


def returns(model, env: gym.Env, deterministic: bool) -> list[float]:
    totals, vec = [], model.get_vec_normalize_env()
    for episode in range(EPISODES):
        obs, _ = env.reset(seed=10_000 + episode)
        total, done = 0.0, False
        while not done:
            action, _ = model.predict(obs if vec is None else vec.normalize_obs(obs), deterministic=deterministic)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        totals.append(total)
    return totals


class Checkpoint(BaseCallback):
    def __init__(self, robot: str, folder: pathlib.Path, every: int):
        super().__init__()
        self.folder, self.every, self.env = folder, every, gym.make(ENVS[robot])
        self.ends, self.start = reference(ENVS[robot]), time.time()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every >= self.training_env.num_envs:
            return True
        step = self.num_timesteps
        save_actor(self.model, self.folder / f"{step}.safetensors")
        row = {"steps": step, "seconds": round(time.time() - self.start, 1)}
        for name, deterministic in (("sampled", False), ("greedy", True)):
            values = returns(self.model, self.env, deterministic)
            row |= {name: round(float(np.mean(values)), 1), f"{name}_score": round(float(normalize(values, *self.ends).mean()), 1)}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)
        if step // self.every % 2 == 0:
            save_resume(self.model, self.folder / "resume")
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("robot", choices=sorted(ENVS))
    parser.add_argument("--algorithm", choices=("sac", "trpo"), default="sac")
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--every", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/behaviors"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.out / args.robot
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(args.algorithm, args.robot, args.steps, args.seed)
    if (folder / "resume" / "model.pt").exists():
        model._setup_learn(args.steps)
        load_resume(model, folder / "resume")
    model.learn(args.steps - model.num_timesteps, callback=Checkpoint(args.robot, folder, args.every), reset_num_timesteps=False)


if __name__ == "__main__":
    main()
