"""The page in a real browser, on a real server: text, tokens, forks, states, and errors."""

import json
import math
import random
import re

import pytest
import torch

from tests.helpers.browser import open_browser
from tests.helpers.server_page import Page, cyclic, keys, press
from tests.helpers.serving import served, tiny
from tests.helpers.tiers import slow
from tests.helpers.vocabularies import BYTES
from timemix.generation.sampler import Sampler
from timemix.server.app import Settings
from timemix.tokenizers.character import ByteTokenizer, CharacterTokenizer
from timemix.tokenizers.world import WorldTokenizer


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as driver:
        driver.set_script_timeout(60)
        yield driver


@pytest.fixture
def server():
    with served([tiny()]) as running:
        yield running


@pytest.fixture
def page(browser, server):
    """Open the page; afterwards, check that the console is empty."""
    browser.get_log("browser")
    yield Page(browser, server).open()
    assert browser.get_log("browser") == []


def test_a_text_is_that_of_the_api_and_each_token_is_shaded(page):
    page.set(max_tokens=40, seed=7, temperature=0.7)
    page.type("abc")
    page.find("#editor").send_keys(*keys("CONTROL", "ENTER"))
    page.idle()
    choice = page.server.complete(prompt="abc", max_tokens=40, seed=7, temperature=0.7, logprobs=0)["choices"][0]
    assert page.text == "abc" + choice["text"]
    spans = page.all("#mirror span.made")
    assert [span.text for span in spans] == list(choice["text"])
    bits = [-x / math.log(2) for x in choice["logprobs"]["token_logprobs"]]
    shades = [int((re.search(r"\bs(\d)\b", span.get_attribute("class")) or [0, 0])[1]) for span in spans]
    assert all(abs(shade - min(8, each)) <= 0.5 + 1e-9 for shade, each in zip(shades, bits, strict=True))
    assert re.search(r"43 tokens · 40 new tokens · [\d,]+ tokens/s · first token after \d+ ms", page.read("#status"))


@pytest.mark.slow
def test_a_text_goes_over_several_calls(page):
    page.set(max_tokens=9)
    page.type("ab")
    page.generate()
    page.generate()
    page.type("cc")
    page.generate()
    assert len(page.text) == 2 + 9 + 9 + 2 + 9
    assert len(page.all("#tree [role=treeitem]")) == 3


def test_stop_keeps_the_text_so_far(page):
    page.set(max_tokens=100000)
    page.type("ab")
    page.find("#generate").click()
    page.until(lambda: len(page.all("#mirror span.made")) > 5)
    press(page, "ESCAPE")
    page.idle()
    assert len(page.text) > 5
    page.until(lambda: not page.server.models[0].engine.busy)
    assert page.banner == ""


@pytest.mark.parametrize("text", ["你🙂", slow("é\n😀")])
def test_characters_of_several_bytes_are_shown_whole(browser, text):
    with served([cyclic(ByteTokenizer(), text)]) as running:
        page = Page(browser, running).open()
        size = len(text.encode())
        # The first text ends within a character.
        page.set(max_tokens=2 * size + 1)
        page.run("document.getElementById('editor').value = arguments[0]; byEdit()", text)
        page.idle()
        page.find("#generate").click()
        seen = set()
        while page.run("return !!running"):
            seen.add(page.run("return document.getElementById('mirror').textContent"))
        page.idle()
        assert not any("\ufffd" in each for each in seen)
        assert page.text == 3 * text
        page.set(max_tokens=size - 1)
        page.generate()
        assert page.text == 4 * text
        assert [span.get_attribute("textContent") for span in page.all("#mirror span.made")][:2] == [text[0], text[1]]
        assert browser.get_log("browser") == []


def test_text_of_the_model_is_never_html(browser):
    with served([cyclic(CharacterTokenizer(list('<img >"/a'), "error"), "<img>")]) as running:
        page = Page(browser, running).open()
        page.set(max_tokens=40)
        page.type("<")
        page.generate()
        assert page.text == "<img>" * 8 + "<"
        page.find("#tab-samples").click()
        page.find("#sample").click()
        page.idle()
        assert "<img>" in page.find("#columns").text
        assert page.all("img, #mirror > * > *") == []
        assert browser.get_log("browser") == []


