"""The example applications, each started by its one command and used through a real browser without a screen."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

from pubsub_facade import PubSub, Settings
from pubsub_facade.testing.faults import free_port, wait_until

from .conftest import ROOT
from .servers import environment

SHOTS = "SCREENSHOTS"  # a folder: keep screenshots there, as the docs show them


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        from brokers.install import apt

        apt(["chromium", "chromium-driver"])
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=900,620"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield running
    running.quit()


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a running example: of its name and, after a hyphen, its broker."""
    name, _, broker = request.param.partition("-")
    port = free_port()
    command = [sys.executable, str(ROOT / "examples" / f"social_{name}" / "run.py")]
    variables = {}
    if broker:
        config = str(ROOT / ".brokers" / f"pubsub.{broker}.toml")
        variables = {"PUBSUB_CONFIG": config, "PUBSUB_NAMESPACE": f"test-{uuid.uuid4().hex[:10]}"}
    log = tmp_path / "log"
    with log.open("w") as output:
        running = subprocess.Popen(
            [*command, "--port", str(port), "--state", str(tmp_path)],
            cwd=tmp_path,
            env=environment(**variables),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert running.poll() is None, log.read_text()
        try:
            return bool(urllib.request.urlopen(url, timeout=5).status == 200)
        except OSError:
            return False

    try:
        wait_until(answers, 60, f"an answer of {command}; see {log}")
        yield url
    finally:
        running.send_signal(signal.SIGTERM)
        code = running.wait(30)
        if broker:
            with PubSub(Settings.load(config, namespace=variables["PUBSUB_NAMESPACE"])) as pubsub:
                pubsub.delete("notifications")
                pubsub.delete("analytics")
    assert code == 0, log.read_text()


def see(true: Callable[[], bool], what: str, timeout: float = 30) -> None:
    wait_until(true, timeout, what)


@pytest.mark.parametrize(
    "site",
    ["django", "flask", pytest.param("flask-rabbitmq", marks=pytest.mark.broker("rabbitmq"))],
    indirect=True,
)
def test_a_post_reaches_the_feed_of_another_window_and_the_chart(
    browser: WebDriver, site: str, request: pytest.FixtureRequest
) -> None:
    reader = browser.current_window_handle
    browser.get(site)
    see(lambda: text_of(browser, "state") == "live", "the feed to be live")
    browser.switch_to.new_window("window")
    writer = browser.current_window_handle
    try:
        for author, text in (("Ada", "Hello <b>world</b>"), ("Grace", "Found a moth"), ("Ada", "Once more")):
            browser.get(site)
            browser.find_element(By.NAME, "author").send_keys(author)
            browser.find_element(By.NAME, "text").send_keys(text)
            browser.find_element(By.CSS_SELECTOR, "form button").click()
            see(lambda text=text: text in text_of(browser, "posts"), "the post on the page")
        browser.switch_to.window(reader)
        see(
            lambda: len(browser.find_elements(By.CSS_SELECTOR, "#feed .new")) == 3, "three live notifications"
        )
        texts = sorted(item.text for item in browser.find_elements(By.CSS_SELECTOR, "#feed .new"))
        assert texts == sorted(
            ["Ada posted: Hello <b>world</b>", "Grace posted: Found a moth", "Ada posted: Once more"]
        )
        browser.get(site)
        see(lambda: text_of(browser, "state") == "live", "the feed to be live again")
        shoot(browser, request, "home")
        browser.get(f"{site}/analytics/")
        see(lambda: bars(browser) == {"Ada": "2", "Grace": "1"}, "the chart")
        shoot(browser, request, "analytics")
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors
    finally:
        browser.switch_to.window(writer)
        browser.close()
        browser.switch_to.window(reader)
        browser.get("about:blank")


def text_of(browser: WebDriver, id: str) -> str:
    """The text of an element now; "" while its page is not there."""
    found = browser.execute_script("return document.getElementById(arguments[0])?.innerText ?? ''", id)
    return str(found)


def bars(browser: WebDriver) -> dict[str | None, str | None]:
    script = "return [...document.querySelectorAll('rect')].map(r => [r.dataset.author, r.dataset.posts])"
    return dict(browser.execute_script(script))


@pytest.mark.parametrize("site", ["django", "flask"], indirect=True)
def test_a_form_that_is_not_filled_in_rightly_is_refused(browser: WebDriver, site: str) -> None:
    browser.get(site)
    script = "document.querySelectorAll('form input').forEach(i => i.removeAttribute('required'))"
    browser.execute_script(script)
    browser.find_element(By.NAME, "author").send_keys("<script>")
    browser.find_element(By.CSS_SELECTOR, "form button").click()
    see(lambda: bool(browser.find_elements(By.CSS_SELECTOR, ".errorlist li")), "the errors")
    assert text_of(browser, "posts") == ""
    assert browser.find_element(By.NAME, "author").get_attribute("value") == "<script>"


def shoot(browser: WebDriver, request: pytest.FixtureRequest, name: str) -> None:
    if SHOTS in os.environ:
        which = request.node.callspec.params["site"]
        time.sleep(2.1)  # the glow of new notifications has ended
        browser.save_screenshot(str(Path(os.environ[SHOTS], f"social-{which}-{name}.png")))
