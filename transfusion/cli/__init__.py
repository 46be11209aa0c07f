"""The command line: transfusion demo | data | plan | train | generate | evaluate | report | export | serve."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

VERBS = {  # -> the file that holds the function of this name, and what it is for
    "demo": ("runs", "train on real handwritten digits, measure, and write a report: five minutes on a laptop"),
    "data": ("data", "look at what you have, and prepare it for training"),
    "plan": ("plan", "what a run will cost, before it is begun: memory, time, disk"),
    "train": ("runs", "train a named run or a run.json; the same command again goes on where it stopped"),
    "generate": ("runs", "write and draw from a prompt of text and pictures"),
    "evaluate": ("evaluate", "measure a run and write results.json"),
    "report": ("runs", "show a run as one page, report.html"),
    "export": ("export", "write a run into a folder that others can open"),
    "serve": ("serve", "answer over HTTP, in the words of OpenAI's API"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what was typed and exit: 0 done, 1 failed, 2 not understood. Each command imports what it needs, and no other."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: transfusion COMMAND ...\n\nOne transformer that reads, writes and draws.\n")
        print(*(f"  {verb:10}{what}" for verb, (_, what) in VERBS.items()), sep="\n")
        print("\ntransfusion COMMAND --help says more.")
        sys.exit(0 if arguments else 2)
    from transfusion.cli.screen import UsageError, fail, nearest

    verb, rest = arguments[0], arguments[1:]
    try:
        if verb not in VERBS:
            raise UsageError(f"there is no command {verb!r}{nearest(verb, VERBS)}; there are {', '.join(VERBS)}")
        getattr(import_module(f"transfusion.cli.{VERBS[verb][0]}"), verb)(rest)
    except UsageError as error:
        fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever reads on (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:  # what our own files raise says what is wrong in one line
        fail(error, 1)