def test_the_sampler_of_the_page_is_that_of_the_library(page):
    generator = random.Random(3)
    for _ in range(60):
        size = generator.choice([2, 11, 300])
        # Whole numbers give many equal logits.
        logits = [generator.choice([generator.gauss(0, 3), float(generator.randint(-3, 3))]) for _ in range(size)]
        seen = generator.sample(range(size), size // 2)
        fields = {
            "temperature": generator.choice([0, 0.3, 1, 1.7]),
            "top_k": generator.choice([0, 1, 5]),
            "top_p": generator.choice([1, 0.3, 0.9]),
            "min_p": generator.choice([0, 0.1, 1]),
            "top_a": generator.choice([0, 0.2, 1]),
            "top_a_power": generator.choice([2, 0.5]),
            "repetition_penalty": generator.choice([1, 1.3, 0.7]),
        }
        mask = torch.zeros(1, size, dtype=torch.bool)
        mask[0, seen] = True
        wanted = Sampler(**fields).probabilities(torch.tensor([logits], dtype=torch.float64), mask)[0].tolist()
        found = page.run(
            "return Array.from(probabilities(arguments[0], arguments[1], arguments[2]))", logits, fields, seen
        )
        assert found == pytest.approx(wanted, abs=1e-12), fields


def test_the_page_subtracts_penalties_from_generated_tokens(page):
    logits, counts = [1.0, 0.5, 2.0, -1.0], [[1, 1], [2, 3]]
    penalized = torch.tensor([[1.0, 0.5 - 0.4 - 0.25, 2.0 - 0.4 - 3 * 0.25, -1.0]], dtype=torch.float64)
    found = page.run(
        "return Array.from(probabilities(arguments[0], arguments[1], [], new Map(arguments[2])))",
        logits,
        {"presence_penalty": 0.4, "frequency_penalty": 0.25, "top_k": 3},
        counts,
    )
    assert found == pytest.approx(Sampler(top_k=3).probabilities(penalized)[0].tolist(), abs=1e-12)


def test_the_bars_follow_the_sliders_without_a_call(page):
    page.type("abc")
    before = page.bars
    exact = page.server.call("/v1/next_token", {"prompt": "abc"}).json["top"]
    assert {token: p for token, (p, _) in before.items()} == pytest.approx(
        {each["token"]: math.exp(each["logprob"]) for each in exact}
    )
    calls = page.run("return performance.getEntriesByType('resource').length")
    slider = page.find("#set-temperature").find_element("xpath", "following-sibling::input")
    slider.send_keys(*keys("ARROW_LEFT") * 30)
    page.set(top_k=4)
    logits = torch.tensor([[each["logprob"] for each in exact]])
    wanted = Sampler(temperature=0.7, top_k=4).probabilities(logits)[0].tolist()
    assert page.run("return session.settings.temperature") == pytest.approx(0.7)
    assert {token: p for token, (_, p) in page.bars.items()} == pytest.approx(
        {each["token"]: p for each, p in zip(exact, wanted, strict=True)}
    )
    assert page.read("#bars-note").startswith("4 of 11 tokens remain.")
    assert page.run("return performance.getEntriesByType('resource').length") == calls


def test_the_keyboard_finds_alternatives_and_forks(page):
    page.set(max_tokens=12)
    page.type("abc")
    page.generate()
    old = page.text
    page.find("#editor").send_keys(*keys("HOME", "F2"))
    press(page, *["ARROW_RIGHT"] * 4)
    press(page, "ENTER")
    page.until(lambda: page.all("#popover button"))
    page.until(lambda: page.run("return document.getElementById('popover').contains(document.activeElement)"))
    names = [row.find_element("css selector", ".name").text for row in page.all("#popover button")]
    (chosen,) = page.all("#popover .chosen .name")
    assert chosen.text == old[6]
    exact = page.server.call("/v1/next_token", {"prompt": old[:6]}).json["top"]
    assert names == [each["token"] for each in exact]
    other = next(i for i, name in enumerate(names) if name != old[6])
    press(page, *["ARROW_DOWN"] * other, "ENTER")
    page.until(lambda: page.text[:7] == old[:6] + names[other])
    page.idle()
    assert len(page.text) == 7 + 12
    # The old text and the new text share the beginning.
    assert page.run("return children(null).map(root => [fullText(root), children(root.id).map(fullText)])") == [
        [old[:6], [old, page.text]]
    ]
    page.find("#retry").click()
    page.idle()
    assert page.text[:7] == old[:6] + names[other]
    assert page.find("#set-seed").get_attribute("value") == "1"


@pytest.mark.slow
def test_an_edit_keeps_the_tokens_before_it(page):
    page.set(max_tokens=10)
    page.type("abc")
    page.generate()
    old = page.text
    page.find("#editor").send_keys(*keys("BACK_SPACE") * 4, "kk")
    page.idle()
    assert page.text == old[:9] + "kk"
    page.generate()
    assert page.text[:11] == old[:9] + "kk"
    assert page.run("return Object.values(session.nodes).filter(node => !children(node.id).length).map(fullText)") == [
        old,
        page.text,
    ]


def test_unknown_characters_are_marked_before_the_call(page):
    page.type("abΩcé")
    assert [mark.text for mark in page.all("#mirror mark")] == ["Ω", "é"]
    assert page.read("#status") == (
        "The vocabulary of the model has no “Ω” (U+03A9), “é” (U+00E9). Remove the marked characters."
    )
    page.generate()
    assert "U+03A9" in page.banner
    page.find("#editor").clear()
    page.type("abc")
    page.generate()
    assert page.banner == ""
    assert len(page.text) == 203


def test_the_score_of_a_text(page):
    page.find("#tab-score").click()
    page.find("#score-text").send_keys("abcabkhgf")
    page.find("#score-now").click()
    page.until(lambda: page.all("#score-view span"))
    choice = page.server.complete(prompt="abcabkhgf", echo=True, logprobs=0, max_tokens=0)["choices"][0]
    bits = -sum(choice["logprobs"]["token_logprobs"][1:]) / math.log(2)
    figures = [figure.text for figure in page.all("#score-figures b")]
    assert figures == [f"{bits / 8:.3f}", f"{bits / 8:.3f}", f"{bits:,.0f}", "8"]
    assert page.find("#score-view").text == "abcabkhgf"


@pytest.mark.slow
def test_samples_have_the_seeds_of_the_api(page):
    page.set(max_tokens=15, seed=4)
    page.type("abc")
    page.find("#tab-samples").click()
    page.find("#sample").click()
    page.idle()
    assert [each.text for each in page.all("#columns b")] == ["Seed 4", "Seed 5", "Seed 6", "Seed 7"]
    texts = [each.text for each in page.all("#columns .text")]
    assert texts == [
        page.server.complete(prompt="abc", max_tokens=15, seed=seed)["choices"][0]["text"] for seed in range(4, 8)
    ]
    page.all("#columns button")[2].click()
    page.idle()
    assert page.text == "abc" + texts[2]


def test_a_reload_keeps_the_session(page):
    page.set(max_tokens=8, seed=21, top_p=0.8)
    page.type("abc")
    page.generate()
    page.generate()
    page.type("k")
    text = page.text
    page.reload()
    assert page.text == text
    assert len(page.all("#tree [role=treeitem]")) == 2
    assert page.run("return [session.settings.seed, session.settings.top_p]") == [21, 0.8]
    assert page.find("#set-top_p").get_attribute("value") == "0.8"
    page.generate()
    assert len(page.text) == len(text) + 8


def test_a_state_that_the_server_lost_is_read_again(page):
    page.set(max_tokens=8)
    page.type("abc")
    page.generate()
    text = page.text
    (state,) = page.server.call("/v1/states").json["data"]
    assert page.read("#selected p").startswith("After 11 tokens: the whole past in ")
    page.server.call(f"/v1/states/{state['id']}", method="DELETE")
    page.reload()
    assert page.read("#selected p").startswith("The server no longer has this state.")
    assert page.text == text
    page.until(
        lambda: (
            page.read("#toast") == ("The server no longer has 1 state. timemix reads the text again on the next use.")
        )
    )
    page.all("#selected button")[1].click()
    page.until(lambda: page.read("#selected p").startswith("After 11 tokens"))
    page.generate()
    assert len(page.text) == len(text) + 8


@pytest.mark.slow
def test_two_tabs_have_two_sessions(page):
    first = page.browser.current_window_handle
    page.type("abc")
    page.browser.switch_to.new_window("tab")
    try:
        page.open()
        assert page.text == ""
        page.type("kk")
        page.reload()
        assert page.text == "kk"
        page.browser.switch_to.window(first)
        page.reload()
        assert page.text == "abc"
    finally:
        page.browser.switch_to.window(next(each for each in page.browser.window_handles if each != first))
        page.browser.close()
        page.browser.switch_to.window(first)


def test_nothing_comes_from_elsewhere(page):
    answer = page.server.call("/")
    source = answer.body.decode()
    assert not re.search(
        r"""(?:src|href|url\()\s*=?\s*["']?(?!data:,)[\w/.:]""", re.sub(r"<script>.*", "", source, flags=re.S)
    )
    assert re.findall(r"https?://[\w.]+", source) == []
    assert len(answer.body) < 150_000
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page.type("abc")
    page.generate()
    requested = page.run("return performance.getEntriesByType('resource').map(each => new URL(each.name).origin)")
    assert set(requested) == {page.server.url}


def test_a_server_that_is_gone_is_reported_at_once(browser):
    with served([tiny()]) as running:
        page = Page(browser, running).open()
        page.type("abc")
    page.find("#generate").click()
    page.until(lambda: page.banner.startswith("The server does not answer."))
    page.idle()
    assert page.text == "abc"
    assert page.find("#generate").is_enabled()
    browser.get_log("browser")


@pytest.mark.slow
def test_a_server_that_dies_within_a_text(browser):
    with served([tiny()]) as running:
        page = Page(browser, running).open()
        page.set(max_tokens=1_000_000)
        page.type("abc")
        page.find("#generate").click()
        page.until(lambda: len(page.all("#mirror span.made")) > 5)
    page.until(lambda: "The text so far is kept." in page.banner)
    page.idle()
    assert len(page.text) > 8
    browser.get_log("browser")


@pytest.mark.slow
def test_a_key_is_asked_for_and_stays_in_the_tab(browser):
    with served([tiny()], Settings(keys=["open sesame"])) as running:
        page = Page(browser, running)
        browser.get(running.url)
        page.until(lambda: page.find("#key").is_displayed())
        page.find("#key-value").send_keys("open sesame", *keys("ENTER"))
        page.until(lambda: page.find("#facts").text)
        page.type("abc")
        page.generate()
        assert len(page.text) == 203
        assert "sesame" not in json.dumps(page.run("return {...localStorage}"))
        page.run("byId('copy-curl').click()")
        assert "$TIMEMIX_API_KEY" in page.find("#code-text").text
        assert "sesame" not in page.find("#code-text").text
    browser.get_log("browser")


@pytest.mark.slow
def test_a_link_opens_the_text_with_its_settings(page):
    page.set(seed=9, top_k=3)
    page.type("abc")
    link = page.run("return shareLink()")
    assert link.startswith(page.server.url + "/#")
    page.browser.switch_to.new_window("tab")
    try:
        page.browser.get(link)
        page.until(lambda: page.find("#facts").text)
        page.idle()
        assert page.text == "abc"
        assert page.run("return [session.settings.seed, session.settings.top_k]") == [9, 3]
        assert page.browser.current_url == page.server.url + "/"
        page.open("#nonsense")
        page.until(lambda: "link is damaged" in page.read("#toast"))
    finally:
        page.browser.close()
        page.browser.switch_to.window(page.browser.window_handles[0])


@pytest.mark.slow
def test_code_gives_the_same_text(page):
    page.set(seed=9, top_k=3, max_tokens=12)
    page.type("abc")
    page.generate()
    page.find("#new-text").click()
    page.type("abc")
    page.run("byId('copy-curl').click()")
    command = page.find("#code-text").text
    body = json.loads(command[command.index("{") : command.rindex("}") + 1])
    page.find("#code-close").click()
    assert page.server.complete(**body)["choices"][0]["text"] == page.run("return fullText(children(null)[0])")[3:]
    openai = pytest.importorskip("openai")
    page.run("byId('copy-python').click()")
    printed = []
    source = page.find("#code-text").text
    page.find("#code-close").click()
    assert "OpenAI" in vars(openai)
    exec(source, {"print": printed.append})
    assert printed == [page.run("return fullText(children(null)[0])")[3:]]


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function over(colour, ground) {
  canvas.fillStyle = `rgb(${ground.join(" ")})`;
  canvas.fillRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function luminance(colour) {
  const [r, g, b] = colour.map(x => x / 255).map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ground(node) {
  const found = [];
  for (; node; node = node.parentElement) found.unshift(getComputedStyle(node).backgroundColor);
  return found.reduce((below, colour) => over(colour, below), [255, 255, 255]);
}
const low = [];
for (const node of document.querySelectorAll("body *")) {
  const isText = [...node.childNodes].some(each => each.nodeType === 3 && each.textContent.trim());
  const isLeftOut = node.closest(":disabled, script, textarea.text");
  if (!isText || isLeftOut || !node.checkVisibility()) continue;
  const below = ground(node), text = over(getComputedStyle(node).color, below);
  const [a, b] = [luminance(below), luminance(text)].sort((x, y) => x - y);
  const contrast = (b + 0.05) / (a + 0.05);
  if (contrast < 4.5) low.push([node.outerHTML.slice(0, 80), contrast]);
}
return low;
"""


@pytest.mark.parametrize("theme", ["light", slow("dark")])
def test_text_has_contrast(page, theme):
    page.set(max_tokens=60, temperature=2)
    page.run("document.documentElement.dataset.theme = arguments[0]", theme)
    page.type("abc")
    page.generate()
    assert {"s5", "s1"} <= set(" ".join(each.get_attribute("class") for each in page.all("#mirror span")).split())
    page.run("openPopover(20)")
    page.until(lambda: page.all("#popover button"))
    assert page.run(CONTRAST) == []
    for tab in ("samples", "score", "state"):
        page.find(f"#tab-{tab}").click()
        assert page.run(CONTRAST) == []


@pytest.mark.slow
def test_a_phone_shows_everything(page):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page.open()
        page.type("abc")
        page.find("#generate").click()
        page.idle()
        for tab in ("write", "samples", "score", "state"):
            page.find(f"#tab-{tab}").click()
            assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        page.find("#tab-write").click()
        for button in page.all("#bar button"):
            box = button.rect
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
        page.run("setInspecting(true, 5)")
        page.all("#mirror span.made")[3].click()
        page.until(lambda: page.all("#popover button"))
        assert page.find("#popover").rect["width"] == 390
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_each_control_has_a_name(page):
    page.type("abc")
    page.generate()
    unnamed = page.run(
        """return [...document.querySelectorAll("button, input, select, textarea, [role=treeitem], summary")]
          .filter(each => !(each.textContent.trim() || each.getAttribute("aria-label") || each.labels?.length))
          .map(each => each.outerHTML)"""
    )
    assert unnamed == []


STATES = """
const node = await readSheet();
return [node.state, stateRows(await fetchState(node.state)).map(row => rms(row.numbers))];
"""


@pytest.mark.slow
def test_states_are_drawn_compared_and_mixed(page):
    page.set(max_tokens=20)
    page.type("abcabc")
    page.generate()
    page.find("#new-text").click()
    page.type("kkkkkk")
    page.generate()
    page.find("#tab-state").click()
    page.find("#draw").click()
    page.until(lambda: page.find("#over-time").is_displayed() and page.find("#draw").is_enabled())
    columns, rows = page.run("return [byId('over-time').width, byId('over-time').height]")
    # Three layers with two vectors and four heads each.
    assert (columns, rows) == (26, 3 * 6)
    assert (
        page.run("const d = byId('over-time').getContext('2d').getImageData(0, 0, 26, 18).data; return new Set(d).size")
        > 50
    )
    page.find("#compare").click()
    page.until(lambda: len(page.all("#three h3")) == 3)
    a, b = (next_tokens(page, f"three.{name}") for name in "ab")
    assert a != pytest.approx(b, abs=1e-3)
    for share, wanted in ((1, a), (0, None)):
        page.run("three.mixed = null; byId('share-of-a').value = arguments[0]; previewMix()", share)
        page.until(lambda: page.run("return !!three.mixed"))
        mixed = next_tokens(page, "three.mixed")
        assert mixed == pytest.approx(wanted or a, abs=1e-6) if wanted else mixed != pytest.approx(a, abs=1e-3)
    states = len(page.server.call("/v1/states").json["data"])
    page.find("#mix").click()
    page.until(lambda: page.find("#textless").is_displayed())
    page.idle()
    assert len(page.server.call("/v1/states").json["data"]) == states + 1
    page.generate()
    assert len(page.text) == 20


def next_tokens(page, name):
    return page.run(f"return {name}.top.toSorted((a, b) => a.id - b.id).map(each => Math.exp(each.logprob))")


@pytest.mark.slow
def test_a_state_goes_through_a_file(page):
    page.set(max_tokens=10)
    page.type("abc")
    page.generate()
    (state,) = page.server.call("/v1/states").json["data"]
    content = page.server.call(f"/v1/states/{state['id']}").body
    loaded = page.wait_for(
        """const data = Uint8Array.from(arguments[0]);
        await loadFile(new File([data], "my state.state"));
        return session.nodes[session.current].name""",
        list(content),
    )
    assert loaded == "my state"
    page.idle()
    page.generate()
    continued = page.text
    page.all("#tree [role=treeitem]")[0].click()
    page.idle()
    page.generate()
    assert page.text.endswith(continued)
    same = page.wait_for("return Array.from(new Uint8Array(buildTensors(await fetchState(arguments[0]))))", state["id"])
    assert json.loads(bytes(same[8 : 8 + int.from_bytes(bytes(same[:8]), "little")])) == json.loads(
        content[8 : 8 + int.from_bytes(content[:8], "little")]
    )
    refused = page.wait_for("await loadFile(new File(['nonsense that is long enough'], 'a.txt'))")
    assert "damaged" in refused
    # The browser reports the status 400.
    page.browser.get_log("browser")


@pytest.mark.slow
def test_a_session_goes_through_a_file(page):
    page.set(max_tokens=10, seed=5)
    page.type("abc")
    page.generate()
    text = page.text
    saved = page.run("return JSON.stringify(packedSession())")
    page.find("#new-text").click()
    page.type("kk")
    page.wait_for("await loadFile(new File([arguments[0]], 'session.json'))", saved)
    page.idle()
    assert page.text == text
    assert page.run("return session.settings.seed") == 5
    data = json.loads(saved)
    data["nodes"][0]["parent"] = data["nodes"][0]["id"]
    data["settings"] = {"temperature": "<b>", "seed": -1, "top_k": 2.5}
    page.wait_for("await loadFile(new File([arguments[0]], 'session.json'))", json.dumps(data))
    page.idle()
    assert page.run("return [session.settings.temperature, session.settings.seed, session.settings.top_k]") == [1, 0, 0]


@pytest.mark.slow
def test_where_a_bounded_context_was_anchored_again(browser):
    with served([tiny(arch="rwkv1")]) as running:
        page = Page(browser, running).open()
        page.set(max_tokens=20)
        page.type("abcd")
        page.generate()
        # The context has 12 tokens, and half of it is read again.
        anchored = page.run("return sheet.parts.flatMap((part, i) => part.isAnchored ? [i] : [])")
        assert len(anchored) >= 1
        assert "re-anchored before token" in page.read("#status")
        page.run("openPopover(20)")
        page.until(lambda: page.all("#popover button"))
        assert page.banner == ""
        assert browser.get_log("browser") == []


@pytest.mark.slow
def test_chat_is_there_for_models_with_a_template(browser):
    world = tiny("world", tokenizer=WorldTokenizer([*BYTES, b"\n\n", b"User", b" Hi"], 300))
    with served([world, tiny("plain")]) as running:
        page = Page(browser, running).open()
        page.set(max_tokens=12, seed=3)
        page.find("#tab-chat").click()
        page.find("#chat-text").send_keys("Hello!", *keys("CONTROL", "ENTER"))
        page.idle()
        asked, answered = page.run("return session.chat")
        assert asked == {"role": "user", "content": "Hello!"}
        body = {"messages": [asked], "max_tokens": 12, "seed": 3}
        answer = running.call("/v1/chat/completions", body).json["choices"][0]["message"]
        assert answered == {"role": "assistant", "content": answer["content"]}
        assert [each.get_attribute("textContent") for each in page.all(".message")] == [
            "Hello!",
            answer["content"].strip(),
        ]
        page.reload()
        assert len(page.all(".message")) == 2
        page.run("byId('model').value = 'plain'; byId('model').onchange({ target: byId('model') })")
        page.idle()
        assert not page.find("#tab-chat").is_displayed()
        assert page.find("#write").is_displayed()
        assert browser.get_log("browser") == []
