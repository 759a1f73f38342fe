"""The key table of docs/config.md, rendered from the schema's docstrings."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from functools import cache
from pathlib import Path

from mrl.config.frozen import thaw
from mrl.config.keys import default_values, iterate_keys
from mrl.config.section import describe

_INTRODUCTION = """# Configuration keys

`python -m mrl.trainer.main_ppo key=value ...` starts from `configs/ppo_megatron_trainer.yaml`; `key=value` overrides
a key, `+key=value` and `++key=value` mean the same. Keys inside a mapping may be new, all others must be in this
table.
A setting that would have no effect is reported when the configuration loads. Where a meaning ends with "unless set",
the default follows the key that it names.

Generated from `mrl/config` by `python -m mrl.config.docs docs/config.md`.
"""


def render_key_table() -> str:
    """All keys with type, default and meaning, as markdown with one table per section."""
    defaults = default_values()
    lines, current = [_INTRODUCTION], ""
    for key, section, name, hint in iterate_keys():
        path = key.rpartition(".")[0]
        if path != current:
            current = path
            title = (section.__doc__ or "").splitlines()[0]
            lines.append(f"\n## {path}\n{title}\n\n| key | type | default | meaning |\n|---|---|---|---|")
        meaning = field_docs(section)[name].replace("|", "\\|")
        lines.append(f"| `{name}` | {describe(hint)} | `{_spell(thaw(defaults[key]))}` | {meaning} |")
    return "\n".join(lines) + "\n"


@cache
def field_docs(section: type) -> dict[str, str]:
    """The docstring under each field of a section, inherited ones included, by field name."""
    docs: dict[str, str] = {}
    for owner in reversed(section.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(following, ast.Expr):
                continue
            if isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _spell(value: object) -> str:
    return "null" if value is None else str(value).replace("\n", "\\n").replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render_key_table(), encoding="utf-8")
