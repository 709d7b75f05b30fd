"""What a run leaves in its folder, and how to find it again."""
import contextlib
import io
import os
import re
import sys
from pathlib import Path

import torch

from lab import report
from lab.options import fail

LAYOUT = 4          # of a checkpoint; raise it when older ones can no longer be read
RUN_FILES = {"config.json", "metrics.csv", "updates.csv", "evaluations.csv", "samples.txt",
             "summary.json", "cold_start.pt", "checkpoint.pt", "curves.png", "lock"}


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is the best one here. ValueError for one that is not here."""
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.append("mps")
    if torch.cuda.is_available():
        devices.append("cuda")
    device = devices[-1] if name == "auto" else name
    if device not in devices:
        raise ValueError(f"argument --device: there is no {device} here; choose from "
                         f"{', '.join(devices)}")
    return torch.device(device)


def save(path: Path, content: dict):
    """Tensors and plain data, atomically; see report.write."""
    buffer = io.BytesIO()           # torch.save into a full disk would leave half a file
    torch.save(content | {"layout": LAYOUT}, buffer)
    report.write(path, buffer.getvalue())


def load(path: Path, remedy: str) -> dict:
    """What `save` wrote: tensors and plain data, never code. One line and exit code 2, with the
    remedy, if it cannot be read."""
    if not path.exists():
        fail(f"there is no {path}; {remedy}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["model"].items()        # whatever is saved here has weights
    except Exception as error:          # whatever a damaged file leads to
        fail(f"{path} cannot be read ({type(error).__name__}); {remedy}")
    if content.get("layout") != LAYOUT:
        fail(f"{path} has layout {content.get('layout', 0)}, of an older or newer version of this "
             f"program, which reads {LAYOUT}; {remedy}")
    return content


def restore(trainer, state: dict):
    """Bring the trainer to a state that was loaded. ValueError if it does not fit."""
    if state["vocabulary"] != trainer.tokenizer.tokens:
        raise ValueError(f"the vocabulary of task {trainer.config.task!r} is no longer that of the "
                         f"run in {trainer.folder}; bring it back, or name another run with --out")
    measures = state["progress"]["evaluation"]["measures"]
    names = getattr(trainer, "measure_names", set(measures))
    if names != set(measures):
        raise ValueError(f"task {trainer.config.task!r} measures {sorted(names)}, but did "
                         f"{sorted(measures)} in the run in {trainer.folder}; bring it back, or "
                         "name another run with --out")
    try:
        trainer.load_state_dict(state)
    except (RuntimeError, KeyError):
        raise ValueError(f"the checkpoint in {trainer.folder} does not fit its options; name "
                         "another run with --out") from None


def last_run() -> Path:
    runs = sorted(Path("out").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError("there is no run in out/ yet; begin with: python train.py")
    return runs[-1].parent


def is_ours(path: Path) -> bool:
    """True for a file that a run writes, or a part of one that a killed run has left."""
    return re.sub(r"\.\d+\.part$", "", path.name) in RUN_FILES


def is_free(folder: Path) -> bool:
    """True if a new run may use the folder: it does not exist, or has only files of a run that was
    killed before its first checkpoint."""
    if not folder.exists():
        return True
    return all(map(is_ours, folder.iterdir())) and not (folder / "checkpoint.pt").exists()


def clear(folder: Path):
    """Remove what a run has left that was killed before its first checkpoint."""
    for path in folder.iterdir():
        if is_ours(path) and path.name != "lock":
            path.unlink()


@contextlib.contextmanager
def bad_input_in_one_line():
    """What the options or files lead to, before any work: one line and exit code 2. And what the
    terminal cannot show becomes a question mark, from here on."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)


def lock(folder: Path):
    """Use it as `with lock(folder):`, which makes the folder and keeps other runs out. A process
    that is killed lets go of it. One line and exit code 2 if another run has it, or it cannot be
    made. (Windows has no flock: there nothing is locked.)"""
    with bad_input_in_one_line():
        folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        return contextlib.nullcontext()
    file = open(folder / "lock", "w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is using {folder}; name another folder with --out")
    return file


@contextlib.contextmanager
def alone_in(folder: Path):
    """For a run that uses the folder. What can happen to it that is not its own fault gets a line
    that says how to go on."""
    with lock(folder):
        try:
            yield
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            print("stopped at once; --resume goes on from the last checkpoint, if this run has one "
                  "yet")
            sys.exit(130)
        except OSError as error:                # a full disk, a folder that is gone
            sys.exit(f"train.py: {error}; once that is mended, --resume goes on from the last "
                     "checkpoint, if this run has one yet")


@contextlib.contextmanager
def quiet_broken_pipe():
    """Whoever read the output, such as `head`, has seen enough: no traceback."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
