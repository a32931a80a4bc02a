"""Train the behaviour policies of the `offrl/` datasets: Stable-Baselines3's SAC, one robot a call.

    python benchmarks/train_behaviors.py hopper --steps 300000

Every `--every` steps the actor's weights go to `OUT/hopper/STEP.safetensors` with the measured returns beside
them in `OUT/hopper/log.jsonl`, and everything that a resume needs to `OUT/hopper/resume` (weights and optimiser
moments, replay arrays, counters): the same command again goes on from there. A resume starts a fresh episode, so
it is statistically, not bitwise, the same run.
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
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

ENVS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
REFERENCE = {"hopper": (-20.272305, 3234.3), "halfcheetah": (-280.178953, 12135.0), "walker2d": (1.629008, 4592.3)}
ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def save_actor(model: SAC, path: pathlib.Path) -> None:
    """The squashed Gaussian's weights under the names of Stable-Baselines3's `actor.*` state dict."""
    weights = {k: v.detach().clone().contiguous() for k, v in model.actor.state_dict().items()}
    save_file(weights, path, metadata={"kind": "squashed-gaussian", "activation": "relu"})


def save_resume(model: SAC, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    buffer, size = model.replay_buffer, model.replay_buffer.size()
    torch.save({"parameters": model.get_parameters(), "steps": model.num_timesteps, "n_updates": model._n_updates}, folder / "new.pt")
    np.savez(folder / "new.npz", **{name: getattr(buffer, name)[:size] for name in ARRAYS})
    (folder / "new.npz").replace(folder / "replay.npz")
    (folder / "new.pt").replace(folder / "model.pt")


def load_resume(model: SAC, folder: pathlib.Path) -> None:
    saved = torch.load(folder / "model.pt", weights_only=True)
    model.set_parameters(saved["parameters"])
    model.num_timesteps, model._n_updates = saved["steps"], saved["n_updates"]
    buffer = model.replay_buffer
    with np.load(folder / "replay.npz", allow_pickle=False) as arrays:
        for name in ARRAYS:
            getattr(buffer, name)[: len(arrays[name])] = arrays[name]
        buffer.pos = len(arrays["rewards"])
    buffer.full = buffer.pos == buffer.buffer_size
    buffer.pos %= buffer.buffer_size


def returns(model: SAC, env: gym.Env, episodes: int, deterministic: bool) -> list[float]:
    totals = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=10_000 + episode)
        total, done = 0.0, False
        while not done:
            action, _ = model.predict(obs, deterministic=deterministic)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        totals.append(total)
    return totals


class Checkpoint(BaseCallback):
    def __init__(self, robot: str, folder: pathlib.Path, every: int):
        super().__init__()
        self.robot, self.folder, self.every = robot, folder, every
        self.env, self.start = gym.make(ENVS[robot]), time.time()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every:
            return True
        save_actor(self.model, self.folder / f"{self.num_timesteps}.safetensors")
        low, high = REFERENCE[self.robot]
        sampled, greedy = returns(self.model, self.env, 5, False), returns(self.model, self.env, 5, True)
        row = {"steps": self.num_timesteps, "seconds": round(time.time() - self.start, 1)}
        for name, values in (("sampled", sampled), ("greedy", greedy)):
            row[name] = round(float(np.mean(values)), 1)
            row[f"{name}_score"] = round(100 * (float(np.mean(values)) - low) / (high - low), 1)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(self.robot, row, flush=True)
        if self.num_timesteps % (2 * self.every) == 0:
            save_resume(self.model, self.folder / "resume")
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("robot", choices=sorted(ENVS))
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--every", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/behaviors"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.out / args.robot
    folder.mkdir(parents=True, exist_ok=True)
    env = gym.make(ENVS[args.robot])
    model = SAC("MlpPolicy", env, seed=args.seed, buffer_size=args.steps, learning_starts=5_000, device="cpu")
    if (folder / "resume" / "model.pt").exists():
        model._setup_learn(args.steps)
        load_resume(model, folder / "resume")
    model.learn(args.steps - model.num_timesteps, callback=Checkpoint(args.robot, folder, args.every), reset_num_timesteps=False)


if __name__ == "__main__":
    main()
