"""PPO and REINFORCE against what can be worked out by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from stubs import draws, rollout, spec, start, stubbed
from torch import nn

from offrl.agents.ppo import PPO
from offrl.core.space import Box, Discrete
from offrl.core.tree import flatten
from offrl.core.types import Spec, Transitions
from offrl.envs.batched import Simulated
from offrl.envs.probes import finite
from offrl.losses import discounted_sum
from offrl.recipes.config import resolve
from offrl.testing import difference, identical
from offrl.training.fit import fit
from offrl.training.onpolicy import OnPolicy
from offrl.training.policy import Policy

SMALL = {"hidden": (8, 8), "epochs": 1, "minibatches": 1}
PLAIN = SMALL | {"normalize_advantage": False, "normalize_obs": False, "normalize_return": False}
CHOICE = Spec(Box.of(3), Discrete(4))


def ppo(space: Spec = CHOICE, **config) -> PPO:
    return PPO(PPO.Config(**PLAIN | config), space)


def discrete_rollout(steps=6, envs=4, **columns):
    batch = rollout(steps, envs, **columns)
    return batch._replace(action=(batch.action[..., 0] * 2 + 2).long().clamp(0, 3))


def grad_of(agent, state, rows, loss="actor_loss"):
    """Of the loss with respect to its group's parameters, flat."""
    group = loss.removesuffix("_loss")

    def of(tree):
        return getattr(agent, loss)(state | {"params": state["params"] | {group: tree}}, rows)[0]

    return torch.cat([g.flatten() for g in torch.func.grad(of)(state["params"][group]).values()])


# Advantages


def test_advantages_by_hand():
    """One environment: a plain step, a time limit, a termination, and the rollout's end in the middle of an episode."""
    agent = ppo(gamma=0.5, lam=0.5)
    column = [torch.tensor(x).double()[:, None] for x in ([1.0, 2, 4, 8], [10.0, 20, 30, 40], [20.0, 100, 200, 50])]
    mask, truncated = (torch.tensor(x).double()[:, None] for x in ([1, 1, 0, 1], [0, 1, 0, 0]))
    reward, value, following = column
    batch = Transitions(None, None, reward, None, mask, truncated=truncated)
    errors = [1 + 10 - 10, 2 + 50 - 20, 4 + 0 - 30, 8 + 25 - 40]
    assert agent.advantages(batch, value, following)[:, 0].tolist() == [errors[0] + 0.25 * errors[1], *errors[1:]]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 100])
def test_the_discounted_sum_is_the_recursion(steps):
    g = torch.Generator().manual_seed(0)
    x, decay = torch.randn(steps, 3, generator=g).double(), torch.rand(steps, 3, generator=g).double() * 1.2
    expected, after = [], torch.zeros(3).double()
    for t in reversed(range(steps)):
        after = x[t] + (decay[t] * after if t < steps - 1 else 0)
        expected.insert(0, after)
    torch.testing.assert_close(discounted_sum(x, decay), torch.stack(expected))


def test_lambda_one_gives_returns_and_lambda_zero_one_step_errors():
    batch = discrete_rollout(mask=1, truncated=0)
    value, following = torch.randn(2, 6, 4, dtype=torch.float64)
    weights = 0.9 ** torch.arange(6).double()
    whole = (weights[:, None] * batch.reward).sum(0) + 0.9**6 * following[-1]
    chained = torch.cat([value[1:], following[-1:]])  # what a rollout without ends has for next values
    torch.testing.assert_close(ppo(gamma=0.9, lam=1.0).advantages(batch, value, chained)[0], whole - value[0])
    torch.testing.assert_close(ppo(gamma=0.9, lam=0.0).advantages(batch, value, following), batch.reward + 0.9 * following - value)


