"""Names of hosts and sites: which host is this machine, and which site a page is from."""

import ipaddress
from urllib.parse import urlsplit


def is_local(host: str) -> bool:
    """Is it localhost, or an address that only this machine reaches?"""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def parse_origin(text: str) -> str:
    """The origin as browsers send it: scheme://host, and :port unless it is the scheme's default. ValueError for anything
    else. Not "*": every page that somebody opens could use the server. Not "null": any page can have that origin."""
    try:
        url = urlsplit(text.lower())
        port = "" if url.port in (None, {"http": 80, "https": 443}.get(url.scheme)) else f":{url.port}"
        host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    except ValueError:
        host = None
    has_rest = host and (url.path.strip("/") or url.query or url.fragment or "@" in url.netloc)
    if not host or not url.scheme or has_rest or not text.isascii():
        raise ValueError(f"{text[:100]!r} is not the origin of one site: write scheme://host or scheme://host:port")
    return f"{url.scheme}://{host}{port}"


def parse_netloc(origin: str) -> str | None:
    """Host and port of an Origin header."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def parse_hostname(host: str) -> str:
    """The host of a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
