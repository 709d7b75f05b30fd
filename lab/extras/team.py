"""Many processes: torchrun --nproc_per_node=2 train.py. Each has the whole model, and its share of
the demonstrations and groups. Gradients are averaged before every step, so that all models stay
equal; logged numbers are averaged too. Process 0 evaluates, prints and leaves files."""
import dataclasses
import itertools
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import gspo


def wanted(config) -> bool:
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    if config.prompts % n_processes or config.cold_tokens % n_processes:
        raise ValueError(f"prompts and cold_tokens must be multiples of {n_processes} processes")
    return n_processes > 1


def mean(dicts: list[dict]) -> dict:
    """The mean of each entry, a number or a list of numbers, over the processes that have it."""
    result = {}
    for name in set(itertools.chain(*dicts)):
        values = [d[name] for d in dicts if name in d]
        result[name] = torch.tensor(values, dtype=torch.float64).mean(dim=0).tolist()
    return result


class Extra:
    def __init__(self, config, task):
        on_gpu = torch.cuda.is_available() and config.device in ("auto", "cuda")
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo")
        self.rank = dist.get_rank()
        self.team_size = dist.get_world_size()
        whole = {"prompts": config.prompts, "cold_tokens": config.cold_tokens}
        share = {name: number // self.team_size for name, number in whole.items()}
        super().__init__(dataclasses.replace(config, **share), task)
        self.options |= whole
        self.share_weights(config.algorithm)
        self.demonstrations = itertools.islice(self.demonstrations, self.rank, None, self.team_size)
        if self.rank:
            sys.stdout = open(os.devnull, "w")
            self.temporary = tempfile.TemporaryDirectory()      # as long as this process lives
            self.folder = Path(self.temporary.name)

    def gather(self, mine) -> list:
        """What each process has, process 0 first."""
        received = [None] * self.team_size
        dist.all_gather_object(received, mine)
        return received

    def share_weights(self, algorithm):
        """Tokens weigh what they would if one process had the rows of all, times the number of
        processes, because gradients are averaged."""
        row = gspo.ALGORITHMS[algorithm]

        def weights(lengths, longest):
            everybody = self.gather(lengths.tolist())
            all_lengths = lengths.new_tensor(sum(everybody, []))
            all_weights = row.weights(all_lengths, longest) * self.team_size
            return all_weights.split([len(theirs) for theirs in everybody])[self.rank]
        gspo.ALGORITHMS[algorithm] = row._replace(weights=weights)

    def collect(self, sampler, rng):
        """A rollout of this process, and the responses of all."""
        rollout, mine = super().collect(sampler, random.Random(f"{rng.random()} {self.rank}"))
        return rollout, sum(self.gather(mine), [])

    def gradient(self, model, batch, *arguments):
        """A process that has nothing to learn, while another has, takes part in the step."""
        learned = super().gradient(model, batch, *arguments)
        if any(self.gather(learned is not None)):
            return learned or gspo.Learned(batch, None, 0.0, None)
        return None

    def step(self, parameters, optimizers, max_grad_norm):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / self.team_size).split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts):
            p.grad = part.view_as(p)
        return super().step(parameters, optimizers, max_grad_norm)

    def measure(self, steps):
        """A process that had nothing to learn in a step has nothing to say of it."""
        mine = super().measure([step for step in steps if step.learned.scores is not None])
        row_of = {row["mini_batch"]: row for row in mine}
        rows = [row_of.get(step.mini_batch, {}) for step in steps]
        self.measured = mean(self.gather(self.measured))
        return [mean(row_of_each) for row_of_each in zip(*self.gather(rows))]

    def evaluate(self):
        return self.gather(super().evaluate() if self.rank == 0 else None)[0]

    def run(self):
        try:
            super().run()
        except RuntimeError as error:
            if "onnection" not in str(error):
                raise
            sys.exit(f"train.py: another process is gone ({str(error).splitlines()[0]}); --resume "
                     "goes on from the last checkpoint, if this run has one yet")

    # One decision of all, for interrupts and cold_cache:
    def must_stop(self):
        return any(self.gather(super().must_stop()))

    def catch(self, *arguments):        # torchrun passes on what a process has had already
        self.asked_to_stop = True

    def cached(self, path):
        return all(self.gather(super().cached(path)))

    def keep(self, path):
        if self.rank == 0:
            super().keep(path)
