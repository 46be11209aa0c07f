"""Clients that people have: what they send by default is answered, or refused in one sentence; pages of other sites."""

import pytest

from tests.abuse import CHAT, DRAW, TEXT, assert_clear_error, valid_body
from tests.serving import serving
from transfusion.inference.engine import Engine, open_run
from transfusion.serving.middleware import parse_origin

SITE = "https://chat.example.org"
PREFLIGHT = {"origin": SITE, "access-control-request-method": "POST",
             "access-control-request-headers": "authorization, x-stainless-os"}  # fmt: skip


@pytest.fixture(scope="module")
def opened(written):
    return open_run(written).opened


# Browser front ends


def test_pages_of_an_allowed_site_can_read_every_answer(opened):
    """Also errors, streams, and answers without the key: otherwise the browser hides the reason from the page."""
    with serving(Engine(opened), api_key="secret", allow_origins={SITE}) as server, server.client() as client:
        preflight = client.options(CHAT, headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == SITE
        assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
        assert "POST" in preflight.headers["access-control-allow-methods"]
        headers = {"origin": SITE, "authorization": "Bearer secret"}
        for body, status in ((valid_body(CHAT), 200), (valid_body(CHAT) | {"stream": True}, 200), ({}, 400)):
            response = client.post(CHAT, json=body, headers=headers)
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, SITE)
        assert client.get("/v1/models", headers=headers).headers["access-control-allow-origin"] == SITE
        response = client.post(CHAT, json=valid_body(CHAT), headers={"origin": SITE})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, SITE)
        assert "access-control-allow-credentials" not in response.headers
        for origin in ("https://example.org", "null", "http://chat.example.org", f"{SITE}:8443", f"{SITE}.evil.org"):
            response = client.post(TEXT, json=valid_body(TEXT), headers=headers | {"origin": origin})
            assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
            assert_clear_error(response)
            response = client.options(TEXT, headers=PREFLIGHT | {"origin": origin})
            assert response.status_code == 400 and "access-control-allow-origin" not in response.headers
        own = client.post(DRAW, json=valid_body(DRAW), headers=headers | {"origin": server.url})
        assert own.status_code == 200  # the server's own page


def test_without_an_allowed_site_no_page_of_another_site_is_answered(opened):
    with serving(Engine(opened)) as server, server.client() as client:
        for response in (client.options(CHAT, headers=PREFLIGHT), client.get("/v1/models", headers={"origin": SITE})):
            assert response.status_code == 403
            assert_clear_error(response)
            assert "access-control-allow-origin" not in response.headers and "vary" not in response.headers


@pytest.mark.parametrize(("text", "origin"), [
    ("https://Chat.Example.org/", "https://chat.example.org"), ("http://localhost:3000", "http://localhost:3000"),
    ("https://a.b:443", "https://a.b"), ("http://a.b:80", "http://a.b"), ("http://a.b:443", "http://a.b:443"),
    ("http://[::1]:8080", "http://[::1]:8080"), ("app://obsidian.md", "app://obsidian.md"),
    *[(text, None) for text in ("*", "null", "", "https://", "a.b", "https://a.b/c", "https://a.b?c", "https://a.b#c",
                                "https://me@a.b", "https://a.b:x", "https://a.b:99999", "https://ä.b", "http://[::1")],
])  # fmt: skip
def test_an_allowed_site_is_written_as_browsers_send_it(text, origin):
    if origin is not None:
        assert parse_origin(text) == origin
    else:
        with pytest.raises(ValueError, match="is not the origin of one site: write scheme://host"):
            parse_origin(text)
