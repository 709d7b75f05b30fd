"""What test_team.py has two processes do, and then one: the same updates."""
import random
import signal
import sys

import torch
import torch.distributed as dist

import gspo
import train
from data import arithmetic, demonstrations
from lab import report
from lab.tests.tools import SHORT, do_nothing, few_held_out, no_curves, odd_trainer, signal_at

OPTIONS = [
    {},
    {"algorithm": "grpo", "mini_batches": 4},
    {"algorithm": "dapo", "mini_batches": 4, "micro_tokens": 60},
    {"algorithm": "ppo", "epochs": 2},
    {"algorithm": "gspo_token", "correction": "tis", "overlong": 20},
    {"routing_replay": "r3", "mini_batches": 4},
    {"recompute_logp_old": True, "epochs": 2},
    {"kl_coef": 1.0, "epochs": 2},
    {"dtype": "float16", "mini_batches": 1},
]


def whole_rollout():
    """Eight groups, of which the first has no signal and the last two have none."""
    torch.manual_seed(0)
    model = train.moe.MoETransformer(odd_trainer().model.config)
    rollout, _ = odd_trainer().collect(model, random.Random(0))
    rollout.rewards = torch.arange(32.0).remainder(3)
    rollout.rewards[:4] = 1.0
    rollout.rewards[24:] = 0.0
    return rollout


def update(rollout, options):
    """-> all weights after it, and rows with the number, the loss and the norm of each step."""
    trainer = odd_trainer(clip_low=0.05, clip_high=0.05, **options)
    parameters = []
    for group in trainer.optimizer.param_groups:
        parameters += group["params"]
    trainer.optimizer = torch.optim.SGD(parameters, lr=0.1)
    rollout = rollout.select(torch.arange(len(rollout.tokens)))
    rollout.advantages = trainer.advantages(rollout)
    learned = gspo.update(trainer.model, trainer.optimizer, rollout, trainer.config,
                          trainer.loss_terms, trainer.gradient, trainer.optimizer_step)
    rows = [[row["mini_batch"], row["loss"], row["grad_norm"]] for row in trainer.measure(learned)]
    return [torch.cat([p.detach().flatten() for p in parameters]), rows]


def cold_gradient(rank, n):
    """The gradient of a step of the cold start. Without the balance loss: that of two halves is not
    quite that of both."""
    trainer = odd_trainer(cold_steps=1, cold_tokens=400, balance=0.0)
    examples = next(demonstrations.batches(trainer.task, trainer.tokenizer, 0, 400))
    trainer.demonstrations = iter([examples[rank::n]])
    found = []
    step = train.Trainer.optimizer_step

    def look(parameters, optimizers, max_grad_norm):
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
        return step(parameters, optimizers, max_grad_norm)
    train.Trainer.optimizer_step = staticmethod(look)
    train.Trainer.cold_start(trainer)
    train.Trainer.optimizer_step = staticmethod(step)
    return found[0]


def results(rollout, rank=0, n=1):
    """Of n processes, each has every n-th group and every n-th demonstration."""
    rows = torch.arange(32).view(8, 4)[rank::n].flatten()
    table = dict(gspo.ALGORITHMS)
    found = []
    for options in OPTIONS:
        gspo.ALGORITHMS.update(table)       # a team puts its own token weights there
        found.append(update(rollout.select(rows), options))
    gspo.ALGORITHMS.update(table)
    return found + [[cold_gradient(rank, n), []]]


if __name__ == "__main__":
    folder = sys.argv[1]
    dist.init_process_group()
    dist.init_process_group = do_nothing      # once is enough for all trainers
    rollout = torch.load(f"{folder}/rollout.pt", weights_only=False)
    of_two = results(rollout, dist.get_rank(), 2)
    if dist.get_rank() == 0:
        torch.save(of_two, f"{folder}/two.pt")
    report.curves = no_curves
    arithmetic.Task.held_out = few_held_out
    table = dict(gspo.ALGORITHMS)
    for name in ("first", "second"):
        gspo.ALGORITHMS.update(table)
        train.main([*SHORT, "3", "--mini_batches", "2", "--fresh", "--out", f"{folder}/{name}"])
    gspo.ALGORITHMS.update(table)
    if dist.get_rank() == 1:
        signal_at(2, signal.SIGINT)
    try:
        train.main([*SHORT, "3", "--mini_batches", "2", "--out", f"{folder}/stopped"])
    except SystemExit as stop:
        print("exit code", stop.code)
