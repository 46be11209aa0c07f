"""transfusion serve: a run over HTTP with OpenAI's API."""

import gc
import logging
import os
import socket
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from transfusion.cli.options import Device, RunArgument, parse
from transfusion.cli.screen import UsageError, print_status
from transfusion.disk import check_run, find_folder
from transfusion.fields import Range
from transfusion.serving.hosts import is_local, parse_origin
from transfusion.serving.limits import Limits

KEY = "TRANSFUSION_API_KEY"
SWITCH_SECONDS = 0.0005  # between threads. At Python's 5 ms, each system call of the event loop can wait as long for another


@dataclass(frozen=True)
class Serve:
    """Serve a run: OpenAI's API under /v1, a web page at /. SIGTERM and Ctrl-C let requests in progress finish first."""

    run: RunArgument
    host: str = "127.0.0.1"
    """Address to listen on; any other than this machine's own needs --api-key."""
    port: Annotated[int, Range(0, 2**16 - 1)] = 8000
    """Port to listen on; 0 picks a free one."""
    api_key: str | None = None
    """Key that clients must send; if not set, that of TRANSFUSION_API_KEY, which other users of the machine cannot see."""
    allow_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Site whose pages may use the server from a browser, such as https://chat.example.org; repeat it for more sites."""
    limits: Limits = field(default_factory=Limits)
    weights: Literal["ema", "raw"] = "ema"
    """Moving average of the weights, or the last weights."""
    access_log: bool = False
    """Print one line for each request: client, method, path, status, seconds and bytes of the answer."""
    device: Device = "auto"


def serve(arguments: list[str]) -> None:
    """Listen until a signal stops it."""
    args = parse(Serve, "serve", arguments)
    key = args.api_key if args.api_key is not None else os.environ.get(KEY)
    if key is not None and not key.strip():
        raise UsageError(f"the API key is empty: give another --api-key or {KEY}")
    if key is None and not is_local(args.host):
        raise UsageError(f"--host {args.host} is open to other machines: give an --api-key (or set {KEY}) or no --host")
    run = check_run(find_folder(args.run))
    try:
        from transfusion.serving.app import build_app
        from transfusion.serving.connections import Server
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}: pip install '.[serve]' in a clone of the repository") from None
    from transfusion.inference.engine import open_run

    try:
        origins = {parse_origin(text) for text in args.allow_origin}
    except ValueError as error:
        raise UsageError(f"--allow-origin {error}") from None
    engine = open_run(run, args.weights, args.device)
    if args.access_log:
        logging.getLogger("transfusion.access").addHandler(AccessLog(sys.stdout))
        logging.getLogger("transfusion.access").setLevel("INFO")
    with listen(args.host, args.port) as server_socket:
        server = Server(build_app(engine, args.limits, key, origins), args.limits)
        gc.freeze()  # what exists now stays: collections take little time
        sys.setswitchinterval(SWITCH_SECONDS)
        host, port = server_socket.getsockname()[:2]
        print_status(f"serving {engine.opened.name} at http://{f'[{host}]' if ':' in host else host}:{port} (API under /v1)")
        server.run(sockets=[server_socket])


class AccessLog(logging.StreamHandler):
    """Ends with one line when it cannot be written, as when its reader has left: logging prints a traceback each time."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).removeHandler(self)
        logging.getLogger(__name__).error("the access log ends: %s", sys.exc_info()[1])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. UsageError when address or port is not available."""
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host can be like this
        reason = getattr(error, "strerror", None) or "this is not the name of a host"
        raise UsageError(f"cannot listen at {host}, port {port}: {reason}") from None
