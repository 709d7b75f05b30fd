"""The order of the house: which way imports run, how long files and pages are, and that the pages
speak of what exists."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gspo

HOUSE = Path(__file__).parent.parent.parent
README = (HOUSE / "README.md").read_text(encoding="utf-8")

# What the files of a room may import of ours. Those that are missing here may import anything.
DESK = {"moe", "gspo", "data", "lab"}
MAY_IMPORT = {
    "moe.py": set(),
    "gspo.py": {"moe"},
    "train.py": {"moe", "gspo", "data", "lab"},
    "test_gspo.py": {"moe", "gspo", "data"},
    "data": {"data"},
    "lab": DESK,
    "lab/extras": DESK,
}
MOST_LINES = {"test_gspo.py": 750, "lab/extras": 100, "lab/extras/mistakes.py": 132}


def room_of(path):
    """A file in the root is a room of its own."""
    inside = path.relative_to(HOUSE)
    return (inside if len(inside.parts) == 1 else inside.parent).as_posix()


FILES = sorted([*HOUSE.glob("*.py"), *HOUSE.glob("data/*.py"), *HOUSE.glob("lab/**/*.py")])
IN_ORDER = [path for path in FILES if room_of(path) in MAY_IMPORT]
PAGES = [HOUSE / "README.md", HOUSE / "lab" / "README.md", *sorted(HOUSE.glob("results/**/*.md"))]
KEPT_SHORT = [path for path in IN_ORDER if path.name != "test_gspo.py"]


def of_file(paths):
    return pytest.mark.parametrize("path", paths, ids=[str(x.relative_to(HOUSE)) for x in paths])


def imports(path):
    """The rooms of ours that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {"moe", "gspo", "train", "test_gspo", "data", "lab", "results"}
    rooms = {name.split(".")[0] for name in names} & ours
    inner = {".".join(name.split(".")[:2]) for name in names}
    return rooms | (inner & {"lab.study", "lab.tests", "lab.extras"})


@of_file(IN_ORDER)
def test_imports_run_down(path):
    room = room_of(path)
    allowed = set(MAY_IMPORT[room])
    if room == "train.py" or path.name == "command_line.py":
        allowed.add("lab.extras")               # the list of them
    if path.name == "page.py":                  # records an update as train.py makes it
        allowed |= {"train", "lab.extras"}
    assert imports(path) <= allowed


def test_an_extra_imports_no_other_extra():
    assert [path for path in FILES if room_of(path) == "lab/extras"]
    for path in FILES:
        if room_of(path) == "lab/extras":
            assert "lab.extras" not in imports(path), path


def test_results_hold_no_code():
    assert not list((HOUSE / "results").glob("*.py"))


# ------------------------------------------------------------------------------------ lengths

def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_the_core_is_short():
    core = [HOUSE / name for name in ("moe.py", "gspo.py", "train.py")]
    assert sum(len(lines(path)) for path in core) <= 1100


def test_the_studies_are_short():
    assert sum(len(lines(path)) for path in HOUSE.glob("lab/study/*.py")) <= 925


def test_the_readme_counts_the_lines_of_the_core():
    for name in ("moe.py", "gspo.py", "train.py"):
        assert f"[{name}]({name}), {len(lines(HOUSE / name))} lines" in README


@of_file(FILES)
def test_no_file_is_longer_than_its_room_allows_and_no_line_than_100_columns(path):
    name = path.relative_to(HOUSE).as_posix()
    assert len(lines(path)) <= MOST_LINES.get(name, MOST_LINES.get(room_of(path), 1000))
    for number, line in enumerate(lines(path), 1):
        assert len(line) <= 100, f"line {number}"


