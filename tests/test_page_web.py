"""The page of a served run: its files without a browser, and its use in headless Chromium."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.abuse import make_picture
from tests.serving import Gate, Server, serving, wait_until
from tests.test_chameleon import build_engine as engine_with_codes
from transfusion import page as reports
from transfusion.inference.engine import Engine, Request, open_run
from transfusion.serving.app import WEB
from transfusion.serving.limits import Limits

FILES = sorted(WEB.iterdir())
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
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
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None]]]:
    return Elements((WEB / "index.html").read_text()).elements


# Without a browser


def test_files_are_served_with_their_type_and_a_strict_policy(server):
    with server.client() as client:
        for path in ("", *(file.name for file in FILES)):
            response = client.get(f"/{path}")
            media_type = MEDIA_TYPES[Path(path or "index.html").suffix]
            assert (response.status_code, response.headers["content-type"].partition(";")[0]) == (200, media_type)
            policy = dict(rule.split(maxsplit=1) for rule in response.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == "'self'" and policy["img-src"] == "'self' data: blob:"
            assert not {"script-src", "style-src", "connect-src"} & {*policy}
            assert response.headers["cache-control"] == "no-cache"


def test_no_file_has_an_address_or_turns_text_into_markup():
    forbidden = re.compile(r"https?:|//\w+\.\w|\bimport\(|\beval\(|innerHTML|insertAdjacentHTML|document\.write")
    assert [file.name for file in FILES if forbidden.search(file.read_text())] == []


def test_every_id_and_class_in_scripts_exists(elements):
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    classes = {name for _, attributes in elements for name in (attributes.get("class") or "").split()}
    assert len({*ids}) == len(ids)
    script_ids = {*re.findall(r'\bat\("([^"]+)"\)', scripts())}
    sliders = re.search(r"SLIDERS = \[(.+)\]", scripts())[1].replace('"', "").split(", ")
    assert len(script_ids) > 20 and script_ids <= {*ids}
    assert {*sliders, *(f"{name}-value" for name in sliders)} <= {*ids}
    assert {*re.findall(r'querySelector\("\.([\w-]+)"\)', scripts())} <= classes
    for _, attributes in elements:  # and the ids in the page itself
        for name in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
            assert {*(attributes.get(name) or "").split()} <= {*ids}
        assert not (attributes.get("href") or "").startswith("#") or attributes["href"][1:] in ids


def test_every_control_has_a_label_and_nothing_is_inline(elements):
    labelled = {attributes.get("for") for tag, attributes in elements if tag == "label"}
    wrapping = [n for n, (tag, attributes) in enumerate(elements) if tag == "label" and "for" not in attributes]
    for n, (tag, attributes) in enumerate(elements):
        if tag in ("input", "textarea", "select"):
            assert attributes["id"] in labelled or n - 1 in wrapping or "aria-label" in attributes
        if tag in ("progress", "section", "dialog") or attributes.get("role") in ("tablist", "log"):
            assert "aria-label" in attributes or "aria-labelledby" in attributes
        assert tag != "style" and "style" not in attributes and not any(name.startswith("on") for name in attributes)
        assert tag != "script" or attributes.get("src")
    assert ("html", {"lang": "en"}) in elements


def test_imported_names_are_exported():
    for file in WEB.glob("*.js"):
        for names, origin in re.findall(r'import \{ (.+) \} from "\./(.+)";', file.read_text()):
            exported = re.findall(r"export (?:async )?(?:function|const)\*? (\w+)", (WEB / origin).read_text())
            assert {*names.split(", ")} <= {*exported}, file.name


def scripts() -> str:
    return "\n".join(file.read_text() for file in WEB.glob("*.js"))


# In a browser


@dataclass
class Visit:
    """An open page, and what happened in it."""

    page: "playwright.sync_api.Page"  # noqa: F821
    server: Server
    requested_urls: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)  # from the console and from failed scripts

    def open(self, address: str = "") -> None:
        self.page.on("request", lambda request: self.requested_urls.append(request.url))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.goto(self.server.url + address)

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def draw(self, prompt: str) -> None:
        self.page.get_by_label("Prompt").fill(prompt)
        self.page.get_by_role("button", name="Draw", exact=True).click()

    def send(self, message: str) -> None:
        """Send a message in the Talk tab and wait for the end of the answer."""
        self.open_tab("Talk")
        field = self.page.get_by_label("Message")
        field.fill(message)
        field.press("Enter")
        expect(self.page.locator("#talk-form .stop")).to_be_hidden()

    def set_answer(self, path: str, events: list[dict]) -> None:
        """From now on the page receives these events from this path instead of the server's."""
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        self.page.route(f"**/v1/{path}", lambda route: route.fulfill(body=body, content_type="text/event-stream"))

    def settings(self) -> list:
        """The values of all controls in the Draw tab's settings."""
        controls = self.page.locator("#settings input, #settings select, #settings output")
        return controls.evaluate_all("all => all.map((one) => [one.id, one.value, one.checked])")

    def gallery(self):
        return self.page.locator("#images li")

    def status(self, form: str):
        return self.page.locator(f"#{form}-form .status")

    def error(self, form: str):
        return self.page.locator(f"#{form}-form .error")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        skip_or_fail = pytest.fail if os.environ.get("REQUIRE_CHROMIUM") == "1" else pytest.skip
        skip_or_fail("Chromium is not installed: apt-get install chromium, or your system's package of that name")
    from playwright import sync_api

    sync_api.expect.set_options(timeout=30_000)
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page. At the end: no script failed, nothing was blocked, and no other server was used."""
    visits = []

    def visit(server: Server = server, address: str = "", **options) -> Visit:
        context = browser.new_context(**options)
        context.set_default_timeout(30_000)
        visits.append(Visit(context.new_page(), server))
        visits[-1].open(address)
        expect(visits[-1].page.locator("#facts tr, dialog[open]")).not_to_have_count(0)
        return visits[-1]

    yield visit
    for visited in visits:
        client_error = "Failed to load resource: the server responded with a status of 4"  # the browser's text for a 4xx
        assert [message for message in visited.messages if not message.startswith(client_error)] == []
        origins = {urlsplit(url)[:2] for url in visited.requested_urls if not url.startswith("data:")}
        assert origins == {("http", f"127.0.0.1:{visited.server.port}")}
        visited.page.context.close()


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


# The tabs and the layout


def test_arrow_keys_select_tabs_and_show_one_panel(visit):
    visited = visit()
    page = visited.page
    tabs = page.get_by_role("tablist", name="Tasks").get_by_role("tab")
    expect(tabs).to_have_text(["Draw", "Describe", "Talk"])
    tabs.first.focus()
    for key, name in [
        ("ArrowRight", "Describe"), ("ArrowRight", "Talk"), ("ArrowRight", "Draw"), ("ArrowLeft", "Talk"),
        ("ArrowLeft", "Describe"), ("Home", "Draw"), ("End", "Talk"),
    ]:  # fmt: skip
        page.keyboard.press(key)
        expect(page.get_by_role("tab", selected=True)).to_have_text(name)
        expect(page.get_by_role("tab", selected=True)).to_be_focused()
        expect(page.get_by_role("tabpanel")).to_have_count(1)  # hidden panels have no role
        expect(page.get_by_role("tabpanel", name=name)).to_be_visible()
        assert tabs.evaluate_all("all => all.filter((tab) => tab.tabIndex === 0).length") == 1
    visited.open_tab("Describe")
    expect(page.get_by_role("tabpanel", name="Describe")).to_be_visible()


def test_the_address_selects_a_tab(visit):
    visited = visit(address="#talk")
    page = visited.page
    expect(page.get_by_role("tabpanel", name="Talk")).to_be_visible()
    visited.open_tab("Describe")
    assert urlsplit(page.url).fragment == "describe"
    page.evaluate("location.hash = 'draw'")
    expect(page.get_by_role("tabpanel", name="Draw")).to_be_visible()
    page.evaluate("location.hash = 'main'")  # the skip link
    expect(page.get_by_role("tabpanel", name="Draw")).to_be_visible()


def test_settings_use_the_field_words_and_explain_them(visit):
    page = visit().page
    for label, explanation in [
        ("Guidance scale", "How closely the image follows the prompt."), ("Steps", "Number of denoising steps."),
        ("Number of images", "How many images are drawn for the prompt."),
        ("Seed", "The same prompt, settings and seed give the same image."),
    ]:  # fmt: skip
        control = page.get_by_label(label, exact=True)
        expect(control).to_be_visible()
        expect(control).to_have_accessible_description(re.compile(f"^{re.escape(explanation)}"))
        assert control.evaluate("it => it.parentElement.querySelector('small').offsetTop > it.offsetTop")  # below it


def test_a_phone_shows_prompt_button_and_image_before_the_settings(visit):
    visited = visit(viewport={"width": 375, "height": 740})
    page = visited.page
    expect(page.get_by_label("Guidance scale", exact=True)).to_be_hidden()
    visited.draw("three")
    expect(visited.status("draw")).to_contain_text("Drawn: three")
    selectors = "#prompt, .draws, #frames img, #settings summary"
    boxes = page.locator(selectors).evaluate_all("all => all.map((one) => one.getBoundingClientRect().toJSON())")
    assert [box["top"] for box in boxes] == sorted(box["top"] for box in boxes)
    assert page.evaluate("scrollY") == 0 and boxes[2]["bottom"] <= 740
    page.get_by_text("Settings", exact=True).click()
    expect(page.get_by_label("Guidance scale", exact=True)).to_be_visible()
    page.set_viewport_size({"width": 1280, "height": 800})
    expect(page.locator("#settings")).to_have_attribute("open", "")


def test_a_desktop_shows_the_settings_beside_the_image(visit):
    page = visit(viewport={"width": 1280, "height": 800}).page
    settings, stage = (page.locator(selector).bounding_box() for selector in ("#settings", "#stage"))
    expect(page.get_by_label("Guidance scale", exact=True)).to_be_visible()
    assert settings["x"] + settings["width"] <= stage["x"] and settings["y"] + settings["height"] <= 800


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (375, 740)])
def test_each_tab_fits_one_and_a_half_screens(visit, width, height):
    visited = visit(viewport={"width": width, "height": height})
    visited.send("a" * 40)
    for name in ("Draw", "Describe", "Talk"):
        visited.open_tab(name)
        assert visited.page.evaluate("document.documentElement.scrollHeight") <= 1.5 * height, name


def test_the_page_has_no_horizontal_scroll_and_follows_the_colour_scheme(visit):
    visited = visit()
    page = visited.page
    page.get_by_label("Number of images").fill("8")
    visited.draw("a" * 40)
    expect(visited.gallery().nth(7)).to_be_visible()
    visited.send("a" * 40)
    for width in (320, 390, 768, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        for name in ("Draw", "Describe", "Talk"):
            visited.open_tab(name)
            excess = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert excess <= 0, f"{name} is {excess} pixels too wide at {width}"
    for scheme, index in (("light", 0), ("dark", 1)):
        page.emulate_media(color_scheme=scheme)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        expected = re.findall(r"--background: #(\w+)", reports.STYLE)[index]
        assert [int(part) for part in re.findall(r"\d+", background)] == [*bytes.fromhex(expected)]


@pytest.mark.parametrize(("tab", "controls"), [
    ("draw", ["prompt", "draws", "summary", "guidance", "steps", "count", "seed", "new-seed", "summary"]),
    ("describe", ["file", "summary"]),
    ("talk", ["message", "attachment", "allow-images", "writes", "start-over", "summary"]),
])  # fmt: skip
def test_the_tab_key_reaches_every_control(visit, tab, controls):
    page = visit().page
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.locator("#draw-tab:focus").count():
            while not page.locator(f"#{tab}-tab:focus").count():
                page.keyboard.press("ArrowRight")
        name, is_body, outline = page.evaluate(
            """() => {
                const { activeElement: it } = document;
                const shown = it.matches(".unseen") ? it.previousElementSibling : it;
                return [it.id || it.className || it.localName, it === document.body, getComputedStyle(shown).outlineStyle];
            }"""
        )
        if is_body:
            break
        assert outline != "none", f"{name} does not show the focus"
        reached.append(name)
    assert is_body, "the focus never left the page"
    assert [name for name in reached if name != "log"] == ["skip", f"{tab}-tab", *controls]


# Draw


def test_an_image_is_drawn_with_previews_and_drawn_again(visit, server):
    visited = visit()
    page = visited.page
    expect(page.get_by_role("heading", level=1)).to_have_text("tiny")
    expect(page.locator("#facts")).to_contain_text(f"{server.engine.opened.parameters:,}")
    page.get_by_label("Number of images").fill("2")
    page.get_by_label("Steps").fill("60")
    gate = Gate(server.engine)
    visited.draw("three <b>")
    gate.allow(12)
    in_progress = page.get_by_alt_text("three <b>, in progress")
    expect(in_progress.locator("visible=true")).to_have_count(2)
    expect(in_progress.last).to_have_attribute("src", re.compile("^data:image/png"))
    expect(page.get_by_label("Denoising progress")).to_be_visible()
    preview = in_progress.first.get_attribute("src")
    gate.open()
    expect(visited.status("draw")).to_contain_text("Drawn: three <b>, 2 images, seed ")
    images = visited.gallery().get_by_alt_text("three <b>", exact=True)
    expect(images).to_have_count(2)
    expect(page.locator("#frames").get_by_alt_text("three <b>", exact=True)).to_have_count(2)
    assert images.first.get_attribute("src") not in (preview, images.last.get_attribute("src"))
    assert page.locator("#film-strip img").count() == 2 * 8
    visited.gallery().last.get_by_role("button", name="Again").click()
    expect(images).to_have_count(4)
    assert images.nth(3).get_attribute("src") == images.nth(1).get_attribute("src")  # the same seed, the same image
    visited.gallery().first.get_by_role("button", name="Describe").click()
    expect(page.get_by_role("tab", name="Describe")).to_be_focused()
    expect(visited.status("describe")).to_contain_text("The model")
    visited.open_tab("Draw")
    with page.expect_download() as download:
        visited.gallery().first.get_by_role("link", name="Save").click()
    assert download.value.suggested_filename == "three-b-.png"
    wait_until(server.is_idle)


def test_the_seed_shown_draws_the_same_image(visit):
    visited = visit()
    page = visited.page
    visited.draw("three")
    expect(visited.gallery()).to_have_count(1)
    seed = page.get_by_label("Seed", exact=True).input_value()
    expect(visited.status("draw")).to_contain_text(f"seed {seed}.")
    page.get_by_label("New seed for each drawing").uncheck()
    visited.draw("three")
    expect(visited.gallery()).to_have_count(2)
    sources = visited.gallery().locator("img").evaluate_all("all => all.map((one) => one.src)")
    assert sources[0] == sources[1]


def test_an_image_of_codes_has_one_step_per_code(visit):
    with serving(engine_with_codes()) as server:
        visited = visit(server)
        page = visited.page
        expect(page.locator("#facts")).to_contain_text("code by code")
        expect(page.locator("#steps")).to_be_hidden()
        bodies = []
        page.on("request", lambda request: bodies.append(request.post_data_json))
        page.get_by_label("Size").select_option("4x4")
        gate = Gate(server.engine)
        visited.draw("a")
        gate.allow(9)  # the first reads the prompt
        expect(page.locator("#film-strip img")).not_to_have_count(0)
        steps = page.locator("#progress").evaluate("bar => bar.value * 16")
        assert steps == int(steps) <= 9
        gate.open()
        expect(visited.status("draw")).to_contain_text("Drawn: a, 1 image, seed ")
        assert page.locator("#film-strip img").count() == 2 * 8
        assert "steps" not in bodies[0] and bodies[0]["preview_every"] == 1
        wait_until(server.is_idle)


def test_stop_frees_the_row(visit, server):
    visited = visit()
    visited.page.get_by_label("Steps").fill("100")
    gate = Gate(server.engine)
    visited.draw("three")
    gate.allow(2)
    stop = visited.page.locator("#draw-form .stop")
    stop.focus()
    visited.page.keyboard.press("Enter")
    expect(visited.status("draw")).to_have_text("Stopped.")
    expect(stop).to_be_hidden()
    expect(visited.page.get_by_label("Prompt")).to_be_focused()
    wait_until(lambda: all(request.is_cancelled for request in server.scheduler.running.values()))
    gate.open()
    wait_until(server.is_idle)
    assert gate.steps_taken < 10
    assert visited.gallery().count() == 0
    visited.draw("four")
    expect(visited.gallery()).to_have_count(1)


# Describe


def test_a_dropped_image_is_described_from_any_tab(visit, server):
    visited = visit()
    page = visited.page
    file = {"name": "photo.png", "mimeType": "image/png", "buffer": make_picture()}
    transfer = page.evaluate_handle(
        """(bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "photo.png", { type: "image/png" }));
            return transfer;
        }""",
        list(file["buffer"]),
    )
    page.locator("body").dispatch_event("drop", {"dataTransfer": transfer})
    expect(page.get_by_role("tabpanel", name="Describe")).to_be_visible()
    status = visited.status("describe")
    expect(status).to_contain_text("The model's text: ")
    assert status.text_content() == f"The model's text: {page.locator('#described q').text_content()}"
    expect(page.locator("#described").get_by_alt_text("photo.png")).to_be_visible()
    page.locator("#file").set_input_files({**file, "buffer": file["buffer"][:60]})
    expect(visited.error("describe")).to_contain_text("image_url cannot be used: ")
    page.locator("#file").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"a"})
    expect(visited.error("describe")).to_have_text("a.txt is not an image")
    wait_until(server.is_idle)


# Talk


def find_seed(opened, text: str, part_types: list[type]) -> tuple[int, list]:
    """The first seed whose answer to this text has parts of these types, and the parts."""
    engine = Engine(opened)
    for first in range(0, 2_000, 50):
        answers = engine.generate([Request((text,), seed=seed) for seed in range(first, first + 50)])
        for seed, (answer,) in enumerate(answers, first):
            if [type(part) for part in answer.parts] == part_types:
                return seed, answer.parts
    raise AssertionError("no seed gives such an answer")


def test_a_conversation_sends_all_turns(visit, server, opened):
    seed, expected = find_seed(opened, "one", [str, np.ndarray])
    visited = visit()
    page = visited.page
    page.get_by_label("Seed", exact=True).fill(str(seed))
    message, log = page.get_by_label("Message"), page.get_by_role("log")
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json))
    visited.send("one")
    expect(message).to_have_value("")
    assert log.locator(".own").text_content() == "Youone"
    answer = log.locator(".turn").nth(1).locator("p > *")
    assert answer.evaluate_all("all => all.map((one) => one.localName)") == ["q", "span"]
    assert answer.first.text_content().rstrip("\ufffd") == expected[0].rstrip("\ufffd")
    message.fill("two")
    page.locator("#attachment").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": make_picture()})
    expect(page.locator("#attached img")).to_be_visible()
    page.get_by_label("The model may draw").uncheck()
    page.get_by_role("button", name="Send").click()
    expect(log.locator(".turn")).to_have_count(4)
    expect(log).to_have_attribute("aria-busy", "false")
    first, second = bodies
    assert (first["modalities"], second["modalities"]) == (["text", "image"], ["text"])
    assert second["messages"][0] == first["messages"][0]
    assert [part["type"] for part in second["messages"][1]["parts"]] == ["text", "image"]
    assert second["messages"][1]["images"][0]["image_url"]["url"] == answer.last.locator("img").get_attribute("src")
    assert [part["type"] for part in second["messages"][2]["content"]] == ["text", "image_url"]
    page.get_by_role("button", name="Start over").click()
    expect(log).to_be_empty()
    wait_until(server.is_idle)


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def chat_events(*deltas: dict) -> list[dict]:
    """Events of a streamed chat answer with these deltas."""
    choices = [{"delta": delta, "finish_reason": None} for delta in deltas] + [{"delta": {}, "finish_reason": "stop"}]
    return [{"choices": [choice]} for choice in choices]


def test_parts_of_an_answer_keep_their_order(visit):
    visited = visit()
    deltas = [{"role": "assistant", "content": ""}, {"content": "a "}, {"content": "house"},
              {"preview": {"step": 1} | IMAGE}, {"images": [IMAGE]}, {"content": "b"}]  # fmt: skip
    visited.set_answer("chat/completions", chat_events(*deltas))
    visited.send("x")
    parts = visited.page.locator(".turn").last.locator("p > *")
    expect(parts).to_have_count(3)
    texts = parts.evaluate_all("all => all.map((one) => one.querySelector('img')?.alt ?? one.textContent)")
    assert texts == ["a house", "a house", "b"]
    expect(visited.error("talk")).to_be_empty()


def test_images_in_talk_change_neither_settings_nor_gallery_of_draw(visit):
    visited = visit()
    page = visited.page
    page.get_by_label("Guidance scale").fill("3.5")
    page.get_by_label("Steps").fill("9")
    before = visited.settings()
    assert ["new-seed", "on", True] in before  # Talk chooses its own seeds
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json))
    visited.set_answer("chat/completions", chat_events({"preview": {"step": 1} | IMAGE}, {"images": [IMAGE]}))
    for count in (1, 2, 3):
        visited.send("x")
        expect(page.locator(".answer-image")).to_have_count(count)
    assert visited.settings() == before
    assert {(body["guidance_scale"], body["steps"]) for body in bodies} == {(3.5, 9)}
    assert len({body["seed"] for body in bodies}) > 1
    expect(visited.gallery()).to_have_count(0)
    image = page.locator(".answer-image").last
    expect(image).to_contain_text(f"seed\u00a0{bodies[-1]['seed']}")
    expect(image.get_by_role("link", name="Save")).to_have_attribute("download", "x.png")
    image.get_by_role("button", name="Describe").click()
    expect(page.get_by_role("tabpanel", name="Describe")).to_be_visible()


# Errors and the key


def test_the_servers_errors_are_shown(visit, server):
    visited = visit()
    visited.draw("three " * 200)
    expect(visited.error("draw")).to_have_text(re.compile(r"^the request takes \d+ positions; the run supports at most 64 "))
    expect(visited.page.locator("#draw-form .stop")).to_be_hidden()
    visited.send("three " * 200)
    expect(visited.error("talk")).to_contain_text("the request takes")
    expect(visited.page.get_by_label("Message")).to_have_value(("three " * 200).strip())  # to change and send again
    assert visited.page.get_by_role("log").locator(".turn").count() == 0
    timeout = {"error": {"message": "the request took longer than 300 seconds"}}
    visited.set_answer("images/generations", [{"type": "error"} | timeout])
    visited.open_tab("Draw")
    visited.draw("three")
    expect(visited.error("draw")).to_have_text(timeout["error"]["message"])


def test_an_incomplete_answer_is_an_error(visit):
    visited = visit()
    page = visited.page
    event = {"type": "image_generation.partial_image", "index": 0, "step": 1, "noisy_b64_json": "bm9pc3k="}
    visited.set_answer("images/generations", [event | {"b64_json": "Y2xlYW4="}])
    visited.draw("three")
    expect(visited.error("draw")).to_have_text("the answer ended before all images were drawn")
    images = page.locator("#frames img, #film-strip img")
    contents = images.evaluate_all("all => all.map((one) => atob(one.src.split(',')[1]))")
    assert contents == ["noisy", "noisy", "clean"]  # previews stay: the frame, and two in the film strip
    visited.set_answer("chat/completions", [{"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}])
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": make_picture()})
    visited.open_tab("Describe")
    expect(visited.error("describe")).to_have_text("the answer ended before it was complete")
    page.route("**/v1/**", lambda route: route.abort())
    visited.open_tab("Draw")
    visited.draw("four")
    expect(visited.error("draw")).to_have_text("the server cannot be reached")
    assert "ERR_FAILED" in visited.messages.pop()


def test_the_page_asks_for_the_key(visit, opened):
    with serving(Engine(opened), Limits(), "secret-ü") as server:
        visited = visit(server)
        page = visited.page
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("the API key is missing or wrong")
        key = page.get_by_role("textbox", name="API key")
        expect(key).to_be_focused()
        key.fill("wrong")
        key.press("Enter")
        expect(key).to_have_value("")
        key.fill("secret-ü")
        key.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("tiny")
        visited.draw("one")
        expect(visited.gallery()).to_have_count(1)
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("tiny")  # the tab keeps the key
        expect(dialog).to_be_hidden()
        page.evaluate("sessionStorage.clear()")
        page.reload()
        expect(key).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator("#page-error")).to_contain_text("the API key is missing or wrong")
