"""The main job: the algorithms on real text, with tables and pictures.

`trimtab demo` trains a family of small language models on the documentation and source code of the
Python that runs it, tries the algorithms on them one section after the other, and writes one folder
with a report. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

_NEEDED = ("transformers", "peft", "tokenizers", "matplotlib", "tqdm")


def main(argv: list[str] | None = None) -> int:
    """Runs the demo.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit status: 0, or 2 where something is missing, told in one sentence.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"trimtab demo needs {', '.join(missing)}; pip install 'trimtab[demo]'", file=sys.stderr
        )
        return 2
    # All before torch and transformers are imported: nothing looks for a hub, nothing chatters.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # torchao, where it is installed, tells of its CUDA libraries when transformers looks for it.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from trimtab.demo.corpus import DemoError
    from trimtab.demo.runner import run
    from trimtab.demo.sections import SECTIONS

    chosen = arguments.sections or list(SECTIONS)
    unknown = [key for key in chosen if key not in SECTIONS]
    if unknown:
        parser.error(f"--sections must be among {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    try:
        run(
            arguments.out,
            [SECTIONS[key] for key in SECTIONS if key in chosen],
            seed=arguments.seed,
            threads=arguments.threads,
            quick=arguments.quick,
        )
    except DemoError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trimtab demo", description="Run the algorithms on real text; write a report."
    )
    parser.add_argument("--out", type=Path, default=Path("trimtab-demo"), help="output folder")
    parser.add_argument(
        "--sections",
        type=lambda text: text.split(","),
        metavar="A,B",
        help="only these, separated by commas (default: all)",
    )
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, help="of the text's split and the models"
    )
    parser.add_argument(
        "--threads", type=_at_least(1), help="threads of torch (default: one per core)"
    )
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number
