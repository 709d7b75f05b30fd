"""--algorithm ppo (1707.06347): GRPO's loss, but a critic gives the advantages, not the group.

The critic is a learned guess, at every token, of the reward to come: a linear map of the hidden
state that the logits are made of."""
import dataclasses

import torch
from torch import Tensor, nn

import gspo
from lab.options import option

gspo.ALGORITHMS["ppo"] = gspo.Algorithm(gspo.grpo, (0.2, 0.2))
COLUMNS = ("value_error",)
VALUE_CLIP = 0.2        # how far a value may move before its loss stops caring
VALUE_COEF = 0.1        # weight of the critic's loss beside that of the policy


@dataclasses.dataclass
class Options:
    """ppo"""
    gamma: float = option(1.0, "ppo: a reward a token later is worth this much", 0, 1)
    gae_lambda: float = option(0.95, "ppo: 1 trusts rewards, 0 the critic", 0, 1)


def wanted(config) -> bool:
    return config.algorithm == "ppo"


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (1506.02438, Eq. 16) of rewards and values (B, T), both 0
    after the end -> (B, T): the sum over l of (gamma lam)^l (r_t+l + gamma v_t+l+1 - v_t+l)."""
    advantages = torch.zeros_like(values)
    advantage = 0.0
    next_value = 0.0
    for t in reversed(range(values.shape[1])):
        surprise = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = surprise + gamma * lam * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages


def value_loss(values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor,
               weights: Tensor) -> Tensor:
    """Half the squared error of values (B, T), summed with weights (B,) to a scalar; a move beyond
    VALUE_CLIP gains nothing. ValueError for other shapes, which could broadcast."""
    if not values.shape == values_old.shape == returns.shape == mask.shape:
        raise ValueError(f"values {tuple(values.shape)}, values_old {tuple(values_old.shape)}, "
                         f"returns {tuple(returns.shape)} and mask {tuple(mask.shape)} must be "
                         "(B, T)")
    near = values_old + (values - values_old).clamp(-VALUE_CLIP, VALUE_CLIP)
    error = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
    return (torch.where(mask, error, 0).sum(dim=1) * weights).sum()


class Extra:
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.head = nn.Linear(self.config.d_model, 1).to(self.model.embed.weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer.add_param_group({"params": list(self.head.parameters())})
        self.loss_terms.append(self.critic_term)

    def values(self, scores) -> Tensor:
        with torch.autocast(scores.hidden.device.type, enabled=False):     # in fp32, as norms are
            return self.head(scores.hidden)[..., 0]                        # (B, T)

    def critic_term(self, batch, scores):
        return VALUE_COEF * value_loss(self.values(scores), batch.values, batch.returns,
                                       batch.response_mask, batch.token_weights)

    @torch.no_grad()
    def advantages(self, rollout):
        """Advantages per token (B, T), brought to mean 0 and deviation 1 over all tokens as in
        verl. The reward is earned by the last token."""
        config = self.config
        mask = rollout.response_mask
        scores = self.score(self.model, rollout, config.routing_replay != "none")
        rollout.values = self.values(scores) * mask
        at_end = torch.zeros_like(rollout.values)
        at_end[range(len(at_end)), rollout.lengths - 1] = rollout.rewards
        advantages = gae(at_end, rollout.values, config.gamma, config.gae_lambda)
        rollout.returns = advantages + rollout.values
        error = (rollout.returns - rollout.values)[mask]
        self.measured["value_error"] = error.square().mean().item()
        std, mean = self.spread(advantages[mask])
        return (advantages - mean) / (std + 1e-8)

    def spread(self, advantages):
        return torch.std_mean(advantages)

    def state_dict(self):
        return super().state_dict() | {"head": self.head.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.head.load_state_dict(state["head"])
