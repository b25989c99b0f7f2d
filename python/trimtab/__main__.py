"""The command line: ``trimtab doctor`` and ``trimtab demo``."""

from __future__ import annotations

import argparse
import sys


def _doctor(arguments: list[str]) -> int:
    from trimtab.doctor import main as doctor

    parser = argparse.ArgumentParser(prog="trimtab doctor", description=_COMMANDS["doctor"][1])
    parser.add_argument("--json", action="store_true", help="machine-readable report")
    parser.parse_args(arguments)
    return doctor(arguments)


def _demo(arguments: list[str]) -> int:
    try:
        from trimtab.demo import main as demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "trimtab":
            raise
        print(f"trimtab demo needs {error.name}; pip install 'trimtab[demo]'", file=sys.stderr)
        return 2
    return demo(arguments)


_COMMANDS = {
    "doctor": (_doctor, "tell what is installed, loaded and chosen here, and check the numbers"),
    "demo": (_demo, "run the algorithms on real text, with tables and pictures"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in _COMMANDS:
        return _COMMANDS[arguments[0]][0](arguments[1:])
    parser = argparse.ArgumentParser(prog="trimtab", description="Fused kernels for small levers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, description) in _COMMANDS.items():
        commands.add_parser(name, help=description)
    parser.parse_args(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
