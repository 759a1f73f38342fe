"""Which part may import which: the table of docs/architecture.md, read from the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FORBIDDEN = {
    "mrl/algorithms": ["torch.distributed", "megatron", "sglang", "mrl.config", "mrl.parallel", "mrl.backends"],
    "mrl/config": ["torch", "megatron", "sglang", "ray"],
    "mrl/trainer/ppo.py": ["torch.distributed", "torch.cuda", "megatron", "sglang", "mrl.backends", "mrl.parallel"],
    "mrl/parallel": ["megatron", "sglang", "mrl.rewards", "mrl.algorithms", "mrl.backends"],
    "mrl/backends/megatron": ["sglang", "mrl.algorithms", "mrl.rewards", "mrl.rollout", "mrl.config"],
    "mrl/backends/sglang": ["megatron", "mrl.algorithms", "mrl.config"],
    "mrl/reshard": ["torch.distributed", "megatron", "sglang", "mrl.config", "mrl.trainer"],
    "mrl/convert": ["torch.cuda", "megatron", "sglang", "mrl.config", "mrl.backends", "mrl.algorithms", "mrl.rollout"],
    "mrl/scale": ["torch.distributed", "torch.cuda", "megatron", "sglang", "mrl.backends"],
    "mrl/data": ["torch.distributed", "torch.cuda", "megatron", "sglang", "mrl.backends"],
    "mrl/rewards": ["torch.distributed", "torch.cuda", "megatron", "sglang", "mrl.backends"],
}
ONLY_IN = {"megatron": "mrl/backends/megatron", "sglang": "mrl/backends/sglang"}


def imported_modules(path):
    """Every absolute module a file names in an import, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def sources(part):
    path = ROOT / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def crossings(part, forbidden):
    return [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(part)
        for module, line in imported_modules(path)
        if any(module == name or module.startswith(name + ".") for name in forbidden)
    ]


@pytest.mark.parametrize("part", FORBIDDEN)
def test_a_part_imports_nothing_beyond_its_boundary(part):
    assert sources(part), f"{part} is gone; update the table"
    assert crossings(part, FORBIDDEN[part]) == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_an_engine_is_imported_by_its_own_backend_only(package):
    home = ONLY_IN[package]
    assert [place for place in crossings("mrl", [package]) if not place.startswith(home)] == []
    assert crossings(home, [package]), "the check sees no import at all"
