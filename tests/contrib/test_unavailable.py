"""A request that could not publish is answered by 503 and when to come again; all other errors stay 500."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask import Flask

from pubsub_facade import AuthenticationFailed, ConnectionLost
from pubsub_facade.contrib.flask import FlaskPubSub
from pubsub_facade.testing.hub import TestHub

from .services import Site

TEXT = "the message was not published; try again\n"

# path, error of the broker's, status, Retry-After
CASES = [
    ("/post", "", 200, None),
    ("/post", "away", 503, "5"),
    ("/post", "refused", 503, "5"),
    ("/apost", "away", 503, "5"),
    ("/apost", "refused", 503, "5"),
    ("/wrong", "", 500, None),
    ("/broken", "", 500, None),
]

URLS = """
from django.http import HttpResponse
from django.urls import path
from pubsub_facade.contrib.django import apublish, publish

def post(request):
    return HttpResponse(publish("a", 1).id)

async def apost(request):
    return HttpResponse((await apublish("a", 1)).id)

def wrong(request):
    return HttpResponse(publish("a..b", 1).id)

def broken(request):
    raise ValueError("of the view's own")

urlpatterns = [path(view.__name__, view) for view in (post, apost, wrong, broken)]
"""
ASK = """
import json, sys
import django
django.setup()
from django.test import Client
from pubsub_facade import AuthenticationFailed, ConnectionLost
from pubsub_facade.contrib.django.clients import close_all
from pubsub_facade.testing.hub import TestHub

for path, trouble in json.loads(sys.argv[1]):
    hub = TestHub("asked")
    for _ in range(100 if trouble == "away" else 0):
        hub.fail("open", ConnectionLost("it is away"))
    if trouble == "refused":
        hub.fail("open", AuthenticationFailed("wrong password"))
    answer = Client(raise_request_exception=False).get(path)
    print(json.dumps([answer.status_code, answer.headers.get("Retry-After"), answer.content.decode()]))
    close_all()
    hub.forget()
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, 'url = "memory://asked"\npublish_timeout = 0.3\n')
    yield site
    site.close()


def test_django_s_middleware_answers_what_could_not_be_published(site: Site) -> None:
    (site.folder / "urls.py").write_text(URLS)
    (site.folder / "ask.py").write_text(ASK)
    code, said = site.run("ask", json.dumps([case[:2] for case in CASES]))
    assert code == 0, said
    answers = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
    assert [(*case[:2], *answer[:2]) for case, answer in zip(CASES, answers, strict=True)] == CASES
    assert all((answer[2] == TEXT) == (answer[0] == 503) for answer in answers)
    assert "GET /post could not publish" in said
    assert "it is away" in said


@pytest.mark.parametrize(("path", "trouble", "status", "again"), CASES)
def test_flask_s_extension_answers_what_could_not_be_published(
    path: str,
    trouble: str,
    status: int,
    again: str | None,
    pubsub_hub: TestHub,
    caplog: pytest.LogCaptureFixture,
) -> None:
    extension = FlaskPubSub()
    app = Flask("asked")
    app.config["PUBSUB"] = {"url": pubsub_hub.url, "publish_timeout": 0.3}
    extension.init_app(app)
    for name, view in _views(extension).items():
        app.add_url_rule(name, name, view)
    for _ in range(100 if trouble == "away" else 0):
        pubsub_hub.fail("open", ConnectionLost("it is away"))
    if trouble == "refused":
        pubsub_hub.fail("open", AuthenticationFailed("wrong password"))
    answer = app.test_client().get(path)
    app.extensions["pubsub"].close()
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, again)
    assert (answer.text == TEXT) == (status == 503)
    assert ("a request could not publish" in caplog.text) == (status == 503)


def test_an_application_that_handles_the_error_itself_is_not_overruled(pubsub_hub: TestHub) -> None:
    extension = FlaskPubSub()
    app = Flask("asked")
    app.config["PUBSUB"] = {"url": pubsub_hub.url}
    extension.init_app(app)
    app.register_error_handler(AuthenticationFailed, lambda error: (str(error), 418))
    app.add_url_rule("/post", "/post", _views(extension)["/post"])
    pubsub_hub.fail("open", AuthenticationFailed("wrong password"))
    answer = app.test_client().get("/post")
    app.extensions["pubsub"].close()
    assert (answer.status_code, answer.text) == (418, "wrong password")


def _views(extension: FlaskPubSub) -> dict[str, Callable[[], object]]:
    async def apost() -> str:
        return (await extension.apublish("a", 1)).id

    def broken() -> str:
        raise ValueError("of the view's own")

    return {
        "/post": lambda: extension.publish("a", 1).id,
        "/apost": apost,
        "/wrong": lambda: extension.publish("a..b", 1).id,
        "/broken": broken,
    }
