"""The page of a served run: in its files without a browser, and used as people use it in headless Chromium."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.abuse import picture
from tests.serving import Gate, Server, serving, until
from tests.test_chameleon import build_engine as engine_with_codes
from transfusion import page as reports
from transfusion import serving as room
from transfusion.inference.engine import Engine, Request, open_run
from transfusion.serving.limits import Limits

WEB = Path(room.__file__).parent / "web"
FILES = sorted(WEB.iterdir())
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def opened(written):
    return open_run(written).opened


@pytest.fixture
def server(opened) -> Iterator[Server]:
    with serving(Engine(opened)) as server:
        yield server


class Elements(HTMLParser):
    """The start tags of a page, in order: (tag, attributes)."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None]]]:
    return Elements((WEB / "index.html").read_text()).found


# Without a browser


def test_every_file_is_served_as_what_it_is_and_may_do_nothing_but_ask_its_server(server):
    with server.client() as client:
        for path in ("", *(file.name for file in FILES)):
            answer = client.get(f"/{path}")
            kind = KINDS[Path(path or "index.html").suffix]
            assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, kind)
            policy = dict(rule.split(maxsplit=1) for rule in answer.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == "'self'" and policy["img-src"] == "'self' data: blob:"
            assert not {"script-src", "style-src", "connect-src"} & {*policy}
            assert answer.headers["cache-control"] == "no-cache"


def test_no_file_names_an_address_or_makes_markup_of_text():
    outside = re.compile(r"https?:|//\w+\.\w|\bimport\(|\beval\(|innerHTML|insertAdjacentHTML|document\.write")
    assert [file.name for file in FILES if outside.search(file.read_text())] == []


def test_whatever_scripts_look_up_is_there(elements):
    ids = [about["id"] for _, about in elements if "id" in about]
    classes = {name for _, about in elements for name in (about.get("class") or "").split()}
    assert len({*ids}) == len(ids)
    asked = {*re.findall(r'\bat\("([^"]+)"\)', scripts())}
    sliders = re.search(r"SLIDERS = \[(.+)\]", scripts())[1].replace('"', "").split(", ")
    assert len(asked) > 20 and asked <= {*ids}
    assert {*sliders, *(f"{name}-value" for name in sliders)} <= {*ids}
    assert {*re.findall(r'querySelector\("\.([\w-]+)"\)', scripts())} <= classes
    for _, about in elements:  # and what the page itself points to
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert {*(about.get(name) or "").split()} <= {*ids}
        assert not (about.get("href") or "").startswith("#") or about["href"][1:] in ids


def test_every_control_has_a_name_and_nothing_is_inline(elements):
    labelled = {about.get("for") for tag, about in elements if tag == "label"}
    around = [n for n, (tag, about) in enumerate(elements) if tag == "label" and "for" not in about]
    for n, (tag, about) in enumerate(elements):
        if tag in ("input", "textarea", "select"):
            assert about["id"] in labelled or n - 1 in around or "aria-label" in about
        if tag in ("progress", "section", "dialog", "nav"):
            assert "aria-label" in about or "aria-labelledby" in about
        assert tag != "style" and "style" not in about and not any(name.startswith("on") for name in about)
        assert tag != "script" or about.get("src")
    assert ("html", {"lang": "en"}) in elements


def test_files_import_what_others_export():
    for file in WEB.glob("*.js"):
        for names, origin in re.findall(r'import \{ (.+) \} from "\./(.+)";', file.read_text()):
            exported = re.findall(r"export (?:async )?(?:function|const)\*? (\w+)", (WEB / origin).read_text())
            assert {*names.split(", ")} <= {*exported}, file.name


def scripts() -> str:
    return "\n".join(file.read_text() for file in WEB.glob("*.js"))


# In a browser


@dataclass
class Seen:
    """A page that is looked at, and what went on meanwhile."""

    page: "playwright.sync_api.Page"  # noqa: F821
    server: Server
    asked: list[str] = field(default_factory=list)  # addresses
    said: list[str] = field(default_factory=list)  # in the console, by failing scripts, by the browser

    def visit(self) -> None:
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(self.server.url)

    def draw(self, prompt: str) -> None:
        self.page.get_by_label("What should it draw?").fill(prompt)
        self.page.get_by_role("button", name="Draw", exact=True).click()

    def answer(self, path: str, events: list[dict]) -> None:
        """From now on this is what the page is answered there, in place of the server's own."""
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        self.page.route(f"**/v1/{path}", lambda route: route.fulfill(body=body, content_type="text/event-stream"))

    def status(self, form: str):
        return self.page.locator(f"#{form}-form .status")

    def error(self, form: str):
        return self.page.locator(f"#{form}-form .error")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        tell = pytest.fail if os.environ.get("REQUIRE_CHROMIUM") == "1" else pytest.skip
        tell("there is no Chromium to test the page in: apt-get install chromium, or your system's package of that name")
    from playwright import sync_api

    sync_api.expect.set_options(timeout=30_000)
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def look(browser, server):
    """Opens the page; at the end no script failed, nothing was blocked, and nobody else was asked."""
    looks = []

    def look(server: Server = server, **options) -> Seen:
        context = browser.new_context(**options)
        context.set_default_timeout(30_000)
        seen = Seen(context.new_page(), server)
        looks.append(seen)
        seen.visit()
        return seen

    yield look
    for seen in looks:
        refused = "Failed to load resource: the server responded with a status of 4"  # what a browser says of any 400
        assert [line for line in seen.said if not line.startswith(refused)] == []
        asked = {urlsplit(url)[:2] for url in seen.asked if not url.startswith("data:")}
        assert asked == {("http", f"127.0.0.1:{seen.server.port}")}
        seen.page.context.close()


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def test_a_picture_comes_out_of_the_noise(look, server):
    seen = look()
    expect(seen.page.get_by_role("heading", level=1)).to_have_text("tiny")
    expect(seen.page.locator("#facts")).to_contain_text(f"{server.engine.opened.parameters:,}")
    seen.page.get_by_label("How many pictures at once").fill("2")
    seen.page.get_by_label("How many steps").fill("60")
    gate = Gate(server.engine)
    seen.draw("three <b>")
    gate.let(12)
    on_their_way = seen.page.get_by_alt_text("three <b>, on its way")
    expect(on_their_way.locator("visible=true")).to_have_count(2)
    expect(on_their_way.last).to_have_attribute("src", re.compile("^data:image/png"))
    expect(seen.page.get_by_label("Steps taken")).to_be_visible()
    noisy = on_their_way.first.get_attribute("src")
    gate.open()
    expect(seen.status("draw")).to_contain_text("Drawn: three <b>, 2 pictures, seed ")
    kept = seen.page.locator("#shelf").get_by_alt_text("three <b>", exact=True)
    expect(kept).to_have_count(2)
    expect(seen.page.locator("#pictures").get_by_alt_text("three <b>", exact=True)).to_have_count(2)
    assert kept.first.get_attribute("src") not in (noisy, kept.last.get_attribute("src"))
    assert seen.page.locator("#film-strip img").count() == 2 * 8
    seen.page.locator("#shelf li").last.get_by_role("button", name="Again").click()
    expect(kept).to_have_count(4)
    assert kept.nth(3).get_attribute("src") == kept.nth(1).get_attribute("src")  # the same seed, the same picture
    seen.page.locator("#shelf li").first.get_by_role("button", name="Describe").click()
    expect(seen.status("describe")).to_contain_text("The model sa")
    with seen.page.expect_download() as download:
        seen.page.locator("#shelf li").first.get_by_role("link", name="Save").click()
    assert download.value.suggested_filename == "three-b-.png"
    until(server.settled)


def test_a_picture_of_codes_comes_in_as_many_steps_as_it_has(look):
    with serving(engine_with_codes()) as server:
        seen = look(server)
        expect(seen.page.locator("#facts")).to_contain_text("code by code")
        expect(seen.page.locator("#steps")).to_be_hidden()
        sent = []
        seen.page.on("request", lambda request: sent.append(request.post_data_json))
        seen.page.get_by_label("How large").select_option("4x4")
        gate = Gate(server.engine)
        seen.draw("a")
        gate.let(9)  # the prompt is read in the first
        expect(seen.page.locator("#film-strip img")).not_to_have_count(0)
        shares = seen.page.locator("#progress").evaluate("bar => bar.value * 16")
        assert shares == int(shares) <= 9
        gate.open()
        expect(seen.status("draw")).to_contain_text("Drawn: a, 1 picture, seed ")
        assert seen.page.locator("#film-strip img").count() == 2 * 8
        assert "steps" not in sent[0] and sent[0]["preview_every"] == 1
        until(server.settled)


def test_a_picture_is_dropped_and_described(look, server, tmp_path):
    seen = look()
    file = {"name": "photo.png", "mimeType": "image/png", "buffer": picture()}
    dropped = seen.page.evaluate_handle(
        """(bytes) => {
            const carried = new DataTransfer();
            carried.items.add(new File([new Uint8Array(bytes)], "photo.png", { type: "image/png" }));
            return carried;
        }""",
        list(file["buffer"]),
    )
    seen.page.locator("#drop").dispatch_event("drop", {"dataTransfer": dropped})
    words = seen.status("describe")
    expect(words).to_contain_text("The model sa")
    assert words.text_content() == f"The model says: {seen.page.locator('#described q').text_content()}"
    expect(seen.page.locator("#described").get_by_alt_text("photo.png")).to_be_visible()
    seen.page.locator("#file").set_input_files({**file, "buffer": file["buffer"][:60]})
    expect(seen.error("describe")).to_contain_text("image_url cannot be used: ")
    seen.page.locator("#file").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"a"})
    expect(seen.error("describe")).to_have_text("a.txt is not a picture")
    until(server.settled)


