"""The ensemble against systems whose answers are known."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from offrl.core.space import Discrete
from offrl.data.dataset import DataError, Dataset
from offrl.models.dynamics import Dynamics
from offrl.models.ensemble import Config, Ensemble, divided, ensemble_loss

SMALL = {"members": 3, "elites": 2, "hidden": (64, 64)}
A = np.array([[0.9, 0.2, 0.0], [-0.1, 0.8, 0.1], [0.0, 0.3, 0.7]])
B = np.array([[0.5, 0.0], [0.0, -0.4], [0.3, 0.2]])


def linear_gaussian(rows=20_000, episodes=200, seed=0, scale=1.0):
    """s' = A s + B a + w, w's third component louder the greater the action; a reward without noise; obs times `scale`."""
    rng = np.random.default_rng(seed)
    obs, action = rng.standard_normal((rows, 3)), rng.uniform(-1, 1, (rows, 2))
    std = np.stack([np.full(rows, 0.1), np.full(rows, 0.3), 0.2 * np.exp(0.7 * action[:, 0])], 1)
    following = obs @ A.T + action @ B.T + std * rng.standard_normal((rows, 3))
    reward = obs[:, 0] - 0.5 * action[:, 1]
    cut = np.arange(rows) % (rows // episodes) == rows // episodes - 1
    data = Dataset.from_arrays(obs * scale, action, reward, np.zeros(rows), cut, following * scale)
    return data, std


def check_means(model, data, tolerance):
    mean, _ = model.predict(torch.from_numpy(data.obs), torch.from_numpy(data.action))
    true = data.obs @ A.T.astype(np.float32) + data.action @ B.T.astype(np.float32)
    error = (mean[..., :3].numpy() - true).std(1)
    assert error.max() < tolerance, error
    assert (mean[..., 3].numpy() - data.reward).std(1).max() < tolerance


@pytest.fixture(scope="module")
def linear():
    torch.set_num_threads(1)
    data, _ = linear_gaussian()
    model = Dynamics(Config(**SMALL | {"members": 2}, max_epochs=40))
    return model, model.fit(data, seed=0), data


def test_a_linear_gaussian_system_is_recovered(linear):
    """Each member's mean; its variance within 10 %, over all rows, and within 25 % over parts where it is 15 times as large; coverage."""
    model, _, _ = linear
    fresh, std = linear_gaussian(seed=1)
    check_means(model, fresh, 0.04)
    mean, found = model.predict(torch.from_numpy(fresh.obs), torch.from_numpy(fresh.action))
    ratio = (found[..., :3].square() / torch.from_numpy(std).float().square()).mean(1)
    np.testing.assert_allclose(ratio[:, :3].numpy(), 1, atol=0.1)
    for low in (-1.0, -0.1, 0.8):
        some = (fresh.action[:, 0] >= low) & (fresh.action[:, 0] < low + 0.2)
        np.testing.assert_allclose(found[:, some, 2].square().mean(1).numpy(), (std[some, 2] ** 2).mean(), rtol=0.25)
    z = ((torch.from_numpy(fresh.next_obs) - mean[..., :3]) / found[..., :3]).abs()
    for deviations, share in ((1, 0.6827), (1.96, 0.95)):
        np.testing.assert_allclose((z < deviations).float().mean(1).numpy(), share, atol=0.02)


def test_the_likelihood_comes_near_the_entropy(linear):
    model, _, _ = linear
    fresh, std = linear_gaussian(seed=2)
    mean, found = model.predict(torch.from_numpy(fresh.obs), torch.from_numpy(fresh.action))
    normal = torch.distributions.Normal(mean[..., :3], found[..., :3])
    likelihood = -normal.log_prob(torch.from_numpy(fresh.next_obs)).sum(-1).mean(1)
    entropy = 0.5 * np.log(2 * math.pi * math.e * std**2).sum(1).mean()
    assert entropy - 0.02 < likelihood.min() and likelihood.max() < entropy + 0.05


def test_a_reward_without_noise_is_finite_and_quiet(linear):
    model, _, data = linear
    _, std = model.predict(torch.from_numpy(data.obs[:100]), torch.from_numpy(data.action[:100]))
    assert torch.isfinite(std).all() and (std[..., 3] < 0.05 * float(data.reward.std())).all()


def test_what_is_reported_is_the_error_on_rows_held_out(linear):
    """Noise sets the least error; the linear model has it; no change has far more."""
    model, found, data = linear
    assert found.rows == pytest.approx(2000, abs=100) and found.error.shape == (2, 4)
    noise = np.array([0.1**2, 0.3**2]) / (data.next_obs - data.obs).var(0)[:2]
    np.testing.assert_allclose(found.linear[:2], noise, rtol=0.15)
    np.testing.assert_allclose(found.error[:, :2], np.tile(noise, (2, 1)), rtol=0.2)
    assert (found.unchanged > 0.9).all() and found.linear[3] < 1e-6


