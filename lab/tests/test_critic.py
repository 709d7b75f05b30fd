"""PPO's critic: advantage estimation by its definition, and what the critic learns."""
import torch
from pytest import approx
from torch.nn import functional as F

from lab.extras import critic
from lab.tests import formulas
from test_gspo import (
    REWARDS, closely, drifted, evaluate, exactly,
    one_thread_and_one_seed,        # noqa: F401 - a fixture of all tests here
    parametrize, random_batch, sample, slow_scores, tensor, three_seeds, tiny)


def test_generalised_advantages_by_their_definition():
    gamma = 0.9
    lam = 0.8
    real = torch.arange(7) < torch.tensor([[7], [1], [4]])          # after its end a row is 0
    rewards = torch.randn(3, 7).double() * real
    values = torch.randn(3, 7).double() * real
    surprise = rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values
    expected = torch.zeros(3, 7).double()
    for t in range(7):
        for later in range(t, 7):
            expected[:, t] += (gamma * lam) ** (later - t) * surprise[:, later]
    exactly(critic.gae(rewards, values, gamma, lam), expected)


@parametrize("value, loss, slope", [(0.1, 0.405, -0.9), (0.5, 0.32, 0), (-0.5, 1.125, -1.5)])
def test_a_value_gains_nothing_by_moving_beyond_its_clip_range(value, loss, slope):
    value = tensor([[value]]).requires_grad_()              # it was 0 and should be 1
    error = critic.value_loss(value, tensor([[0]]), tensor([[1]]), value < 9, tensor([1]))
    error.backward()
    assert error.item() == approx(loss)
    assert value.grad.item() == approx(slope)


def ppo(model=None, **options):
    return formulas.trainer(model, algorithm="ppo", **options)


def rewarded():
    rollout = sample(tiny())
    rollout.rewards = torch.arange(12.0)
    return rollout


def test_a_new_critic_guesses_0_and_the_last_token_is_paid():
    rollout = rewarded()
    ppo(gae_lambda=0.0).advantages(rollout)
    assert not rollout.values.any()
    for returns, reward, n in zip(rollout.returns, rollout.rewards, rollout.lengths.tolist()):
        assert returns[:n].tolist() == [0] * (n - 1) + [reward]


def test_whatever_the_critic_guesses_lambda_1_returns_the_reward():
    trainer = ppo(gae_lambda=1.0)
    torch.nn.init.normal_(trainer.head.weight)
    rollout = rewarded()
    trainer.advantages(rollout)
    mask = rollout.response_mask
    reward = rollout.rewards[:, None].expand_as(mask)
    closely(rollout.returns[mask], reward[mask])
    error = (reward - rollout.values)[mask].square().mean()
    assert trainer.measured["value_error"] == approx(error.item())


def test_a_reward_is_worth_gamma_times_as_much_a_token_earlier():
    rollout = rewarded()
    rollout.rewards = torch.ones(12)
    ppo(gamma=0.5, gae_lambda=1.0).advantages(rollout)
    for returns, n in zip(rollout.returns, rollout.lengths.tolist()):
        closely(returns[:n], 0.5 ** torch.arange(n - 1.0, -1, -1))


@parametrize("gae_lambda", [1.0, 0.5])
def test_advantages_have_mean_0_and_deviation_1_over_all_tokens(gae_lambda):
    trainer = ppo(gae_lambda=gae_lambda)
    torch.nn.init.normal_(trainer.head.weight)
    rollout = rewarded()
    A = trainer.advantages(rollout)[rollout.response_mask]
    assert A.mean().item() == approx(0, abs=1e-6)
    assert A.std().item() == approx(1, rel=1e-5)


def test_a_value_is_a_linear_map_of_the_hidden_state_of_the_column_before():
    trainer = ppo()
    torch.nn.init.normal_(trainer.head.weight)
    rollout = rewarded()
    rollout.routes = rollout.routes.flip(0)                 # which nobody replays
    trainer.advantages(rollout)
    for row, n in enumerate(rollout.lengths.tolist()):
        tokens = rollout.tokens[row, rollout.mask[row]][None]
        hidden = trainer.model(tokens, tokens > -1).hidden[0, -n - 1:-1]
        closely(rollout.values[row, :n], hidden @ trainer.head.weight[0] + trainer.head.bias)


def test_the_critic_learns_what_responses_were_worth():
    model, rollout = drifted()
    trainer = ppo(model, gae_lambda=1.0)                    # it guesses 0
    formulas.update(trainer, rollout, lr=0.0)
    # The loss of a response is half the mean squared error of its tokens, times VALUE_COEF.
    assert trainer.head.bias.grad.item() == approx(0.1 * (0 - REWARDS.mean().item()))


def test_the_critic_moves_the_policy_through_the_advantages_alone_while_it_guesses_0():
    """The gradient of the value loss for the hidden states is the head's weight, 0, times it."""
    model, rollout = drifted()
    trainer = ppo(model)
    step, = formulas.update(trainer, rollout, lr=0.0)
    J = 0
    for row, n in enumerate(rollout.lengths.tolist()):
        logp, _ = slow_scores(model, rollout, row)
        w = (logp - rollout.logp_old[row, :n]).exp()
        A = rollout.advantages[row, :n]
        J = J + torch.minimum(w * A, w.clamp(0.8, 1.2) * A).mean() / 16
    assert step.loss == approx(-J.item(), abs=1e-6)
    expected = torch.autograd.grad(-J, list(model.parameters()))
    closely([p.grad for p in trainer.model.parameters()], list(expected))


@three_seeds
def test_the_loss_of_the_policy_is_that_of_grpo(seed):
    d, _ = random_batch(seed)
    A, _ = random_batch(seed + 10, scale=1.0)
    one = evaluate("ppo", d, A, 0.03, 0.04)
    two = evaluate("grpo", d, A, 0.03, 0.04)
    assert one.loss == two.loss
    assert torch.equal(one.grad, two.grad)


def test_repeated_updates_bring_values_to_the_rewards():
    rollout = sample(tiny(), group_size=1)
    rollout.rewards = torch.tensor([1.0, 0.0, 0.5])
    trainer = ppo(gae_lambda=1.0)
    trainer.optimizer = torch.optim.AdamW([*trainer.model.parameters(),
                                           *trainer.head.parameters()], lr=0.01)
    trainer.config.group_size = 1
    errors = []
    for _ in range(30):
        formulas.update(trainer, rollout, lr=0.01)
        errors.append(trainer.measured["value_error"])
    assert errors[-1] < 0.2 * errors[0]