def test_a_conversation_goes_on(look, server, opened):
    found = ((seed, answer(opened, "one", seed)) for seed in range(200))
    seed, expected = next((seed, parts) for seed, parts in found if kinds(parts) == ["q", "img"])
    seen = look()
    seen.page.get_by_label("Which noise it begins with").fill(str(seed))
    field, log = seen.page.get_by_label("What you say"), seen.page.get_by_role("log")
    sent = []
    seen.page.on("request", lambda request: sent.append(request.post_data_json))
    field.fill("one")
    field.press("Enter")
    expect(seen.page.locator("#shelf li")).to_have_count(1)
    expect(log).to_have_attribute("aria-busy", "false")
    expect(field).to_have_value("")
    assert log.locator(".own").text_content() == "Youone"
    said = log.locator(".turn").nth(1).locator("p > *")
    assert said.evaluate_all("all => all.map(one => one.localName)") == ["q", "img"]
    assert said.first.text_content().rstrip("\ufffd") == expected[0].rstrip("\ufffd")
    field.fill("two")
    seen.page.locator("#attachment").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    expect(seen.page.locator("#attached img")).to_be_visible()
    seen.page.get_by_label("it may draw").uncheck()
    seen.page.get_by_role("button", name="Send").click()
    expect(log.locator(".turn")).to_have_count(4)
    expect(log).to_have_attribute("aria-busy", "false")
    first, second = sent
    assert (first["modalities"], second["modalities"]) == (["text", "image"], ["text"])
    assert second["messages"][0] == first["messages"][0]
    assert [part["type"] for part in second["messages"][1]["parts"]] == ["text", "image"]
    assert second["messages"][1]["images"][0]["image_url"]["url"] == said.last.get_attribute("src")
    assert [part["type"] for part in second["messages"][2]["content"]] == ["text", "image_url"]
    seen.page.get_by_role("button", name="Start over").click()
    expect(log).to_be_empty()
    until(server.settled)