def test_values_of_true_next_observations_are_bootstrapped_from():
    """And of nothing where the task ended; a time limit cuts the sum, not the value."""
    agent = ppo(gamma=0.9, lam=0.7)
    state, batch = start(agent), discrete_rollout()
    critic = agent.bind(state, "critic")
    _, rows = agent.judge(state, batch)
    value, following = critic(batch.obs), critic(batch.next_obs)
    expected, after = torch.zeros(6, 4).double(), torch.zeros(4).double()
    for t in reversed(range(6)):
        after = after * 0.9 * 0.7 * (batch.mask[t] * (1 - batch.truncated[t]))
        after = after + batch.reward[t] + 0.9 * batch.mask[t] * following[t] - value[t]
        expected[t] = after
    torch.testing.assert_close(rows.advantage, expected.flatten())
    torch.testing.assert_close(rows.target, (expected + value).flatten())
    unlike = batch._replace(next_obs=torch.where(batch.mask[..., None] > 0, batch.next_obs, 99.0))
    torch.testing.assert_close(agent.judge(state, unlike)[1].advantage, rows.advantage)


def test_without_a_baseline_returns_weigh_the_actions():
    state, batch = start(ppo()), discrete_rollout()
    _, rows = ppo(baseline=False, lam=1.0).judge(state, batch)
    torch.testing.assert_close(rows.advantage, rows.target)


# The actor


@pytest.mark.parametrize("space", [CHOICE, spec(3, 2)], ids=["discrete", "continuous"])
def test_densities_are_those_of_torch_distributions(space):
    agent = ppo(space, log_std=-0.7)
    state = start(agent)
    batch = discrete_rollout() if space is CHOICE else rollout(6, 4)
    output = agent.bind(state, "actor")(batch.obs)
    if space is CHOICE:
        known = torch.distributions.Categorical(logits=output)
    else:
        known = torch.distributions.Independent(torch.distributions.Normal(output[0], output[1].exp()), 1)
    log_prob, entropy = agent.density(state, batch.obs, batch.action)
    torch.testing.assert_close(log_prob, known.log_prob(batch.action))
    torch.testing.assert_close(entropy, known.entropy())


@pytest.mark.parametrize("space", [CHOICE, spec(3, 2)], ids=["discrete", "continuous"])
def test_the_first_step_follows_the_policy_gradient(space):
    """At a ratio of 1 the gradient is that of the advantage times the log density, whatever the bound."""
    agent = ppo(space, clip=0.1)
    state = start(agent)
    _, rows = agent.judge(state, discrete_rollout() if space is CHOICE else rollout(6, 4))

    def score(tree):
        log_prob, _ = agent.density(state | {"params": state["params"] | {"actor": tree}}, rows.obs, rows.action)
        return -(log_prob * rows.advantage).mean()

    expected = torch.func.grad(score)(state["params"]["actor"])
    torch.testing.assert_close(grad_of(agent, state, rows), torch.cat([g.flatten() for g in expected.values()]))


