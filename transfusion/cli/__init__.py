"""The command line: transfusion demo | data | plan | train | generate | evaluate | report | export | serve."""

import os
import sys
from collections.abc import Sequence

from transfusion.cli import data, evaluate, export, plan, runs, serve
from transfusion.cli.screen import UsageError, fail, nearest

VERBS = {
    "demo": "train on real handwritten digits, measure, and write a report: five minutes on a laptop",
    "data": "look at what you have, and prepare it for training",
    "plan": "what a run will cost, before it is begun: memory, time, disk",
    "train": "train a named run or a run.json; the same command again goes on where it stopped",
    "generate": "write and draw from a prompt of text and pictures",
    "evaluate": "measure a run and write results.json",
    "report": "show a run as one page, report.html",
    "export": "write a run into a folder that others can open",
    "serve": "answer over HTTP, in the words of OpenAI's API",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what was typed and exit: 0 done, 1 failed, 2 not understood."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: transfusion COMMAND ...\n\nOne transformer that reads, writes and draws.\n")
        print(*(f"  {verb:10}{what}" for verb, what in VERBS.items()), sep="\n")
        print("\ntransfusion COMMAND --help says more.")
        sys.exit(0 if arguments else 2)
    verb, rest = arguments[0], arguments[1:]
    try:
        match verb:
            case "demo":
                runs.demo(rest)
            case "data":
                data.main(rest)
            case "plan":
                plan.plan(rest)
            case "train":
                runs.train(rest)
            case "generate":
                runs.generate(rest)
            case "evaluate":
                evaluate.evaluate(rest)
            case "report":
                runs.report(rest)
            case "export":
                export.export(rest)
            case "serve":
                serve.serve(rest)
            case _:
                raise UsageError(f"there is no command {verb!r}{nearest(verb, VERBS)}; there are {', '.join(VERBS)}")
    except UsageError as error:
        fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever reads on (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:  # what our own files raise says what is wrong in one line
        fail(error, 1)
