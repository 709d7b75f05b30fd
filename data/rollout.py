"""The one thing that flows from the sampler to the trainer.

Letters: P prompts, G responses to each, B = P*G responses, b of them chosen, T tokens of a
response, S of prompt and response together, L layers, K active experts."""
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Rollout:
    """What the sampler hands to the trainer: B = P*G responses, the G of one prompt side by side.

    Prompts [[3, 10], [4, 5, 10]], G = 2, pad = 0, end = 9 might give

        tokens  7 9 0        routes has a column for every position of prompt + response:
                7 7 9            3 10 7 9 .  .        "." is padding
                5 9 0            3 10 7 7 9  .
                6 6 6            4 5 10 5 9  .
        mask    1 1 0            4 5 10 6 6  6
                1 1 1        The last row was cut at max_new_tokens = 3: it has no end.
                1 1 0
                1 1 1        lengths 2 3 2 3: the end counts, padding does not.
    """
    prompts: list           # P lists of token ids
    tokens: torch.Tensor    # (B, T) responses
    logp: torch.Tensor      # (B, T) log-prob of each token when it was sampled; 0 in padding
    mask: torch.Tensor      # (B, T) True for response tokens
    routes: torch.Tensor    # (L, B, S, K) active experts
    lengths: torch.Tensor   # (B,) response tokens

    def select(self, rows):
        """The chosen rows as the trainer wants them: prompt and response in one line, no gap.

        Returns tokens (b, S); `keep` (b, S), True where the *next* token is a response token, so
        that the logits there score it; mask (b, T); routes (L, b, S, K); and `source` (b, S), by
        which the model computes the prompt of a group once, in the first of its chosen rows. Rows
        0 and 1 above:

            tokens  3 10 7 9 .      keep  0 1 1 0 0      source  0 1 2 3 4
                    3 10 7 7 9            0 1 1 1 0              0 1 7 8 9
        """
        device, G = self.tokens.device, len(self.tokens) // len(self.prompts)
        prompt_of = [row // G for row in rows.tolist()]
        responses = zip(self.tokens[rows].tolist(), self.lengths[rows].tolist())
        lines = [torch.tensor(self.prompts[p] + response[:n])
                 for p, (response, n) in zip(prompt_of, responses)]
        tokens = pad_sequence(lines, batch_first=True).to(device)       # (b, S)
        b, S = tokens.shape
        at = torch.arange(S, device=device)                             # (S,)
        start = torch.tensor([len(self.prompts[p]) for p in prompt_of], device=device)[:, None]
        keep = (at >= start - 1) & (at < start - 1 + self.lengths[rows][:, None])   # (b, S)
        first = torch.tensor([prompt_of.index(p) for p in prompt_of], device=device)[:, None]
        own = torch.arange(b, device=device)[:, None]                   # (b, 1), like `first`
        source = torch.where(at < start, first, own) * S + at           # (b, S)
        return tokens, keep, self.mask[rows], self.routes[:, rows, :S], source

    @staticmethod
    def join(rollouts, groups):
        """One rollout of the chosen groups, a list of their numbers for every one of `rollouts`."""
        G = len(rollouts[0].tokens) // len(rollouts[0].prompts)
        rows = [[g * G + i for g in chosen for i in range(G)] for chosen in groups]
        def pad(parts):         # each (B, T or S, ...), of which T and S may differ
            return pad_sequence(
                [row for part, these in zip(parts, rows) for row in part[these]], batch_first=True)
        tokens, logp, mask = (pad([getattr(r, name) for r in rollouts])
                              for name in ("tokens", "logp", "mask"))
        routes = pad([r.routes.permute(1, 2, 0, 3) for r in rollouts]).permute(2, 0, 1, 3)
        return Rollout([r.prompts[g] for r, chosen in zip(rollouts, groups) for g in chosen],
                       tokens, logp, mask, routes,
                       torch.cat([r.lengths[these] for r, these in zip(rollouts, rows)]))
