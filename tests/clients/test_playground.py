"""The playground in Chromium, against athanor-router in front of real servers and of a scripted one, all on loopback."""

import contextlib
import hashlib
import http.server
import json
import math
import os
import pathlib
import re
import subprocess
import tempfile
import threading
import time

import pytest
import requests
from local import OURS, TARGET, free_port
from playwright.sync_api import expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
# In milliseconds. Answers of a busy machine take their time.
LONGEST = 60_000
expect.set_options(timeout=LONGEST)
PICTURES = pathlib.Path(os.environ.get("TMPDIR", tempfile.gettempdir())) / "playground"


@contextlib.contextmanager
def routing(folder, server, revision, key=None):
    """athanor-router of one server, with a playground and without Kafka: its address and the folder where it keeps events.
    `key`: the API key that requests require."""
    http, grpc, ops = free_port(), free_port(), free_port()
    config, spill = folder / "router.json", folder / "spill"
    router = {
        "namespace": "default",
        "deployment": revision,
        "revisions": [{"name": revision, "service": revision, "weight": 100}],
        "events": {"bootstrapServers": f"127.0.0.1:{free_port()}", "topic": "playground"},
        "playground": True,
    }
    config.write_text(json.dumps(router))
    command = [TARGET / "athanor-router", "--config-file", config, "--endpoints", f"{revision}={server.removeprefix('http://')}"]
    command += ["--http-port", http, "--grpc-port", grpc, "--ops-port", ops, "--spill-dir", spill, "--address", "127.0.0.1"]
    if key:
        (folder / "keys").mkdir()
        (folder / "keys" / "people").write_text(f"sha256:{hashlib.sha256(key.encode()).hexdigest()}\n")
        command += ["--access", json.dumps({"callers": [{"name": "people"}]}), "--api-keys", folder / "keys"]
    process = subprocess.Popen([str(part) for part in command], env=OURS)
    try:
        for _ in range(300):
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"http://127.0.0.1:{ops}/readyz", timeout=1).status_code == 200:
                    break
            assert process.poll() is None, "athanor-router ended"
            time.sleep(0.1)
        else:
            raise TimeoutError("athanor-router was not ready in 30 s")
        yield f"http://127.0.0.1:{http}/", spill
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def browser():
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page on which no script fails and nothing breaks the Content-Security-Policy."""
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.set_default_timeout(LONGEST)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    # Answers with an error status are the tests' own.
    is_ours = lambda text: not text.startswith("Failed to load resource")
    page.on("console", lambda message: message.type == "error" and is_ours(message.text) and problems.append(message.text))
    yield page
    page.close()
    assert problems == []


def picture(page, name):
    """Screenshots of the page as it is, in light and dark, wide and narrow; the narrow one does not scroll sideways."""
    for width in (1100, 400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=PICTURES / f"{name}-{width}-{scheme}.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1100, "height": 800})


def facts(card):
    """What the page says about an answer, by name."""
    names, values = card.locator("dt").all_text_contents(), card.locator("dd").all_text_contents()
    return dict(zip(names, values, strict=True))


def events(spill):
    """The data of the events that the router keeps, in order."""
    lines = [line for file in sorted(spill.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line.split(" ", 1)[1])["data"] for line in lines]


def ask(page, question):
    """Sends a question; the card of its answer, once it is complete."""
    page.get_by_label("Message").fill(question)
    page.get_by_label("Message").press("Enter")
    card = page.locator("#turns article").last
    expect(card.locator("dt", has_text="Finish reason")).to_be_visible()
    return card


@pytest.fixture(scope="module")
def chat(tmp_path_factory, language_model):
    with routing(tmp_path_factory.mktemp("router"), language_model[0], "smol-1") as address:
        yield address


def test_a_chat_streams_shows_probabilities_and_takes_feedback(page, chat):
    address, spill = chat
    page.goto(address)
    expect(page.locator("#model")).to_contain_text("smol")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("24")
    page.get_by_label("Show token probabilities").check()
    # The lengths that the answer had on its way.
    page.evaluate(
        """() => {
          window.lengths = new Set();
          const look = () => window.lengths.add(document.querySelector("#turns .text")?.textContent.length);
          new MutationObserver(look).observe(document.querySelector("#turns"), { childList: true, subtree: true });
        }"""
    )
    card = ask(page, "What is the capital of France?")
    text = card.locator(".text").text_content()
    assert "Paris" in text
    assert page.evaluate("window.lengths.size") > 3, "the answer did not arrive in pieces"

    found = facts(card)
    assert (found["Revision"], found["Finish reason"]) == ("smol-1", "stop")
    assert re.fullmatch(r"r-[0-9a-f]{32}-1-[0-9a-f]{12}", found["Request"])
    assert re.fullmatch(r"[0-9a-f]{32}", found["Trace"])
    assert re.fullmatch(r"\d+\.\d\d s", found["First token"]) and float(found["Tokens/s"]) > 0

    tokens = card.locator(".token")
    expect(card.locator(".text")).to_be_hidden()
    assert "".join(tokens.all_text_contents()).startswith(text)
    shown = [float(value) for value in tokens.evaluate_all("all => all.map(one => one.style.getPropertyValue('--p'))")]
    assert all(0 < value <= 1.0001 for value in shown) and len(set(shown)) > 3
    alternatives = page.get_by_role("tooltip")
    expect(alternatives).to_be_hidden()
    tokens.nth(2).hover()
    expect(alternatives.locator(".bar")).to_have_count(5)
    page.mouse.move(0, 0)
    expect(alternatives).to_be_hidden()
    # By keyboard: one token is a stop of the tab key, arrow keys reach the others.
    assert tokens.evaluate_all("all => all.filter(one => one.tabIndex === 0).length") == 1
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(alternatives).to_contain_text(json.dumps(tokens.nth(1).text_content()))
    picture(page, "chat")

    card.get_by_role("button", name="Good").click()
    expect(card.locator("output")).to_have_text("Feedback accepted.")
    expect(card.get_by_role("button", name="Good")).to_have_attribute("aria-pressed", "true")
    card.get_by_text("Correct", exact=True).click()
    corrected = card.get_by_label("What the answer should have been")
    expect(corrected).to_have_value(text)
    corrected.fill("Paris, of course.")
    card.get_by_role("button", name="Send correction").click()
    expect(card.locator("output .good")).to_have_text("Feedback accepted.")
    kept = [event for event in events(spill) if event.get("requestId") == found["Request"] and "answer" not in event]
    assert [event.get("rating") or event.get("expectedText") for event in kept] == [1, "Paris, of course."]

    # The conversation goes on, and its probabilities can be hidden.
    page.get_by_label("Show token probabilities").uncheck()
    expect(card.locator(".text")).to_be_visible()
    second = ask(page, "And of Italy?")
    assert int(facts(second)["Tokens"].split(" ")[0]) > int(found["Tokens"].split(" ")[0]) + 10
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#turns article")).to_have_count(0)


def test_an_answer_can_be_stopped_and_an_error_is_shown(page, chat):
    page.goto(chat[0])
    page.get_by_label("Message").fill("Write a long story.")
    page.get_by_role("button", name="Send").click()
    card = page.locator("#turns article").last
    expect(card.locator(".text")).to_contain_text(re.compile(r"\w+ \w+"))
    page.get_by_role("button", name="Stop").click()
    expect(card.locator("dt", has_text="Finish reason")).to_be_visible()
    assert facts(card)["Finish reason"] == "stopped"
    expect(card).to_contain_text("This answer is not recorded")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()

    page.get_by_label("Most tokens").fill("100000")
    page.get_by_label("Message").fill("Hello")
    page.get_by_label("Message").press("Enter")
    alert = page.locator("#turns").get_by_role("alert")
    expect(alert).to_contain_text("HTTP 400")
    expect(alert).to_contain_text("context_length_exceeded")
    expect(page.get_by_label("Message")).to_have_value("Hello")
    picture(page, "error")


def test_a_key_is_asked_for_and_sent(page, tmp_path, language_model):
    with routing(tmp_path, language_model[0], "smol-1", key="a-secret-key") as (address, _):
        page.goto(address)
        key = page.get_by_label("API key")
        expect(page.get_by_role("alert")).to_contain_text("an API key is required")
        expect(page.locator("#chat")).to_be_hidden()
        picture(page, "key")
        key.fill("guess")
        key.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("the API key is not valid")
        key.fill("a-secret-key")
        key.press("Enter")
        page.get_by_label("Most tokens").fill("1")
        page.get_by_label("Seed").fill("1")
        assert facts(ask(page, "Hello"))["Finish reason"] == "length"
        # It survives a reload, and not its removal.
        page.reload()
        expect(page.locator("#chat")).to_be_visible()
        page.get_by_role("button", name="Forget the API key").click()
        expect(key).to_be_visible()
        expect(page.locator("#chat")).to_be_hidden()


def test_a_classification_takes_the_right_label(page, tmp_path, server):
    with routing(tmp_path, server[0], "clients-1") as (address, spill):
        # The router learns the labels from the server; until then it takes any.
        page.goto(address)
        page.get_by_label("Text", exact=True).fill("What a wonderful product, it works perfectly!")
        page.get_by_label("Text", exact=True).press("Control+Enter")
        card = page.locator("#classified article").first
        expect(card.locator(".bar")).to_have_count(2)
        shares = [float(text.removesuffix(" %")) for text in card.locator(".number").all_text_contents()]
        assert shares[0] > shares[1] and math.isclose(sum(shares), 100, abs_tol=0.2)
        assert card.locator(".bar").first.text_content().startswith("positive")
        picture(page, "classify")
        card.get_by_role("button", name="negative is the right label").click()
        expect(card.locator("output")).to_have_text("Feedback accepted.")
        prediction, feedback = events(spill)
        assert prediction["requestId"] == feedback["requestId"] == facts(card)["Request"]
        assert (prediction["label"], feedback["expectedLabel"]) == ("positive", "negative")


def test_two_texts_are_compared(page, tmp_path, embedding_model):
    def cosine(one, two):
        page.get_by_label("First text").fill(one)
        page.get_by_label("Second text").fill(two)
        before = page.locator("#compared article").count()
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#compared article")).to_have_count(before + 1)
        return float(page.locator("#compared .cosine").first.text_content().removeprefix("Cosine "))

    with routing(tmp_path, embedding_model[0], "mini-1") as (address, _):
        page.goto(address)
        assert math.isclose(cosine("A cat.", "A cat."), 1, abs_tol=1e-3)
        near = cosine("A cat sits on the mat.", "A kitten lies on a rug.")
        assert 0 < near < 1 and near > cosine("A cat sits on the mat.", "Interest rates rise.") + 0.2
        picture(page, "embed")


HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>**bold**'


class Scripted(http.server.BaseHTTPRequestHandler):
    """A server whose chats are a hostile text in two pieces, and then an error."""

    def do_GET(self):
        paths = {"/v1/chat/completions": {}}
        self.answer("application/json", {"data": [{"id": HOSTILE}]} if self.path == "/v1/models" else {"paths": paths})

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        token = lambda text: {"token": text, "logprob": -0.5, "top_logprobs": [{"token": text, "logprob": -0.5}]}
        pieces = [HOSTILE[:20], HOSTILE[20:]]
        chunks = [{"choices": [{"delta": {"content": text}, "logprobs": {"content": [token(text)]}}]} for text in pieces]
        self.answer("text/event-stream", *chunks, {"error": {"message": HOSTILE, "code": "model_failed"}})

    def answer(self, content_type, *parts):
        is_stream = content_type == "text/event-stream"
        text = "".join(f"data: {json.dumps(part)}\n\n" if is_stream else json.dumps(part) for part in parts)
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def test_an_answer_never_becomes_a_part_of_the_page(page, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with routing(tmp_path, f"http://127.0.0.1:{server.server_port}", "scripted-1") as (address, _):
        page.goto(address)
        page.get_by_label("Show token probabilities").check()
        card = ask(page, HOSTILE)
        expect(card.get_by_role("alert")).to_contain_text(HOSTILE)
        assert page.locator("#turns .question").text_content() == HOSTILE
        assert page.locator("#model").text_content().startswith(HOSTILE)
        assert card.locator(".text").text_content() == "".join(card.locator(".token").all_text_contents()) == HOSTILE
        card.locator(".token").first.hover()
        expect(page.get_by_role("tooltip")).to_contain_text("<img")
        assert page.locator("main img, main script, main b, header img").count() == 0
        assert page.evaluate("window.hacked") is None
    server.shutdown()
