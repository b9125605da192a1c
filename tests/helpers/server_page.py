"""The page of the server in a real browser, and models whose text is known."""

import time

import torch

from tests.helpers.models import build
from timemix.generation.engine import Engine
from timemix.models.registry import model_config
from timemix.server.engine_thread import Served


class Page:
    """The page in a browser.

    Args:
        browser: The browser.
        server: The server, on a port of its own, so that the browser stores nothing of other tests for it.
    """

    def __init__(self, browser, server):
        self.browser, self.server = browser, server

    def open(self, fragment=""):
        self.browser.get(f"{self.server.url}/{fragment}")
        return self.ready()

    def reload(self):
        self.browser.refresh()
        return self.ready()

    def ready(self):
        self.until(lambda: self.find("#facts").text)
        self.idle()
        return self

    def find(self, css):
        return self.browser.find_element("css selector", css)

    def all(self, css):
        return self.browser.find_elements("css selector", css)

    def run(self, script, *values):
        return self.browser.execute_script(script, *values)

    def wait_for(self, script, *values):
        """Return the value of a promise."""
        return self.browser.execute_async_script(
            f"const done = [...arguments].pop(); (async () => {{ {script} }})().then(done, e => done(String(e)))",
            *values,
        )

    def until(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the page does not come to the expected content"
            time.sleep(0.02)

    def read(self, css):
        """Return the text of an element, which the page may replace at any time."""
        return self.run("return document.querySelector(arguments[0])?.textContent ?? ''", css)

    def idle(self):
        """Wait until nothing is generated, and the bars belong to the text."""
        self.until(lambda: self.run("return !running && !surveying"))

    def set(self, **settings):
        self.run("Object.assign(session.settings, arguments[0]); showSettings(); showNext()", settings)

    def type(self, text):
        self.find("#editor").send_keys(text)
        self.idle()

    def generate(self):
        self.find("#generate").click()
        self.idle()

    @property
    def text(self):
        """The text in the sheet, which the tokens and the editor must agree on."""
        shown = self.run("return document.getElementById('mirror').textContent")
        assert shown == self.run("return document.getElementById('editor').value") + "\n"
        return shown[:-1]

    @property
    def bars(self):
        """{token: (probability before, probability after)} of the listed tokens."""
        rows = self.run("return ranked(next).rows.map(row => [row.token.token, row.before, row.after])")
        return {token: (before, after) for token, before, after in rows}

    @property
    def banner(self):
        return self.find("#banner").text if self.find("#banner").is_displayed() else ""


def cyclic(tokenizer, text, name="cyclic"):
    """Return a model that repeats a text, all of whose tokens are different."""
    model = build(model_config("rwkv7"), torch.float32, vocab_size=tokenizer.vocab_size)
    ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model(ids[None], model.init_state(1))
        x = model.norm(model.input_norm(model.embedding(ids)))
        model.head.weight.zero_()
        model.head.weight[ids.roll(-1)] = 60 * x / x.square().sum(-1, keepdim=True)
    return Served(name, Engine(model, tokenizer), "float32", 1)


def keys(*names):
    from selenium.webdriver.common.keys import Keys

    return [getattr(Keys, name, name) for name in names]


def press(page, *names):
    page.browser.switch_to.active_element.send_keys(*keys(*names))
