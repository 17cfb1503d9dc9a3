"""The FastAPI application that the tests run as real processes."""

from __future__ import annotations

import os
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import Depends, FastAPI, Request

from pubsub_facade import AsyncPubSub, ConnectionFailed, SendFailed
from pubsub_facade.contrib.fastapi import health_router, lifespan, pubsub_of, unavailable

TIMEOUT = float(os.environ.get("POST_TIMEOUT", "20"))  # s that a view gives the broker
app = FastAPI(lifespan=lifespan(AsyncPubSub))
app.include_router(health_router())
for error in (SendFailed, ConnectionFailed):
    app.add_exception_handler(error, unavailable)


@app.post("/post")
async def post(request: Request, pubsub: Annotated[AsyncPubSub, Depends(pubsub_of)]) -> dict[str, str]:
    (text,) = parse_qs((await request.body()).decode())["text"]
    message = await pubsub.publish("social.post.created", {"text": text}, key="1", timeout=TIMEOUT)
    return {"id": message.id}