@pytest.mark.parametrize("ratio, advantage, moves", [(1.3, 1, 0), (0.7, -1, 0), (0.7, 1, 1), (1.3, -1, 1), (1.1, 1, 1), (0.9, -1, 1)])
def test_no_gradient_beyond_the_bound_on_the_side_that_pays(ratio, advantage, moves):
    agent = ppo(clip=0.2)
    state = start(agent)
    _, rows = agent.judge(state, discrete_rollout())
    far = rows._replace(log_prob=rows.log_prob - math.log(ratio), advantage=torch.full((24,), float(advantage)).double())
    loss, metrics = agent.actor_loss(state, far)
    assert grad_of(agent, state, far).any() == bool(moves)
    bounded = min(ratio * advantage, float(np.clip(ratio, 0.8, 1.2)) * advantage)
    assert loss.item() == pytest.approx(-bounded) and metrics["actor/clipped"] == float(abs(ratio - 1) > 0.2)
    assert metrics["actor/kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))


def test_the_entropy_bonus_spreads_the_policy():
    agent = ppo(spec(3, 2), entropy=0.5)
    state = start(agent)
    _, rows = agent.judge(state, rollout(6, 4))
    none = rows._replace(advantage=torch.zeros(24).double())
    after, _ = agent.descend(state, "actor", agent.actor_loss, none)
    assert (after["params"]["actor"]["log_std"] > 0).all()  # from 0, and nothing else moves it
    torch.testing.assert_close(grad_of(agent, state, none)[:2], torch.tensor([-0.5, -0.5]).double())  # d entropy / d log std = 1 each


class Logits(nn.Module):
    """A policy with parameters of its own for each of three one-hot observations."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.8], [0.0, 0.0]]))

    def forward(self, obs):
        return obs @ self.table


@pytest.mark.parametrize("baseline", [True, False])
def test_reinforce_is_the_exact_gradient_in_expectation(baseline):
    """Two steps from state 0; the mean of its gradient over all eight trajectories, by their probabilities, is that of the return.

    Whatever the critic says: it is a baseline that changes nothing in the mean, and what it says beyond the end is masked.
    """
    chance = torch.tensor([[0.7, 0.3], [0.2, 0.8]]).double()  # of the second state by the first action
    reward = torch.tensor([[1.0, -2.0], [3.0, 0.5]]).double()  # by state and action
    settings = resolve("ppo", "any", "reinforce").agent
    config = replace(settings, gamma=1.0, baseline=baseline, normalize_obs=False, normalize_return=False, hidden=(4,))
    agent = stubbed(PPO, config, Spec(Box.of(3), Discrete(2)), actor=Logits)
    state, eye = start(agent), torch.eye(3).double()

    def value(tree):
        p = tree["table"].softmax(-1)[:2]
        return (p[0] * (reward[0] + chance @ (p * reward).sum(-1))).sum()

    mean = torch.zeros(3, 2).double()
    for first, second, last in itertools.product(range(2), repeat=3):
        p = state["params"]["actor"]["table"].softmax(-1)
        weight = p[0, first] * chance[first, second] * p[second, last]
        obs, action = eye[[0, second]], torch.tensor([first, last])
        gained = torch.stack([reward[0, first], reward[second, last]])
        batch = Transitions(obs, action, gained, eye[[second, 2]], torch.tensor([1.0, 0]).double(), truncated=torch.zeros(2).double())
        _, rows = agent.judge(state, Transitions(*(None if c is None else c.unsqueeze(1) for c in batch)))
        mean += weight * grad_of(agent, state, rows).view(3, 2)
    exact = torch.func.grad(value)(state["params"]["actor"])["table"]
    torch.testing.assert_close(-2 * mean, exact)  # the loss is a mean over two steps


# The critic, the steps


def test_a_value_that_moved_too_far_earns_nothing_more():
    agent = ppo(value_clip=0.1)
    state = start(agent)
    _, rows = agent.judge(state, discrete_rollout())
    value = agent.bind(state, "critic")(rows.obs)
    beyond = rows._replace(value=value - 0.3, target=value + 1.0)  # it came 0.3 nearer to the target, of which 0.1 count
    loss, _ = agent.critic_loss(state, beyond)
    assert loss.item() == pytest.approx(1.2**2) and not grad_of(agent, state, beyond, "critic_loss").any()
    worse = rows._replace(value=value - 0.3, target=value - 1.0)
    assert grad_of(agent, state, worse, "critic_loss").any()
    assert ppo().critic_loss(state, beyond)[0].item() == pytest.approx(1.0)


def test_every_row_is_in_one_part_of_each_epoch():
    agent, parts = ppo(epochs=3, minibatches=5), []
    agent.step = lambda state, rows: (parts.append(rows), (state, {"actor/kl": torch.zeros(())}))[1]
    batch = discrete_rollout()
    agent.update(start(agent), [batch], draws(agent, 24))
    assert [len(part.advantage) for part in parts] == [5, 5, 5, 5, 4] * 3
    orders = [torch.cat([part.obs for part in parts[i : i + 5]]) for i in (0, 5, 10)]
    for order in orders:
        assert {tuple(row) for row in order.tolist()} == {tuple(row) for row in batch.obs.flatten(0, 1).tolist()}
    assert not torch.equal(orders[0], orders[1])
    _, whole = agent.judge(start(agent), batch)
    for part in parts:  # all columns of a row stay together
        at = [(whole.obs == row).all(1).nonzero().item() for row in part.obs]
        assert all(torch.equal(mine, theirs[at]) for mine, theirs in zip(part, whole))


def test_steps_end_where_the_policy_has_gone_too_far():
    """The first step is taken at a divergence of 0, the others are not."""
    batch, options = discrete_rollout(), {"actor_lr": 1e-2, "minibatches": 1}
    once, thrice = ppo(epochs=1, **options), ppo(epochs=3, target_kl=1e-9, **options)
    state = start(once)
    one, _ = once.update(state, [batch], draws(once, 24))
    three, metrics = thrice.update(state, [batch], draws(thrice, 24))
    assert difference(one, three) < 1e-12 and metrics["actor/kl"] > 1e-9
    free, _ = ppo(epochs=3, target_kl=9.0, **options).update(state, [batch], draws(thrice, 24))
    assert difference(one, free) > 1e-4


def test_ended_steps_are_not_taken_up_again():
    """Though another part of the rollout shows less of a divergence."""
    agent, divergences = ppo(epochs=2, minibatches=2, target_kl=0.5), iter([0.0, 0.7, 0.1, 0.0])

    def step(state, rows):
        params = {group: {k: leaf + 1 for k, leaf in tree.items()} for group, tree in state["params"].items()}
        return state | {"params": params}, {"actor/kl": torch.tensor(next(divergences))}

    agent.step, state = step, start(agent)
    after, _ = agent.update(state, [discrete_rollout()], draws(agent, 24))
    assert difference(after["params"], state["params"]) == pytest.approx(1)  # one step of four


def test_rates_fall_to_zero_and_gradients_are_cut():
    agent = ppo(lr_steps=10.0, actor_lr=1e-3, max_grad_norm=0.01)
    rates = [float(agent.learning_rate("actor", torch.tensor(float(n)))) for n in (1, 6, 11, 99)]
    np.testing.assert_allclose(rates, [1e-3, 5e-4, 0, 0], atol=1e-9)
    state, batch = start(agent), discrete_rollout()
    after, _ = agent.update(state, [batch], draws(agent, 24))
    for moments in after["adam"].values():  # a tenth of the gradient, after one step
        norm = torch.cat([leaf.flatten() for leaf in moments["mean"].values()]).norm() * 10
        assert norm.item() == pytest.approx(0.01)


def test_the_normalisers_are_those_of_all_that_was_seen():
    agent = ppo(normalize_obs=True, normalize_return=True)
    state = start(agent)
    batches = [discrete_rollout(seed=i) for i in range(3)]
    batches = [b._replace(obs=5 + 3 * b.obs) for b in batches]
    targets = []
    for i, batch in enumerate(batches):
        scaled = agent.normalize(state, batch)
        mean, std = agent.scale(state)
        critic = agent.bind(state, "critic")
        value = mean + std * critic(scaled.obs)
        targets.append(agent.advantages(batch, value, mean + std * critic(scaled.next_obs)) + value)
        _, rows = agent.judge(state, scaled)
        state, _ = agent.update(state, [batch], draws(agent, 24, i))
        mean, std = agent.scale(state)
        torch.testing.assert_close(rows.target, ((targets[-1] - mean) / std).flatten())
    seen, returns = torch.cat([b.obs.flatten(0, 1) for b in batches]), torch.cat(targets)
    torch.testing.assert_close(state["normalizer"]["obs_mean"], seen.mean(0))
    torch.testing.assert_close(state["normalizer"]["obs_std"], seen.std(0, correction=0) + 1e-3)
    torch.testing.assert_close(agent.scale(state)[0], returns.mean())
    torch.testing.assert_close(agent.scale(state)[1], returns.std(correction=0))


def test_the_scale_of_rewards_does_not_matter():
    """Returns and advantages are standardised: a policy learns the same from rewards in other units."""
    agent = ppo(normalize_advantage=True, normalize_return=True, epochs=2, minibatches=3)
    one = two = start(agent)
    for head in ("mlp.head.weight", "mlp.head.bias"):  # before the first rollout a critic's output is in no unit
        one["params"]["critic"][head] = torch.zeros_like(one["params"]["critic"][head])
    for i in range(4):
        batch = discrete_rollout(seed=i)
        one, _ = agent.update(one, [batch], draws(agent, 24, i))
        two, _ = agent.update(two, [batch._replace(reward=1000 * batch.reward)], draws(agent, 24, i))
    params = [{key: leaf for key, leaf in flatten(state).items() if key.startswith("params")} for state in (one, two)]
    assert max((params[0][key] - params[1][key]).abs().max() for key in params[0]) < 1e-6


def test_returns_that_are_all_the_same_are_no_trouble():
    agent = PPO(PPO.Config(hidden=(8,), epochs=2, minibatches=2), CHOICE)
    state = start(agent)
    state["params"]["critic"] = {key: torch.zeros_like(leaf) for key, leaf in state["params"]["critic"].items()}
    state, metrics = agent.update(state, [discrete_rollout(reward=1, mask=0)], draws(agent, 24))
    assert all(torch.isfinite(leaf).all() for leaf in (*flatten(state).values(), *metrics.values()))


def test_the_density_is_that_of_the_normaliser_that_acted():
    """Observations are counted after the steps: the first ratio is 1, whatever the rollout shows."""
    agent = ppo(normalize_obs=True)
    batch = discrete_rollout()
    _, metrics = agent.update(start(agent), [batch._replace(obs=100 * batch.obs)], draws(agent, 24))
    assert abs(metrics["actor/kl"]) < 1e-12 and metrics["actor/clipped"] == 0


def test_acting():
    space = Spec(Box.of(3), Box((-1.0, 0.0), (3.0, math.inf)))  # not bounded, so that actions have no unit
    agent = ppo(space)
    state, obs = start(agent), torch.ones(5, 3).double()
    mean, log_std = agent.bind(state, "actor")(obs)
    noise = torch.full((5, 2), -9.0).double()
    torch.testing.assert_close(agent.act(state, obs, noise), mean - 9)  # beyond the bounds
    assert (agent.act(state, obs) >= torch.tensor([-1.0, 0.0])).all()
    scaled = ppo(Spec(Box.of(3), Box.of(2, 0, 10)))
    state = start(scaled)
    mean, _ = scaled.bind(state, "actor")(obs)
    torch.testing.assert_close(scaled.act(state, obs, torch.ones(5, 2).double()), 5 + 5 * (mean + 1))
    choice = ppo()
    state = start(choice)
    p = choice.bind(state, "actor")(obs[0]).softmax(-1)
    uniform = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.bincount(choice.act(state, obs[:1].expand(40_000, 3), uniform), minlength=4) / 40_000
    np.testing.assert_allclose(share, p, atol=0.01)
    assert choice.act(state, obs).tolist() == [p.argmax()] * 5


def test_what_is_no_rollout_is_refused():
    batch = discrete_rollout()
    for wrong in (batch._replace(truncated=None), batch._replace(reward=batch.obs)):
        with pytest.raises(ValueError, match="PPO learns from rollouts"):
            ppo().update(start(ppo()), [wrong], draws(ppo(), 24))


# Tasks with known answers


def trained(env, steps: int, updates: int, seed: int = 0, **config):
    agent = PPO(PPO.Config(**config), env.spec)
    return agent, fit(agent, agent.init(seed), OnPolicy(env, steps, seed), updates * agent.period, seeds=seed)


def test_the_critic_knows_a_time_limit_from_an_end():
    """State 0 returns to itself and is cut after four steps, which changes nothing of its value 1 / (1 - gamma); state 1 ends."""
    moves = np.eye(3)[[[0, 0], [2, 2], [2, 2]]]
    env = finite(moves, np.ones((3, 2)), np.array([0.5, 0.5, 0]), ends=[2], count=16, horizon=4)
    options = {"gamma": 0.8, "actor_lr": 0.0, "critic_lr": 1e-2, "epochs": 2, "minibatches": 2, "hidden": (16,)}
    agent, state = trained(env, 16, 150, **options)
    mean, std = agent.scale(state)
    values = mean + std * agent.bind(state, "critic")(agent.normalize_obs(state, torch.eye(3)[:2]))
    np.testing.assert_allclose(values, [5.0, 1.0], rtol=0.03)


CORRIDOR = np.zeros((6, 2, 6))  # steps to the left and to the right; the right end pays 1, the left end 0.2
for at in range(6):
    CORRIDOR[at, 0, max(at - 1, 0)] = CORRIDOR[at, 1, min(at + 1, 5)] = 1.0


@pytest.mark.parametrize("preset, updates", [(None, 25), ("reinforce", 150)])
def test_a_corridor_is_walked_to_the_better_end(preset, updates):
    pay = np.zeros((6, 2))
    pay[1, 0], pay[4, 1] = 0.2, 1.0
    env = finite(CORRIDOR, pay, np.eye(6)[2], ends=[0, 5], count=16, horizon=30)
    config = replace(resolve("ppo", "corridor", preset).agent, gamma=0.95, hidden=(16,))
    config = replace(config, epochs=4, minibatches=4, actor_lr=3e-3) if preset is None else replace(config, actor_lr=1e-2, critic_lr=1e-2)
    agent = PPO(config, env.spec)
    state = fit(agent, agent.init(0), OnPolicy(env, 32), updates * agent.period)
    assert agent.act(state, torch.eye(6)[1:5]).tolist() == [1, 1, 1, 1]


def regulator(count: int, seed: int = 0) -> Simulated:
    """x' = x + a / 2, cost x'^2 + a^2 / 10, from x in [-1, 1]: linear and quadratic, cut after ten steps."""

    def begin(count, source):
        return {"x": 2 * torch.rand(count, 1, generator=source) - 1}

    def advance(state, action, source):
        x = state["x"] + action / 2
        return {"x": x}, -(x.square() + action.square() / 10).squeeze(1), torch.zeros(len(x), dtype=torch.bool)

    return Simulated(Spec(Box.of(1, -9, 9), Box.of(1, -2, 2)), count, begin, lambda state: state["x"], advance, 10, seed)


def test_a_linear_regulator_finds_its_gain():
    gamma, p = 0.9, 0.0
    for _ in range(200):  # Riccati: cost-to-go p x^2 before the next step's cost, action -k x
        q = 1 + gamma * p
        k = q / 2 / (0.1 + q / 4)
        p = q * (1 - k / 2) ** 2 + 0.1 * k**2
    options = {"gamma": gamma, "epochs": 5, "minibatches": 4, "hidden": (16,), "actor_lr": 3e-3, "critic_lr": 3e-3, "log_std": -0.7}
    agent, state = trained(regulator(32), 32, 80, lr_steps=1600.0, **options)
    at = torch.tensor([[-0.6], [0.0], [0.6]])
    np.testing.assert_allclose(agent.act(state, at), -k * at, atol=0.08)


def test_equal_seeds_give_equal_runs():
    options = {"epochs": 2, "minibatches": 2, "hidden": (8,)}
    (_, one), (_, two), (_, other) = (trained(regulator(4, seed), 8, 3, seed, **options) for seed in (0, 0, 1))
    assert identical(one, two) and not identical(one, other)


def test_samples_of_a_policy_lie_within_the_bounds():
    """What a user of the library is given, as by other agents."""
    agent = ppo(spec(3, 2))
    sample, _ = Policy(agent, agent.init(0)).predict(np.zeros((99, 3)), deterministic=False)
    assert np.abs(sample).max() == 1 and len(np.unique(sample)) > 50
