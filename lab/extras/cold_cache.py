"""The result of a cold start is kept in out/, for later runs that would make the same."""
import dataclasses
import hashlib
import inspect
import os
from pathlib import Path

import torch

import gspo
import moe
from data import demonstrations, tokenizer
from lab import muon, runs
from lab.command_line import task_options
from lab.options import option

OTHER_OPTIONS = ("seed", "threads", "max_grad_norm", "max_new_tokens")


@dataclasses.dataclass
class Options:
    """the cache of cold starts"""
    fresh: bool = option(False, "make the cold start, cached or not")


def wanted(config) -> bool:
    return True


class Extra:
    def path(self) -> Path:
        """A name for all that decides a cold start: options, task, the files with the code,
        vocabulary, version of torch, kind of device, number of processes."""
        names = list(OTHER_OPTIONS)
        for group in type(self.config).__mro__:
            if group.__name__ in ("ModelOptions", "ColdStartOptions"):
                names += [field.name for field in dataclasses.fields(group)]
        Trainer = type(self).__mro__[-2]        # the core's, behind all extras
        files = [Path(inspect.getsourcefile(x)) for x in (
            moe, gspo, muon, demonstrations, tokenizer, Trainer)]
        files += sorted(Path(inspect.getsourcefile(type(self.task))).parent.glob("*.py"))
        code = [path.read_bytes() for path in files]        # of the task's helpers too
        parts = ({name: self.options[name] for name in names}, task_options(self.task), code,
                 self.tokenizer.tokens, torch.__version__, self.model.embed.weight.device.type,
                 os.environ.get("WORLD_SIZE"))
        return Path(f"out/cold-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}.pt")

    def cached(self, path: Path) -> bool:
        return path.exists() and not self.config.fresh

    def keep(self, path: Path):
        try:
            path.parent.mkdir(exist_ok=True)
            runs.save(path, {"model": self.model.state_dict(),
                             "seconds": self.progress["seconds_cold_start"]})
        except OSError as error:        # the run itself has its own folder
            print(f"  the cold start is not kept for later runs: {error}")

    def cold_start(self):
        path = self.path()
        if not self.cached(path):
            super().cold_start()
            self.keep(path)
            return
        kept = runs.load(path, "--fresh makes it again")
        self.model.load_state_dict(kept["model"])
        self.progress["seconds_cold_start"] = kept["seconds"]
        print(f"1 cold start: taken from {path} (--fresh makes it again)")
