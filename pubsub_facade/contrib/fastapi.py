"""Publish from FastAPI or Starlette, and handle in the same process or another.

    pubsub = AsyncPubSub()
    app = FastAPI(lifespan=lifespan(pubsub, subscribers=True))   # members run in this process too
    app.include_router(health_router())                          # at /health

    @app.post("/posts")
    async def create(post: Post, publisher: Annotated[AsyncPubSub, Depends(pubsub_of)]) -> None:
        await publisher.publish("social.post.created", post)

Without ``subscribers`` the handlers run by ``pubsub run myapp:pubsub``. Needs Starlette; FastAPI where it is there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from pubsub_facade.client import GRACE, AsyncPubSub
from pubsub_facade.contrib._service import health_of
from pubsub_facade.errors import PubSubError

if TYPE_CHECKING:
    from fastapi import APIRouter

log = logging.getLogger("pubsub_facade")

STATE: Final = "pubsub"
SERVING: Final = "pubsub_serving"

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]


def lifespan(
    pubsub: AsyncPubSub | Callable[[], AsyncPubSub],
    *,
    subscribers: bool = False,
    grace: float = GRACE,
    inner: Lifespan | None = None,
) -> Lifespan:
    """The ``lifespan`` of an application: the client is there as ``app.state.pubsub``, and closed at the end.

    Arguments:
        pubsub: the client, or what makes one at each start, where an application starts more than once (tests).
        subscribers: run the client's handlers in this process. A broker that is absent is waited for: the
            application starts all the same, and its health says so.
        grace: seconds that handlers in hand get at the end.
        inner: the application's own lifespan, within this one.
    """

    @asynccontextmanager
    async def run(app: Starlette) -> AsyncIterator[Any]:
        client = pubsub if isinstance(pubsub, AsyncPubSub) else pubsub()
        app.state.pubsub = client
        setattr(app.state, SERVING, subscribers)
        stop, members = None, None
        if subscribers:
            stop, members = _start(client, grace)
        try:
            if inner is None:
                yield {STATE: client}
            else:
                async with inner(app) as more:
                    yield {STATE: client, **(more or {})}
        finally:
            if stop is not None and members is not None:
                stop.set()
                await asyncio.wait([members])
                _tell(members)
            await client.close(grace)

    return run


def _start(client: AsyncPubSub, grace: float) -> tuple[asyncio.Event, asyncio.Task[None]]:
    stop = asyncio.Event()
    members = asyncio.create_task(client.serve(stop, grace), name="pubsub-members")
    members.add_done_callback(lambda task: None if stop.is_set() else _tell(task))
    return stop, members


def _tell(members: asyncio.Task[None]) -> None:
    """What ended the members too early: the health of the application says so from then on, and the log why."""
    if not members.cancelled() and (error := members.exception()) is not None:
        log.error("the members of this process have ended: %s", error, exc_info=error)


def pubsub_of(connection: HTTPConnection) -> AsyncPubSub:
    """The application's client, as a FastAPI dependency: ``Depends(pubsub_of)``; or called with a request."""
    found: AsyncPubSub = connection.app.state.pubsub
    return found


async def health(request: Request) -> JSONResponse:
    """200 when the broker answers and the members that should receive here do, else 503; and the facts as JSON."""
    client = pubsub_of(request)
    facts: dict[str, Any] = {}
    try:
        await client.ping()
        healthy = True
        if getattr(request.app.state, SERVING, False):
            healthy, facts = health_of(client)
    except PubSubError as error:
        healthy, facts = False, {"error": str(error)}
    return JSONResponse(
        {"healthy": healthy, "state": client.state, **facts}, status_code=200 if healthy else 503
    )


def health_route(path: str = "/health") -> Route:
    """`health` as a Starlette route."""
    return Route(path, health)


def health_router(path: str = "/health") -> APIRouter:
    """`health` as a FastAPI router: ``app.include_router(health_router())``."""
    from fastapi import APIRouter

    router = APIRouter()
    router.add_api_route(path, health, methods=["GET"], include_in_schema=False, response_model=None)
    return router


async def unavailable(request: Request, error: Exception) -> JSONResponse:
    """503 for what could not be published: ``app.add_exception_handler(SendFailed, unavailable)``, and the same
    for `ConnectionFailed`."""
    return JSONResponse({"error": "the message was not published; try again"}, 503, {"Retry-After": "5"})
