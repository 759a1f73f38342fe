"""The `mrl` command: one name for every tool of the package."""

from __future__ import annotations

import importlib
import sys
import warnings

from mrl import __version__

_COMMANDS = {
    "train": ("mrl.trainer.main_ppo", "train with PPO; key=value overrides, as python -m mrl.trainer.main_ppo"),
    "demo": ("mrl.trainer.demo", "train on the embedded task; no GPU, no download"),
    "convert": ("mrl.convert.command", "convert, reshard, compare and verify checkpoints; no GPU"),
    "plan": ("mrl.trainer.show_plan", "show layouts, sizes and memory of a run, without the GPUs it is for"),
    "serve-judge": ("mrl.backends.sglang.server", "serve a model that judges responses, for reward.judge.url"),
    "doctor": ("mrl.doctor", "show what this machine offers a run, and what it lacks"),
    "report": ("mrl.observability.report", "summarize a run's folder"),
    "reshard-check": ("mrl.reshard.check", "compare a reshard bitwise with SGLang's own loaders, without a GPU"),
}


def main() -> int:
    """Run the named command; the exit status is the command's, 2 for an unknown one."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"mrl {__version__}\n")
        return 0
    if arguments[0] not in _COMMANDS:
        sys.stderr.write(f"mrl: unknown command {arguments[0]!r}\n{_usage()}")
        return 2
    # Of other packages' sources, when they are compiled first.
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    # Imported late: the commands differ by 15 s of imports.
    module = importlib.import_module(_COMMANDS[arguments[0]][0])
    return int(module.main(arguments[1:]))


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:<{width}}  {text}\n" for name, (_, text) in _COMMANDS.items()]
    return "usage: mrl COMMAND ...\n\n" + "".join(lines)
