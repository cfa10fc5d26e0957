"""The page of an endpoint in a real browser: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from lepton_ray import data
from lepton_ray.config.schema import ImageData, Model, TableData, TextData
from lepton_ray.data import Dataset
from lepton_ray.serving.keys import Keyring, make
from tests import apps

DEADLINE_MS = 120_000
SHOTS = os.environ.get("LEPTON_RAY_SCREENSHOTS")  # a folder to leave pictures of the pages in

# Every text against what is painted behind it, as WCAG 2 computes it: at least 4.5 to 1.
CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255);
  };
  const light = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = element => {
    if (!element) return [1, 1, 1];
    const [r, g, b, a] = rgba(getComputedStyle(element).backgroundColor);
    const below = a < 1 ? behind(element.parentElement) : [0, 0, 0];
    return [r, g, b].map((v, i) => a * v + (1 - a) * below[i]);
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const field = element.matches("input, textarea, select");
    if (!(own || field) || !element.checkVisibility()) continue;
    const [one, two] = [rgba(getComputedStyle(element).color), behind(element)].map(luminance);
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (ratio < 4.5) poor.push(`${element.outerHTML.slice(0, 80)}: ${ratio.toFixed(2)}`);
  }
  return poor;
}
"""
# What a screen reader would have no name for.
NAMELESS = """
() => [...document.querySelectorAll("input, select, textarea, button, img, a")]
  .filter(e => e.checkVisibility())
  .filter(e => !(e.labels && e.labels.length) && !e.ariaLabel && !e.textContent.trim()
    && !(e.tagName === "IMG" && (e.alt || e.closest("button"))))
  .map(e => e.outerHTML)
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        started = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=arguments, timeout=DEADLINE_MS
        )
        yield started
        started.close()


@contextmanager
def served(app: apps.App) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app.asgi, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield "http://{}:{}/".format(*listening.getsockname())
        server.should_exit = True
        thread.join()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page that asks nobody but its own server, and of which no script complains."""
    context = browser.new_context(**options)
    context.set_default_timeout(DEADLINE_MS)
    expect.set_options(timeout=DEADLINE_MS)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((url, "data:")) else 0)
    page.on(
        "console",
        lambda m: wrong.append(m.text) if m.type == "error" and "status of 4" not in m.text else 0,
    )
    page.goto(url)
    yield page
    context.close()
    assert not wrong


def looked_at(page: Page, name: str) -> None:
    assert page.evaluate(NAMELESS) == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(CONTRAST) == [], scheme
        if SHOTS:
            page.screenshot(path=f"{SHOTS}/{name}-{scheme}.png", full_page=True)
    page.set_viewport_size({"width": 360, "height": 740})
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360, "nothing to scroll sideways on a telephone"
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}-narrow.png", full_page=True)


def trained(folder: Path, dataset: Dataset, model: Model, **options: Any) -> apps.App:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    module = apps.fitted(dataset, model, steps=150)
    explainer, runtime = apps.made(folder / "v", dataset, module)
    torch.set_num_threads(before)
    return apps.app(runtime, explainer=explainer, **options)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> apps.App:
    dataset = data.load(ImageData(kind="image", source="sklearn:digits"))
    return trained(tmp_path_factory.mktemp("digits"), dataset, Model(name="cnn", width=8))


def test_an_image_is_chosen_answered_and_explained(
    browser: Browser, digits: apps.App, tmp_path: Path
) -> None:
    three = np.zeros((8, 8), np.uint8)
    three[0, 2:6] = three[3, 3:6] = three[7, 2:6] = three[:, 5] = 255
    Image.fromarray(three).save(tmp_path / "three.png")
    with served(digits) as url, opened(browser, url) as page:
        page.get_by_role("button", name="Predict").click()
        expect(page.get_by_role("alert")).to_have_text(
            "Choose an image first, or one of the examples."
        )
        page.get_by_label("Drop, paste or choose an image").set_input_files(tmp_path / "three.png")
        expect(page.get_by_role("status")).to_contain_text("by version 3 in")
        assert page.get_by_role("list", name="Probabilities").get_by_role("listitem").count() == 10
        page.get_by_role("button", name="Example 2: 1").click()
        expect(page.get_by_role("status")).to_contain_text("1, ")
        page.get_by_role("button", name="Explain").click()
        map_ = page.get_by_alt_text("Heat map: red pixels speak for 1, blue ones against it")
        expect(map_).to_be_visible()
        assert map_.evaluate("image => image.naturalWidth") == 224
        expect(page.get_by_text("add up to the difference, to within 5%")).to_be_visible()
        looked_at(page, "image")
        large = tmp_path / "large.png"
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(large)
        page.get_by_label("Drop, paste or choose an image").set_input_files(large)
        expect(page.get_by_role("alert")).to_contain_text("422: image:")


