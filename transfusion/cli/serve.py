"""transfusion serve: a run behind OpenAI's API."""

import ipaddress
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from transfusion.cli.screen import Device, UsageError, parse, say
from transfusion.disk import check_run, find_folder
from transfusion.serving.limits import Limits

KEY = "TRANSFUSION_API_KEY"


@dataclass(frozen=True)
class Serve:
    """Serve a run: OpenAI's API under /v1, a page at /. SIGTERM and Ctrl-C stop it when what is under way is answered."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    host: str = "127.0.0.1"
    """The address to listen at. Any but this machine's own needs --api-key."""
    port: int = 8000
    """0: any that is free."""
    api_key: str | None = None
    """What clients must send as their key; else that in the environment's TRANSFUSION_API_KEY, if any, which other users
    of the machine cannot see."""
    limits: Limits = field(default_factory=Limits)
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the weights, or the last ones."""
    device: Device = "auto"


def serve(arguments: list[str]) -> None:
    """Listen until told to stop."""
    asked = parse(Serve, "serve", arguments)
    if not 0 <= asked.port < 2**16:
        raise UsageError(f"a port is a number from 0 to 65535, not {asked.port}")
    key = asked.api_key if asked.api_key is not None else os.environ.get(KEY)
    if key is not None and not key.strip():
        raise UsageError("the API key is empty")
    if key is None and not is_local(asked.host):
        raise UsageError(f"at {asked.host} others could reach it: give an --api-key (or set {KEY}), or leave --host out")
    run = check_run(find_folder(asked.run))
    try:
        import uvicorn

        from transfusion.serving.app import build_app
    except ImportError as error:
        raise UsageError(f"serving needs a few packages more ({error.name}): pip install 'transfusion[serve]'") from None
    from transfusion.inference.engine import open_run

    engine = open_run(run, asked.weights, asked.device)
    with listen(asked.host, asked.port) as place:
        config = uvicorn.Config(
            build_app(engine, asked.limits, key), log_level="warning", access_log=False, server_header=False, ws="none",
            lifespan="on", timeout_graceful_shutdown=int(asked.limits.shutdown_grace),
        )  # fmt: skip
        host, port = place.getsockname()[:2]
        say(f"serving {engine.run.name} at http://{f'[{host}]' if ':' in host else host}:{port} (the API is under /v1)")
        uvicorn.Server(config).run(sockets=[place])


def is_local(host: str) -> bool:
    """Whether nobody outside this machine can reach that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket there. UsageError when the port or the address cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise UsageError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from None