def test_units_do_not_matter():
    """Observations in units of a millionth, with an offset, train the same model."""
    for scale in (1.0, 1e6):
        data, _ = linear_gaussian(4000, 40, scale=scale)
        model = Dynamics(Config(**SMALL, max_epochs=5))
        error = model.fit(data).error
        if scale == 1.0:
            first = error
    np.testing.assert_allclose(error, first, rtol=0.05)


def test_the_loss_has_its_closed_form_optimum():
    """A constant input: the mean of the targets, and the logarithm of their variance."""
    torch.manual_seed(0)
    target = torch.tensor([1.0, -2.0]) + torch.tensor([0.5, 0.1]) * torch.randn(1000, 2)
    net = Ensemble((1, 8, 2), 2)
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    x = torch.ones(2, 1000, 1)
    for _ in range(800):
        optimizer.zero_grad()
        ensemble_loss(net, dict(net.named_parameters()), x, target.expand(2, -1, -1), 0.0).backward()
        optimizer.step()
    mean, log_var = (each[:, 0].detach() for each in net(x))
    torch.testing.assert_close(mean, target.mean(0).expand(2, 2), atol=0.02, rtol=0)
    torch.testing.assert_close(log_var, target.var(0, correction=0).log().expand(2, 2), atol=0.05, rtol=0)


def test_the_bounds_are_drawn_together():
    net = Ensemble((2, 8, 2), 2)
    x, y = torch.randn(2, 50, 2), torch.randn(2, 50, 2)
    plain, drawn = (
        torch.autograd.grad(ensemble_loss(net, dict(net.named_parameters()), x, y, w), [net.max_log_var, net.min_log_var])
        for w in (0.0, 0.01)
    )
    for before, after, sign in zip(plain, drawn, (1, -1)):
        torch.testing.assert_close(after - before, torch.full_like(before, sign * 0.01 / 2))


def test_members_are_independent():
    """One member's error reaches its weights alone."""
    net = Ensemble((2, 8, 8, 3), 4)
    x = torch.randn(4, 10, 2)
    mean, log_var = net(x)
    for gradient in torch.autograd.grad(mean[2].sum() + log_var[2].sum(), list(net.parameters())):
        assert gradient[2].any() and not gradient[[0, 1, 3]].any()
    single = Ensemble((2, 8, 8, 3), 1)
    single.load_state_dict({name: tensor[2:3] for name, tensor in net.state_dict().items()})
    torch.testing.assert_close(single(x[2])[0][0], mean[2])


def test_held_out_rows_are_whole_trajectories():
    from offrl.models.dynamics import _split

    episode = np.repeat(np.arange(20), 50)
    train, held = _split(episode, 0.1, 0)
    assert len(held) == 100 and not set(episode[train]) & set(episode[held])
    assert set(map(int, train)) | set(map(int, held)) == set(range(1000))


def test_one_episode_alone_is_cut_in_two():
    data, _ = linear_gaussian(500, 1)
    model = Dynamics(Config(**SMALL, max_epochs=1))
    with pytest.warns(UserWarning, match="one episode alone"):
        assert model.fit(data).rows == 50


def test_a_constant_dimension_is_no_trouble():
    data, _ = linear_gaussian(2000, 20)
    columns = np.concatenate([data.obs, np.full((2000, 1), 7.0)], 1), np.concatenate([data.next_obs, np.full((2000, 1), 7.0)], 1)
    data = Dataset.from_arrays(columns[0], data.action, data.reward, data.terminated, data.truncated, columns[1])
    model = Dynamics(Config(**SMALL, max_epochs=10))
    assert np.isfinite(model.fit(data).error).all()
    mean, std = model.predict(torch.from_numpy(data.obs), torch.from_numpy(data.action))
    assert (mean[..., 3] - 7).abs().max() < 0.2 and torch.isfinite(std).all()


@pytest.mark.parametrize("field", ["obs", "action", "reward", "next_obs"])
def test_numbers_that_are_not_finite_are_named(field):
    data, _ = linear_gaussian(200, 20)
    column = getattr(data, field)
    column[17] = np.nan
    name = {"obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations"}[field]
    with pytest.raises(DataError, match=f"{name}: 1 rows hold NaN or infinity, the first is row 17"):
        Dynamics(Config(**SMALL)).fit(data)


def test_what_cannot_be_modelled_is_refused():
    few = Dataset.from_arrays(np.zeros((5, 1)), np.zeros((5, 1)), np.zeros(5), np.ones(5))
    with pytest.raises(DataError, match="10 rows with a successor at least; the data has 5"):
        Dynamics().fit(few)
    choices = Dataset.from_arrays(np.zeros((20, 1)), np.zeros(20, int), np.zeros(20), np.ones(20), action_space=Discrete(2))
    with pytest.raises(DataError, match="continuous actions"):
        Dynamics().fit(choices)


def test_rewards_may_be_a_vector():
    data, _ = linear_gaussian(2000, 20)
    data = Dataset.from_arrays(
        data.obs, data.action, np.stack([data.reward, -data.reward], 1), data.terminated, data.truncated, data.next_obs
    )
    model = Dynamics(Config(**SMALL, max_epochs=15))
    model.fit(data)
    noise = {"member": torch.rand(50), "normal": torch.zeros(50, 5)}
    step = model.step(torch.from_numpy(data.obs[:50]), torch.from_numpy(data.action[:50]), noise)
    assert step.reward.shape == (50, 2) and (step.reward[:, 0] + step.reward[:, 1]).abs().mean() < 0.2


