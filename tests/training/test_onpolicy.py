"""What OnPolicy collects, and that a run goes on where it stopped."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from offrl.agents.ppo import PPO
from offrl.core.checkpoint import load_file, restore, save_file
from offrl.core.space import Box, Discrete
from offrl.core.types import Spec
from offrl.envs.batched import Copies, Simulated, Stepped
from offrl.testing import identical
from offrl.training.fit import fit
from offrl.training.onpolicy import OnPolicy


class Counting:
    """Environment i shows (i, steps of the episode); its episodes end after i + 2 steps, by a time limit where i is odd."""

    spec, count, device, resumes = Spec(Box.of(2), Box.of(1, -1, 1)), 3, "cpu", True

    def __init__(self, objectives: int = 0):
        self.objectives, self.given = objectives, []

    def obs(self):
        return torch.stack([torch.arange(3.0), self.age.float()], 1)

    def reset(self):
        self.age = torch.zeros(3, dtype=torch.int64)
        return self.obs()

    def step(self, action):
        self.given.append(action)
        self.age = self.age + 1
        next_obs, over = self.obs(), self.age == torch.arange(3) + 2
        reward = self.age.float() if not self.objectives else self.age[:, None] * torch.tensor([1.0, 10.0])
        self.age = self.age * ~over
        odd = torch.arange(3) % 2 == 1
        return Stepped(self.obs(), reward, over & ~odd, over & odd, next_obs)

    def state_dict(self):
        return {"age": self.age}

    def load_state_dict(self, state):
        self.age = state["age"]


def wide(obs, noise):
    """Beyond the bounds now and then."""
    return 3 * noise


def test_a_rollout_row_by_row():
    env = Counting()
    (batch,) = OnPolicy(env, 6)(0, wide)
    assert batch.obs.shape == (6, 3, 2) and batch.action.shape == (6, 3, 1) and batch.reward.shape == (6, 3)
    age = [[0, 0, 0], [1, 1, 1], [0, 2, 2], [1, 0, 3], [0, 1, 0], [1, 2, 1]]
    assert batch.obs[..., 1].tolist() == age and (batch.obs[..., 0] == torch.arange(3)).all()
    after = np.array(age) + 1  # the true next observation at ends too
    assert batch.next_obs[..., 1].tolist() == after.tolist() and torch.equal(batch.reward, batch.next_obs[..., 1])
    assert (1 - batch.mask).tolist() == (after == [2, 0, 4]).tolist()  # 0 and 2 terminate
    assert batch.truncated.tolist() == (after == [0, 3, 0]).tolist()  # 1 is cut
    assert batch.next_action is None and batch.mc_return is None


def test_the_sample_is_kept_and_the_environment_is_given_what_it_can_take():
    env = Counting()
    (batch,) = OnPolicy(env, 20)(0, wide)
    assert (batch.action.abs() > 1).any()
    assert torch.equal(torch.stack(env.given), batch.action.clamp(-1, 1))


def test_episodes_go_on_and_are_counted():
    source = OnPolicy(Counting(), 4)
    first, second = source(0, wide)[0], source(10, wide)[0]
    assert second.obs[0, :, 1].tolist() == [0, 1, 0] and not torch.equal(first.action, second.action)
    # of steps 5 to 8: environment 0 ends twice after 1 + 2, 1 once after 1 + 2 + 3 that began before, 2 once after 1 + 2 + 3 + 4
    found = {name: value.item() for name, value in source.metrics().items()}
    assert found == {"rollout/env_steps": 24, "rollout/episodes": 4, "rollout/length_mean": 11 / 4, "rollout/return_mean": 22 / 4}


def test_metrics_before_any_episode_has_ended():
    source = OnPolicy(Counting(), 1)
    source(0, wide)
    assert set(source.metrics()) == {"rollout/env_steps"} and source.metrics()["rollout/env_steps"] == 3
    source(1, wide)
    ended = source.metrics()
    source(2, wide)
    again = source.metrics()  # none but environment 1 ends now
    assert ended["rollout/length_mean"] == 2 and again["rollout/length_mean"] == 3
    with pytest.raises(ValueError, match="at least 1 step"):
        OnPolicy(Counting(), 0)


def test_rewards_may_be_vectors():
    source = OnPolicy(Counting(objectives=2), 4)
    (batch,) = source(0, wide)
    assert batch.reward.shape == (4, 3, 2)
    found = source.metrics()
    assert found["rollout/return_mean_1"] == 10 * found["rollout/return_mean_0"] > 0


def noisy(count: int = 4, seed: int = 0) -> Simulated:
    """A random walk that ends beyond 2, and is cut after seven steps."""

    def begin(count, source):
        return {"x": torch.rand(count, 1, generator=source)}

    def advance(state, action, source):
        x = state["x"] + action + torch.randn(len(action), 1, generator=source)
        return {"x": x}, -x.squeeze(1).abs(), x.squeeze(1).abs() > 2

    return Simulated(Spec(Box.of(1), Box.of(1, -1, 1)), count, begin, advance=advance, observe=lambda s: s["x"], horizon=7, seed=seed)


def agent_on(env) -> PPO:
    return PPO(PPO.Config(epochs=2, minibatches=2, hidden=(8,)), env.spec)


@pytest.mark.parametrize("half", [1, 4])
def test_a_run_is_resumed_bit_for_bit(tmp_path, half):
    env, other = noisy(), noisy(seed=1)
    agent, whole = agent_on(env), 6
    straight, logs = OnPolicy(env, 5), ([], [])
    log = (agent.period, lambda step, state, metrics: logs[0].append(straight.metrics()))
    expected = fit(agent, agent.init(0), straight, whole * agent.period, [log])

    first = OnPolicy(noisy(), 5)
    state = fit(agent, agent.init(0), first, half * agent.period)
    save_file(tmp_path / "x.safetensors", state | {"source": first.state_dict()}, {})
    saved, _ = load_file(tmp_path / "x.safetensors")
    second = OnPolicy(noisy(), 5)
    second.load_state_dict(saved.pop("source"))
    log = (agent.period, lambda step, state, metrics: logs[1].append(second.metrics()))
    state = fit(agent, restore(saved, agent.init(0)), second, whole * agent.period, [log], half * agent.period)
    assert identical(state, expected)
    assert logs[1] == logs[0][half:] and second.metrics()["rollout/env_steps"] == 120
    assert not identical(fit(agent, agent.init(0), OnPolicy(other, 5), whole * agent.period), expected)


def test_nothing_is_saved_before_the_first_rollout():
    source = OnPolicy(noisy(), 5)
    assert source.state_dict() == {}
    source.load_state_dict({})
    source(0, wide)


def test_gymnasiums_episodes_begin_anew():
    """Elsewhere than at the run's beginning, and the same however often the same checkpoint is gone on from."""
    pytest.importorskip("gymnasium")

    def source():
        return OnPolicy(Copies("Pendulum-v1", 2, seed=3), 5)

    first = source()
    agent = agent_on(first.env)
    act = partial(agent.act, agent.init(0))
    begun = first(0, act)[0].obs[0]
    first(1, act)
    state = first.state_dict()
    batches = []
    for _ in range(2):
        again = source()
        again.load_state_dict(state)
        batches.append(again(2, act)[0])
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[1]) if a is not None)
    assert not torch.equal(batches[0].obs[0], begun) and not torch.equal(batches[0].obs[0], first(2, act)[0].obs[0])
    assert again.metrics()["rollout/env_steps"] == 30


def test_discrete_policies_are_given_uniform_numbers():
    env = noisy()
    env.spec = Spec(Box.of(1), Discrete(3))
    seen = []

    def act(obs, noise):
        seen.append(noise)
        return torch.zeros(len(obs), dtype=torch.int64)

    env.advance = lambda state, action, source: (state, torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    (batch,) = OnPolicy(env, 9)(0, act)
    assert batch.action.dtype == torch.int64 and batch.action.shape == (9, 4)
    assert seen[0].shape == (4, 3) and all(((each > 0) & (each < 1)).all() for each in seen)