def test_what_is_tried_is_told_and_followed(browser: Browser, digits: apps.App) -> None:
    state = {
        "canary": {"version": 4, "share": 0.1, "instead_of": 3, "decision": "9 minutes are left"},
        "shadow": {"version": 5},
        "versions": {
            "3": {"requests": 90, "errors": 0, "p99_ms": 4.5},
            "4": {"requests": 10, "errors": 1, "p99_ms": 5.5, "compared": 10, "agreement": 0.9},
        },
    }
    last = {"version": 4, "outcome": "rolled back", "reason": "errors 10.0% (1 of 10)"}
    app = apps.app(digits.local.runtime)
    with served(app) as url, opened(browser, url) as page:
        tried = page.get_by_role("region", name="Tried beside it")
        expect(page.get_by_role("button", name="Predict")).to_be_visible()
        expect(tried).to_be_hidden()
        app.local.state = state
        expect(tried).to_contain_text("Version 4 is tried as a canary: it answers 10.0% of callers")
        expect(tried).to_contain_text("in place of version 3. Until now: 9 minutes are left.")
        expect(tried).to_contain_text("Version 5 is tried as a shadow")
        expect(tried.get_by_role("row", name="4 10 1 5.5 10 90.0%")).to_be_visible()
        looked_at(page, "tried")
        app.local.state = {"last": last}
        expect(tried).to_have_text(
            "Tried beside it The last canary, version 4, was rolled back: errors 10.0% (1 of 10)."
        )


def test_a_table_is_filled_in_by_keyboard_alone(browser: Browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.uniform(10, 90, 300), "city": ["Bonn", "<b>", "Rom"] * 100})
    frame["y"] = np.where(frame["age"] > 40, "yes", "no")
    frame.to_csv(tmp_path / "people.csv", index=False)
    settings = TableData(kind="table", source=str(tmp_path / "people.csv"), target="y")
    app = trained(tmp_path, data.load(settings), Model(name="mlp", width=16))
    with served(app) as url, opened(browser, url) as page:
        page.keyboard.press("Tab")
        expect(page.get_by_role("textbox", name=re.compile("^age"))).to_be_focused()
        page.keyboard.press("Control+A")
        page.keyboard.type("12")
        page.keyboard.press("Tab")
        expect(page.get_by_label("city")).to_be_focused()
        page.keyboard.type("R")
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Predict")).to_be_focused()
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert outline == "3px", "a person sees where she is"
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_contain_text("no, ")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        weights = page.get_by_role("list", name="Weights")
        expect(weights.get_by_role("listitem").first).to_contain_text("age = 12")
        looked_at(page, "table")
        page.get_by_role("textbox", name=re.compile("^age")).fill("old")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("age must be a number, but is “old”.")
        expect(page.get_by_role("textbox", name=re.compile("^age"))).to_be_focused()


def test_each_label_of_a_row_is_shown(browser: Browser, tmp_path: Path) -> None:
    age, city = np.arange(300.0), np.array(["Bonn", "Oslo", "Rom"] * 100)
    frame = pd.DataFrame({"age": age, "city": city, "old": age > 150, "roman": city == "Rom"})
    frame.to_csv(tmp_path / "people.csv", index=False)
    settings = TableData(kind="table", source=str(tmp_path / "people.csv"), target=("old", "roman"))
    app = trained(tmp_path, data.load(settings), Model(name="mlp", width=16))
    with served(app) as url, opened(browser, url) as page:
        said, bars = page.get_by_role("status"), page.get_by_role("list", name="Probabilities")
        page.get_by_role("textbox", name=re.compile("^age")).fill("290")
        page.get_by_label("city").select_option("Rom")
        page.get_by_role("button", name="Predict").click()
        expect(said).to_contain_text("old, roman, by version 3")
        expect(bars.locator(".best")).to_have_count(2)
        page.get_by_role("textbox", name=re.compile("^age")).fill("2")
        page.get_by_label("city").select_option("Bonn")
        page.get_by_role("button", name="Predict").click()
        expect(said).to_contain_text("no label, by version 3")
        expect(bars.get_by_role("listitem")).to_have_count(2)
        expect(bars.locator(".best")).to_have_count(0)
        expect(page.get_by_role("button", name="Example 1, labels: ")).to_be_visible()
        page.get_by_role("button", name="Explain").click()
        expect(page.get_by_role("heading", name=re.compile("Why (old|roman) has"))).to_be_visible()
        looked_at(page, "labels")


def test_a_text_is_typed_and_its_words_are_marked(browser: Browser, tmp_path: Path) -> None:
    source = apps.write_reviews(tmp_path / "reviews.csv", 600)
    settings = TextData(kind="text", source=str(source), text="text", target="mood")
    app = trained(tmp_path, data.load(settings), Model(name="text_cnn", width=8))
    with served(app) as url, opened(browser, url) as page:
        page.get_by_label("text").fill("🎬 the film is lovely </script><b>")
        page.get_by_role("button", name="Predict").click()
        expect(page.get_by_role("status")).to_contain_text("good, ")
        page.get_by_role("button", name="Explain").click()
        marked = page.locator(".words mark")
        expect(marked.filter(has_text="lovely")).to_have_count(1)
        expect(page.locator(".words")).to_have_text("🎬 the film is lovely </script><b>")
        heaviest = page.get_by_role("list", name="Weights").get_by_role("listitem").first
        expect(heaviest).to_contain_text("lovely")
        looked_at(page, "text")


def test_with_keys_the_page_says_nothing_before_it_has_one(
    browser: Browser, digits: apps.App
) -> None:
    key, entry = make("a", ("predict", "explain"), None)
    guarded = apps.app(digits.local.runtime, Keyring((entry,)), digits.local.explainer)
    with served(guarded) as url, opened(browser, url) as page:
        assert "classes" not in page.locator("#model").inner_text()
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert").first).to_contain_text("401: a valid key is needed")
        looked_at(page, "key")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Example 1: 0").click()
        expect(page.get_by_role("status")).to_contain_text("by version 3 in")