def test_a_step_is_a_draw_from_an_elite(linear):
    model, _, data = linear
    obs, action = torch.from_numpy(data.obs[:6]), torch.from_numpy(data.action[:6])
    mean, std = model.predict(obs, action)
    noise = {"member": torch.tensor([0.0, 0.49, 0.5, 0.99, 0.0, 0.99]), "normal": torch.randn(6, 4)}
    step = model.step(obs, action, noise)
    best, second = model.elites.tolist()
    for row, member in enumerate([best, best, second, second, best, second]):
        expected = mean[member, row] + std[member, row] * noise["normal"][row]
        torch.testing.assert_close(torch.cat([step.next_obs[row], step.reward[row : row + 1]]), expected)
    assert model.score[best] == model.score.min()


def test_equal_seeds_fit_equal_models_and_others_do_not():
    data, _ = linear_gaussian(1000, 20)
    states = []
    for seed in (0, 0, 1):
        model = Dynamics(Config(**SMALL, max_epochs=2))
        before = torch.random.get_rng_state()
        model.fit(data, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["weights.0"], states[2]["weights.0"])


@pytest.mark.parametrize("members", range(1, 9))
@pytest.mark.parametrize("threads", range(1, 10))
def test_threads_divide_an_epoch_evenly(members, threads):
    """Each member is learned once and whole, each thread has as much to do, and its waits are over before they begin."""
    shares, found = divided(members, threads), {}
    assert len(shares) == min(members, threads)
    for share in shares:
        now = 0
        for piece in share:
            begin, now = now, now + (piece.end - piece.begin) * (piece.members[1] - piece.members[0])
            for member in range(*piece.members):
                found.setdefault(member, []).append((piece.begin, piece.end, begin, now))
        assert now == max(1, Fraction(members, threads))
    assert sorted(found) == list(range(members))
    for pieces in map(sorted, found.values()):
        assert pieces[0][0] == 0 and pieces[-1][1] == 1
        for (_, end, _, over), (begin, _, now, _) in zip(pieces, pieces[1:]):
            assert begin == end and over <= now


def test_threads_divide_the_members_and_change_nothing_else():
    data, _ = linear_gaussian(1000, 20)
    states, before = [], torch.get_num_threads()
    for threads in (1, 2, 8):
        model = Dynamics(Config(**SMALL | {"members": 3}, max_epochs=2))
        model.fit(data, threads=threads)
        states.append(model.state_dict())
    assert torch.get_num_threads() == before
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], atol=1e-4, rtol=1e-4)


def test_a_subset_and_a_saved_model_predict_the_same(linear):
    model, _, data = linear
    obs, action = torch.from_numpy(data.obs[:9]), torch.from_numpy(data.action[:9])
    part = model.subset(1)
    torch.testing.assert_close(part.predict(obs, action)[0], model.predict(obs, action)[0][:1])
    assert part.elites.tolist() == [0]
    again = Dynamics(model.config)
    again.load_state_dict(model.state_dict(), data.spec)
    assert torch.equal(again.predict(obs, action)[1], model.predict(obs, action)[1])
    with pytest.raises(ValueError, match="not the weights of this ensemble"):
        Dynamics(Config(members=2, hidden=(16,))).load_state_dict(model.state_dict(), data.spec)
    with pytest.raises(ValueError, match="2 members, not 4"):
        model.subset(4)


def test_each_member_keeps_its_best_weights(monkeypatch):
    """Trained too long on few rows, the members are at their best at different times; what is left has each one's best score."""
    data, _ = linear_gaussian(300, 20)
    model, scores = Dynamics(Config(**SMALL, lr=1e-2, max_epochs=60, patience=60)), []
    held_out = Dynamics._held_out
    monkeypatch.setattr(Dynamics, "_held_out", lambda *args: scores.append((found := held_out(*args))[1]) or found)
    model.fit(data)
    of_epochs = torch.stack(scores[:-1])
    assert (of_epochs[-1] > of_epochs.amin(0) + 0.05).any()  # overfitted by then
    torch.testing.assert_close(scores[-1], of_epochs.amin(0))


@pytest.mark.slow
@pytest.mark.parametrize("precision, apart", [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_steps_are_the_same_steps(precision, apart, threads):
    data, _ = linear_gaussian()
    fits = []
    for mode in ("eager", "compile"):
        model = Dynamics(Config(**SMALL, max_epochs=2))
        model.fit(data, mode=mode, precision=precision, threads=threads)
        fits.append(model.state_dict())
    for name, tensor in fits[0].items():
        torch.testing.assert_close(fits[1][name], tensor, atol=apart, rtol=apart, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_bfloat16_fits_the_same_system():
    data, _ = linear_gaussian()
    model = Dynamics(Config(**SMALL, max_epochs=30))
    model.fit(data, precision="bf16")
    check_means(model, data, 0.06)
