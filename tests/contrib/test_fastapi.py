"""FastAPI and Starlette: the client's life with the application's, members in the same process, health."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette

from pubsub_facade import AsyncPubSub, ConnectionFailed, ConnectionLost, SendFailed
from pubsub_facade.contrib import fastapi as contrib
from pubsub_facade.contrib.fastapi import health_route, health_router, lifespan, pubsub_of, unavailable
from pubsub_facade.testing.hub import Published, TestHub


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of ``app``, within its lifespan, and no server."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        yield client


def app_on(hub: TestHub, *, subscribers: bool = False) -> tuple[FastAPI, AsyncPubSub]:
    pubsub = AsyncPubSub(hub.settings(publish_timeout=0.3))
    app = FastAPI(lifespan=lifespan(pubsub, subscribers=subscribers))
    app.include_router(health_router())
    for error in (SendFailed, ConnectionFailed):
        app.add_exception_handler(error, unavailable)

    @app.post("/posts")
    async def create(text: str, publisher: Annotated[AsyncPubSub, Depends(pubsub_of)]) -> dict[str, str]:
        return {"id": (await publisher.publish("social.post.created", {"text": text})).id}

    return app, pubsub


async def test_a_request_publishes_and_the_client_is_closed_with_the_application(pubsub_hub: TestHub) -> None:
    app, pubsub = app_on(pubsub_hub)
    async with serving(app) as client:
        answer = await client.post("/posts", params={"text": "hello"})
        assert answer.status_code == 200
        assert Published(pubsub_hub).one(text="hello").id == answer.json()["id"]
        assert (await client.get("/health")).json() == {"healthy": True, "state": "connected"}
    assert pubsub.state == "closed"


async def test_the_example_of_the_module_runs_as_it_is_written(pubsub_hub: TestHub) -> None:
    text = (contrib.__doc__ or "").partition("\n\n")[2].partition("\n\nWithout")[0]
    names: dict[str, Any] = {
        **vars(contrib),
        "Annotated": Annotated,
        "Depends": Depends,
        "FastAPI": FastAPI,
        "Post": dict[str, str],
        "settings": pubsub_hub.settings(),
    }
    text = textwrap.dedent(text).replace("AsyncPubSub()", "AsyncPubSub(settings)")
    exec(compile(text, "the example", "exec", dont_inherit=True), names)
    async with serving(names["app"]) as client:
        assert (await client.post("/posts", json={"text": "hello"})).status_code == 200
        assert (await client.get("/health")).status_code == 200
    assert Published(pubsub_hub).one("social.post.created", text="hello")


async def test_members_run_in_the_same_process(pubsub_hub: TestHub) -> None:
    app, pubsub = app_on(pubsub_hub, subscribers=True)
    seen: list[str] = []

    @pubsub.subscriber("social.#", subscription="analytics")
    async def count(post: dict[str, str]) -> None:
        seen.append(post["text"])

    async with serving(app) as client:
        while (answer := await client.get("/health")).status_code != 200:
            assert answer.json()["healthy"] is False
            await asyncio.sleep(0)
        assert answer.json()["members"] == {"analytics": True}
        await client.post("/posts", params={"text": "hello"})
        await pubsub_hub.adrain()
    assert seen == ["hello"]


async def test_a_broker_that_is_absent_gives_503_in_time(pubsub_hub: TestHub) -> None:
    app, _ = app_on(pubsub_hub)
    for _ in range(100):
        pubsub_hub.fail("open", ConnectionLost("it is away"))
    async with serving(app) as client:
        answer = await client.post("/posts", params={"text": "hello"})
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "5"
        health = await client.get("/health")
        assert health.status_code == 503
        assert "it is away" in health.json()["error"]


async def test_starlette_without_fastapi_and_an_inner_lifespan(pubsub_hub: TestHub) -> None:
    began: list[str] = []

    @asynccontextmanager
    async def inner(app: Starlette) -> AsyncIterator[dict[str, int]]:
        began.append("inner")
        yield {"x": 1}

    app = Starlette(
        routes=[health_route("/live")],
        lifespan=lifespan(lambda: AsyncPubSub(pubsub_hub.settings()), inner=inner),
    )
    for _ in range(2):  # it starts twice: a client each time
        async with serving(app) as client:
            assert (await client.get("/live")).status_code == 200
    assert began == ["inner", "inner"]


async def test_members_that_cannot_go_on_are_told_by_health(
    pubsub_hub: TestHub, caplog: pytest.LogCaptureFixture
) -> None:
    from pubsub_facade import TopologyConflict

    app, pubsub = app_on(pubsub_hub, subscribers=True)
    pubsub.subscriber("a", subscription="s")(_nothing)
    pubsub_hub.fail("declare", TopologyConflict("other arguments"))
    async with serving(app) as client:
        while "other arguments" not in caplog.text:
            assert (await client.get("/health")).status_code == 503
            await asyncio.sleep(0)  # the transport has no network to wait for
        assert (await client.get("/health")).status_code == 503


async def _nothing(payload: object) -> None: ...
