"""The command line: transfusion demo | data | plan | train | generate | evaluate | report | compare | export | serve."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {  # -> the file with the function of this name, and a description
    "demo": ("runs", "train on real handwritten digits, evaluate, write a report: about ten minutes on two cores"),
    "data": ("data", "inspect, validate and prepare training data"),
    "plan": ("plan", "estimate memory, time and disk of a run before it starts"),
    "train": ("runs", "train a recipe or a run.json; the same command, or its folder, resumes it"),
    "generate": ("runs", "generate text and images from a prompt of text and images"),
    "evaluate": ("evaluate", "measure a run and write results.json"),
    "report": ("runs", "write report.html, one page about a run"),
    "compare": ("compare", "write compare.html, one page about several runs: curves, settings that differ, figures"),
    "export": ("export", "export a run as a self-contained folder: safetensors, configs, model card"),
    "serve": ("serve", "serve a run over HTTP with OpenAI's API"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Execute a command and exit: 0 success, 1 failure, 2 wrong usage. Each command imports only what it needs."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        from importlib.metadata import version

        print(f"open-transfusion {version('open-transfusion')}")
        sys.exit(0)
    if not arguments or arguments[0] in ("-h", "--help"):
        from transfusion.disk import packaged_models

        print("usage: transfusion COMMAND ...\n\nOne transformer for text and images.\n")
        print(*(f"  {command:10}{description}" for command, (_, description) in COMMANDS.items()), sep="\n")
        print(f"\nTrained models in the package, for generate, serve and others: {', '.join(packaged_models()) or 'none'}.")
        print("transfusion COMMAND --help describes a command, transfusion --version prints the version.")
        sys.exit(0 if arguments else 2)
    from transfusion.cli.screen import UsageError, fail, nearest

    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            raise UsageError(f"there is no command {command!r}{nearest(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
        getattr(import_module(f"transfusion.cli.{COMMANDS[command][0]}"), command)(rest)
    except UsageError as error:
        fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:  # the package's errors are one line
        fail(error, 1)