def answer(opened, text: str, seed: int) -> list:
    (answers,) = Engine(opened).generate([Request((text,), seed=seed)])
    return answers[0].parts


def kinds(parts: list) -> list[str]:
    """What each part is shown as."""
    return ["q" if isinstance(part, str) else "img" for part in parts]


def test_pictures_and_words_of_an_answer_keep_their_order(look):
    """The server's events, as docs and tests of the server have them, shown in the page without a server's chance."""
    seen = look()
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    deltas = [{"role": "assistant", "content": ""}, {"content": "a "}, {"content": "house"},
              {"preview": {"step": 1} | image}, {"images": [image]}, {"content": "b"}]  # fmt: skip
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    seen.answer("chat/completions", [*chunks, {"choices": [{"delta": {}, "finish_reason": "stop"}]}])
    seen.page.get_by_label("What you say").fill("x")
    seen.page.get_by_role("button", name="Send").click()
    parts = seen.page.locator(".turn").last.locator("p > *")
    expect(parts).to_have_count(3)
    assert parts.evaluate_all("all => all.map(one => one.alt ?? one.textContent)") == ["a house", "a house", "b"]
    expect(seen.page.locator("#shelf li")).to_have_count(1)
    expect(seen.error("talk")).to_be_empty()


def test_what_the_server_refuses_is_said_in_its_own_sentence(look, server):
    seen = look()
    seen.draw("three " * 200)
    expect(seen.error("draw")).to_have_text(re.compile(r"^the request takes \d+ positions; the run supports at most 64 "))
    expect(seen.page.locator("#draw-form .stop")).to_be_hidden()
    field = seen.page.get_by_label("What you say")
    field.fill("three " * 200)
    field.press("Enter")
    expect(seen.error("talk")).to_contain_text("the request takes")
    expect(field).to_have_value(("three " * 200).strip())  # to be changed, and sent again
    assert seen.page.get_by_role("log").locator(".turn").count() == 0
    late = {"error": {"message": "this was not done within 300 seconds"}}
    seen.answer("images/generations", [{"type": "error"} | late])
    seen.draw("three")
    expect(seen.error("draw")).to_have_text(late["error"]["message"])


