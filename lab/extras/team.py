"""Many processes: torchrun --nproc_per_node=2 train.py. Each has the whole model and a share of the
demonstrations and groups; gradients and logged numbers are averaged. Process 0 leaves files."""
import dataclasses
import itertools
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gspo
from lab.report import mean_row


def wanted(config) -> bool:
    n = int(os.environ.get("WORLD_SIZE", 1))
    if config.prompts % n or config.cold_tokens % n or config.prompts // n < config.mini_batches:
        raise ValueError(f"{n} processes: prompts and cold_tokens must be multiples of it, and "
                         f"mini_batches at most prompts / {n}")
    return n > 1


class Extra:
    def __init__(self, config, task):
        if torch.cuda.is_available() and config.device in ("auto", "cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        self.rank = dist.get_rank()
        self.n = dist.get_world_size()
        share = dataclasses.replace(config, prompts=config.prompts // self.n,
                                    cold_tokens=config.cold_tokens // self.n)
        super().__init__(share, task)
        self.options |= vars(config)
        self.demonstrations = itertools.islice(self.demonstrations, self.rank, None, self.n)
        entry = gspo.ALGORITHMS[config.algorithm]
        def token_weights(lengths):
            """As if one process had the rows of all; times n, because gradients are averaged."""
            of_all = lengths.new_tensor(self.gather(lengths.tolist()))      # (n, rows)
            return entry.token_weights(of_all.flatten()).view_as(of_all)[self.rank] * self.n
        gspo.ALGORITHMS[config.algorithm] = entry._replace(token_weights=token_weights)
        if self.rank:
            sys.stdout = open(os.devnull, "w")
            self.temporary = tempfile.TemporaryDirectory()      # as long as this process lives
            self.folder = Path(self.temporary.name)

    def gather(self, mine) -> list:
        """What each process has, process 0 first."""
        received = [None] * self.n
        dist.all_gather_object(received, mine)
        return received

    def collect(self, model, rng):
        rollout, mine = super().collect(model, random.Random(f"{rng.random()} {self.rank}"))
        return rollout, sum(self.gather(mine), [])

    def gradient(self, model, batch, *arguments):
        """A process that has nothing to learn, while another has, takes part in the step."""
        learned = super().gradient(model, batch, *arguments)
        somebody = any(self.gather(learned is not None))
        return learned or (gspo.Learned(batch, None, 0.0, None) if somebody else None)

    def optimizer_step(self, parameters, optimizers, max_grad_norm):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = parameters_to_vector(gradients)          # one message takes less time than many
        dist.all_reduce(flat)
        vector_to_parameters(flat / self.n, gradients)
        for p, gradient in zip(parameters, gradients):
            p.grad = gradient
        return super().optimizer_step(parameters, optimizers, max_grad_norm)

    def measure(self, learned):
        mine = iter(super().measure([x for x in learned if x.scores is not None]))
        rows = [{"loss": 0.0} if x.scores is None else next(mine) for x in learned]
        self.measured = mean_row(self.gather(self.measured))
        return [mean_row(of_each) | {"mini_batch": x.mini_batch}
                for x, *of_each in zip(learned, *self.gather(rows))]

    def run(self):
        try:
            super().run()
        except RuntimeError as error:
            if "onnection" not in str(error):
                raise
            sys.exit("train.py: another process is gone; --resume goes on from the last checkpoint")

    def must_stop(self):
        return any(self.gather(super().must_stop()))

    def catch(self, *arguments):        # torchrun passes on what a process has had already
        self.asked_to_stop = True

    def cached(self, path):
        return all(self.gather(super().cached(path)))

    def spread(self, advantages):
        return super().spread(torch.cat(self.gather(advantages.cpu())))