@of_file(KEPT_SHORT)
def test_no_function_has_more_than_50_lines_or_8_parameters(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            parameters = [x.arg for x in node.args.args + node.args.kwonlyargs if x.arg != "self"]
            assert node.end_lineno - node.lineno < 50, node.name
            assert len(parameters) <= 8, node.name


# ------------------------------------------------------------------------------------ README

def test_the_functions_that_the_readme_names_exist():
    """In the README, `name` in `file.py` or [`name`](file.py) is a function or class there."""
    named = re.findall(r"\[`(\w+)`\]\((\w[\w/]*\.py)\)", README)
    assert len(named) >= 6
    for name, file in named:
        defined = {node.name for node in ast.walk(ast.parse((HOUSE / file).read_text()))
                   if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert name in defined, f"{name} is not in {file}"


def anchors(page):
    """Those of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@of_file(PAGES)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^) ]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_pages_are_short():
    most = {"README.md": 10, "results/README.md": 6, "results/runs.md": 5, "results/speed.md": 3,
            "results/doubts.md": 4, "results/gym.md": 4.5, "results/claims/mistakes.md": 5,
            "lab/README.md": 12}
    sizes = {page.relative_to(HOUSE).as_posix(): page.stat().st_size / 1024 for page in PAGES}
    for name, size in sizes.items():
        assert size <= most.get(name, 3), f"{name} has {size:.2f} KiB"
    assert sum(sizes.values()) - sizes["README.md"] <= 54


def test_the_ten_lines_of_the_readme_are_the_loss_that_trains():
    code, = re.findall(r"```py\n(def gspo_loss.*?)```", README, re.DOTALL)
    names = {"torch": torch}
    exec(code, names)
    torch.manual_seed(0)
    logp_old = torch.randn(8, 5, dtype=torch.float64) - 3
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5, 2, 3])[:, None]
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.float64)
    logp = (logp_old + 0.02 * torch.randn_like(logp_old)).requires_grad_()
    loss = names["gspo_loss"](logp, logp_old, mask, rewards)
    advantages = gspo.group_advantages(rewards).flatten()
    expected, clipped = gspo.policy_loss("gspo", logp, logp_old, advantages, mask)
    assert clipped.any() and not clipped.all()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logp) for x in (loss, expected)))


def test_the_objective_of_the_readme_is_a_row_like_any_other(monkeypatch):
    code, = re.findall(r"```py\n(def soft.*?)```", README, re.DOTALL)
    monkeypatch.setattr(gspo, "ALGORITHMS", dict(gspo.ALGORITHMS))
    exec(code, vars(gspo).copy())
    logp = torch.randn(4, 5, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    loss, _ = gspo.policy_loss("soft", logp, logp.detach(), advantages, torch.ones(4, 5))
    loss.backward()
    # At equal policies tanh has slope 1: the gradient is that of GSPO, -A / (B |y|).
    torch.testing.assert_close(logp.grad, (-advantages / 20)[:, None].expand(4, 5))


def test_the_loss_in_ones_own_trainer_as_the_page_has_it():
    page = (HOUSE / "lab/README.md").read_text(encoding="utf-8")
    code, = re.findall(r"```py\n(from gspo.*?)```", page, re.DOTALL)
    tokens = torch.randint(7, (4, 8))
    embedding = torch.nn.Embedding(7, 7)

    def model(tokens):
        return SimpleNamespace(logits=embedding(tokens))
    names = {
        "model": model,
        "tokens": tokens, "prompt_length": 3, "responses": tokens[:, 3:],
        "rewards": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "mask": torch.ones(4, 5),
        "logp_old": torch.full((4, 5), -2.0)}
    exec(code, names)
    assert embedding.weight.grad.abs().sum() > 0
    assert names["clipped"].shape == (4, 5)


def test_the_task_of_the_readme_runs(tmp_path):
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for name in ("train.py", "gspo.py", "moe.py", "data", "lab"):
        copy = shutil.copytree if (HOUSE / name).is_dir() else shutil.copy
        copy(HOUSE / name, tmp_path / name)
    (tmp_path / "data" / "reverse.py").write_text(code)
    command = ("train.py", "--task", "reverse", "--cold_steps", "20", "--steps", "2", "--threads",
               "1", "--n_layer", "1", "--max_new_tokens", "12")
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