def test_an_answer_that_breaks_off_is_no_whole_one(look):
    seen = look()
    about = {"type": "image_generation.partial_image", "index": 0, "step": 1, "noisy_b64_json": "bm9pc3k="}
    seen.answer("images/generations", [about | {"b64_json": "Y2xlYW4="}])
    seen.draw("three")
    expect(seen.error("draw")).to_have_text("the answer broke off before all was drawn")
    pictures = seen.page.locator("#pictures img, #film-strip img")
    shown = pictures.evaluate_all("all => all.map(one => atob(one.src.split(',')[1]))")
    assert shown == ["noisy", "noisy", "clean"]  # what came stays: large, and as it sees and expects it
    seen.answer("chat/completions", [{"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}])
    seen.page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    expect(seen.error("describe")).to_have_text("the answer broke off before its end")
    seen.page.route("**/v1/**", lambda route: route.abort())
    seen.draw("four")
    expect(seen.error("draw")).to_have_text("the server cannot be reached")
    assert "ERR_FAILED" in seen.said.pop()


def test_stop_frees_the_row(look, server):
    seen = look()
    seen.page.get_by_label("How many steps").fill("100")
    gate = Gate(server.engine)
    seen.draw("three")
    gate.let(2)
    stop = seen.page.locator("#draw-form .stop")
    stop.focus()
    seen.page.keyboard.press("Enter")
    expect(seen.status("draw")).to_have_text("Stopped.")
    expect(stop).to_be_hidden()
    expect(seen.page.get_by_label("What should it draw?")).to_be_focused()
    until(lambda: all(flow.left for flow in server.scheduler.flows.values()))  # the server has seen that it went away
    gate.open()
    until(server.settled)
    assert gate.taken < 10
    assert seen.page.locator("#shelf li").count() == 0
    seen.draw("four")
    expect(seen.page.locator("#shelf li")).to_have_count(1)


def test_a_key_is_asked_for_when_the_server_asks(look, opened):
    with serving(Engine(opened), Limits(), "secret-ü") as guarded:
        seen = look(guarded)
        dialog = seen.page.get_by_role("dialog")
        expect(dialog).to_contain_text("the API key is missing or wrong")
        key = seen.page.get_by_label("API key")
        expect(key).to_be_focused()
        key.fill("wrong")
        key.press("Enter")
        expect(key).to_have_value("")
        key.fill("secret-ü")
        key.press("Enter")
        expect(seen.page.get_by_role("heading", level=1)).to_have_text("tiny")
        seen.draw("one")
        expect(seen.page.locator("#shelf li")).to_have_count(1)
        seen.page.reload()
        expect(seen.page.get_by_role("heading", level=1)).to_have_text("tiny")  # it is kept in the tab
        expect(dialog).to_be_hidden()
        seen.page.evaluate("sessionStorage.clear()")
        seen.page.reload()
        expect(key).to_be_focused()
        seen.page.keyboard.press("Escape")
        expect(seen.page.locator("#trouble")).to_contain_text("the API key is missing or wrong")


def test_it_fits_a_phone_and_a_desk_by_day_and_by_night(look):
    seen = look()
    seen.page.get_by_label("How many pictures at once").fill("8")
    seen.draw("a" * 40)
    field = seen.page.get_by_label("What you say")
    field.fill("a" * 40)
    field.press("Enter")
    expect(seen.page.locator("#shelf li").nth(7)).to_be_visible()
    expect(seen.page.get_by_role("log")).to_have_attribute("aria-busy", "false")
    for width in (320, 390, 768, 1200):
        seen.page.set_viewport_size({"width": width, "height": 800})
        wider = seen.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wider <= 0, f"{wider} pixels too wide at {width}"
    for scheme, number in (("light", 0), ("dark", 1)):
        seen.page.emulate_media(color_scheme=scheme)
        ground = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        wanted = re.findall(r"--ground: #(\w+)", reports.STYLE)[number]
        assert [int(part) for part in re.findall(r"\d+", ground)] == [*bytes.fromhex(wanted)]


def test_all_is_reached_and_left_with_the_keyboard(look):
    seen = look()
    expect(seen.page.get_by_role("heading", level=1)).to_have_text("tiny")
    reached = []
    for _ in range(40):
        seen.page.keyboard.press("Tab")
        found = seen.page.evaluate(
            """() => {
                const { activeElement: it } = document;
                const shown = it.matches(".unseen") ? it.previousElementSibling : it;
                return [it.id || it.className, it === document.body, getComputedStyle(shown).outlineStyle];
            }"""
        )
        if found[1]:
            break
        assert found[2] != "none", f"{found[0]} does not show that it has the focus"
        reached.append(found[0])
    wanted = ["skip", "prompt", "guidance", "steps", "count", "seed", "fresh", "draws", "file", "message",
              "attachment", "may-draw", "writes", "over"]  # fmt: skip
    assert [name for name in reached if name in wanted] == wanted
    assert found[1], "the focus never left the page"
