"""Entry point: `python -m mrl.trainer.main_ppo key=value ...`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from mrl.config.errors import ConfigError
from mrl.config.load import load_config
from mrl.observability.console import setup_logging

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Train as configured. Exit status: 0 done, 1 failed, 2 bad configuration, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="main_ppo", description="PPO with Megatron-core and SGLang")
    parser.add_argument("--config-name", default="ppo_megatron_trainer", help="file of configs/ to start from")
    parser.add_argument("--config-path", choices=("config", "./config"), help="verl's; there is one folder, configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see docs/config.md")
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(rank=0)
    try:
        config = load_config(arguments.overrides, arguments.config_name)
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    # Imported late: a mistyped key is reported before torch is loaded.
    from mrl.launch.run import launch

    return launch(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
