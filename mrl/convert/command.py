"""`mrl convert`: checkpoints and Hugging Face folders into one another, compared and verified.

Needs no GPU and no process group. Tensors are streamed: memory does not grow with the model.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from mrl.convert.diff import diff_weights, render_diff
from mrl.convert.dtypes import DTYPES
from mrl.convert.errors import DamageError
from mrl.convert.hf_to_megatron import convert_to_megatron
from mrl.convert.megatron_to_hf import convert_to_hugging_face
from mrl.convert.progress import Track, no_progress, progress_bar
from mrl.convert.reshard import reshard_checkpoint
from mrl.convert.verify import verify
from mrl.interfaces import CheckpointError
from mrl.parallel.layout import ParallelLayout

_INTERRUPTED = 130
_WIDE_COLUMNS = 200
_LAYOUT = "whose ranks' shards the files hold, one file per rank; any other layout loads them as well"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 if done, equal or sound; 1 if `diff` found a difference or `verify` damage; 2 if the request cannot be done;
        130 if interrupted. Except in the first case nothing is left under the output's name.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        with _termination_as_interrupt():
            return run(arguments)
    except (ValueError, CheckpointError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(
            f"mrl convert {arguments.command}: {error}", markup=False, highlight=False
        )
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print(f"mrl convert {arguments.command}: interrupted, nothing was written")
        return _INTERRUPTED


def _to_megatron(arguments: argparse.Namespace) -> int:
    convert_to_megatron(
        arguments.hf,
        arguments.out,
        _layout(arguments),
        dtype=DTYPES.get(arguments.dtype),
        overwrite=arguments.overwrite,
        track=_track(arguments),
    )
    return 0


def _to_hugging_face(arguments: argparse.Namespace) -> int:
    convert_to_hugging_face(
        arguments.checkpoint,
        arguments.out,
        hf=arguments.hf,
        dtype=DTYPES.get(arguments.dtype),
        overwrite=arguments.overwrite,
        track=_track(arguments),
    )
    return 0


def _reshard(arguments: argparse.Namespace) -> int:
    reshard_checkpoint(
        arguments.checkpoint,
        arguments.out,
        _layout(arguments),
        overwrite=arguments.overwrite,
        track=_track(arguments),
    )
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    results = diff_weights(
        arguments.a,
        arguments.b,
        role=arguments.role,
        hf=arguments.hf,
        optimizer=arguments.optimizer,
        track=_track(arguments),
    )
    # In a file or a pipe no line is broken.
    console = Console() if Console().is_terminal else Console(width=_WIDE_COLUMNS)
    render_diff(results, atol=arguments.atol, only_different=arguments.only_different, console=console)
    return 0 if all(result.is_equal(arguments.atol) for result in results) else 1


def _verify(arguments: argparse.Namespace) -> int:
    try:
        lines = verify(arguments.dir, hf=arguments.hf, track=_track(arguments))
    except (DamageError, CheckpointError) as error:
        Console(stderr=True, soft_wrap=True).print(f"mrl convert verify: {error}", markup=False, highlight=False)
        return 1
    Console(soft_wrap=True).print("\n".join(lines), markup=False, highlight=False)
    return 0


def _layout(arguments: argparse.Namespace) -> ParallelLayout:
    tp, pp = arguments.tp, arguments.pp
    # Models with experts are refused without it; it changes no weight.
    return ParallelLayout(world_size=tp * pp, tp=tp, pp=pp, sequence_parallel=tp > 1)


def _track(arguments: argparse.Namespace) -> Track:
    return no_progress if arguments.quiet else progress_bar


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what it began is removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mrl convert", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_to_megatron(_command(commands, "hf2megatron", _to_megatron, "Hugging Face folder to torch_dist checkpoint"))
    _add_to_hugging_face(_command(commands, "megatron2hf", _to_hugging_face, "checkpoint to Hugging Face folder"))
    _add_reshard(_command(commands, "reshard", _reshard, "rewrite a checkpoint's files for another layout"))
    _add_diff(_command(commands, "diff", _diff, "compare two folders tensor by tensor; exit status 1 if they differ"))
    _add_verify(_command(commands, "verify", _verify, "check that a folder is whole; exit status 1 if it is not"))
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _add_to_megatron(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder: config.json and *.safetensors")
    _add_output(parser)
    _add_layout(parser)
    _add_dtype(parser)


def _add_to_hugging_face(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    _add_output(parser)
    _add_dtype(parser)
    parser.add_argument(
        "--hf", type=Path, help="folder with config.json and tokenizer, in place of those that the checkpoint carries"
    )


def _add_reshard(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    _add_output(parser)
    _add_layout(parser)


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="Hugging Face folder or checkpoint")
    parser.add_argument("b", type=Path, metavar="B", help="Hugging Face folder or checkpoint")
    parser.add_argument("--only-different", action="store_true", help="list only tensors that differ")
    parser.add_argument("--atol", type=float, help="values this close are equal, in any type; default is bitwise")
    parser.add_argument("--optimizer", action="store_true", help="compare the optimizer states of two checkpoints")
    parser.add_argument("--role", choices=("actor", "critic"), help="of whole checkpoints; default is the actor")
    parser.add_argument("--hf", type=Path, help="folder with config.json for checkpoints that have none")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="Hugging Face folder or checkpoint")
    parser.add_argument("--hf", type=Path, help="folder with config.json for a checkpoint that has none")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoints/global_step_N, or below it")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="new folder; appears when it is complete")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tp", type=int, default=1, help=f"tensor parallel size {_LAYOUT}")
    parser.add_argument("--pp", type=int, default=1, help=f"pipeline parallel size {_LAYOUT}")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the output; default is the input's")


if __name__ == "__main__":
    sys.exit(main())
