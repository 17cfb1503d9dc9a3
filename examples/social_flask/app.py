"""The pages and the two services. ``flask pubsub run`` runs the services, ``flask relay`` the outbox's relay."""

import asyncio
import json
import re
import signal
from collections.abc import Iterator

import sqlalchemy as sa
from flask import Flask, Response, redirect, render_template, request, url_for
from pydantic import BaseModel
from sqlalchemy import orm
from tables import Base, Count, Notification, Post, Session, engine, inbox, outbox
from werkzeug.wrappers import Response as BaseResponse

from pubsub_facade import AsyncPubSub, Closed, PubSub
from pubsub_facade.contrib.flask import FlaskPubSub
from pubsub_facade.contrib.outbox import Relay

PULSE = 15  # s without a notification until the feed says that it is alive

app = Flask(__name__)
pubsub = FlaskPubSub(app)  # which broker that is, pubsub.toml or the environment says


# -- the services: each gets every post, independently of the other ------------------------------------


class PostCreated(BaseModel):
    """The event that the home page publishes."""

    post: int
    author: str
    text: str


@pubsub.subscriber("social.post.created", subscription="notifications")
@inbox.exactly_once(Session)
def notify(post: PostCreated, session: orm.Session) -> None:
    """Tell the followers; open pages get it by the feed."""
    text = f"{post.author} posted: {post.text}"
    session.add(Notification(text=text))
    outbox.publish(session, "social.notification.created", {"text": text})


@pubsub.subscriber("social.post.*", subscription="analytics", concurrency=2)
@inbox.exactly_once(Session)
def count(post: PostCreated, session: orm.Session) -> None:
    """Count posts by author: exactly once, however often the message comes."""
    counted = session.execute(
        sa.update(Count).where(Count.author == post.author).values(posts=Count.posts + 1)
    )
    if not counted.rowcount:
        session.add(Count(author=post.author, posts=1))


# -- the pages -----------------------------------------------------------------------------------------


@app.route("/", methods=["GET", "POST"])
def home() -> str | BaseResponse:
    """The form, the latest posts, and the live feed."""
    error = ""
    if request.method == "POST":
        author, text = request.form.get("author", "").strip(), request.form.get("text", "").strip()
        if re.fullmatch(r"[\w .-]{1,50}", author) and 1 <= len(text) <= 280:
            with Session.begin() as session:  # the post and its event are committed together, or not at all
                post = Post(author=author, text=text)
                session.add(post)
                session.flush()
                event = {"post": post.id, "author": author, "text": text}
                outbox.publish(session, "social.post.created", event, key=author)
            return redirect(url_for("home"))
        error = "A name of letters and digits, and a text of at most 280 characters, please."
    with Session() as session:
        posts = session.scalars(sa.select(Post).order_by(Post.id.desc()).limit(10)).all()
        notifications = session.scalars(
            sa.select(Notification).order_by(Notification.id.desc()).limit(10)
        ).all()
        return render_template("home.html", error=error, posts=posts, notifications=notifications)


@app.get("/feed/")
def feed() -> Response:
    """Notifications as server-sent events, from now on: an ephemeral subscription for each open page."""
    return Response(
        _events(pubsub.client), mimetype="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


def _events(client: PubSub) -> Iterator[str]:
    with client.subscribe("social.notification.created") as stream:
        yield "event: live\ndata: {}\n\n"
        while True:
            try:
                delivery = stream.receive(PULSE)
            except TimeoutError:
                yield ": alive\n\n"
                continue
            except Closed:
                return
            delivery.ack()
            yield f"data: {json.dumps(delivery.payload)}\n\n"


@app.get("/analytics/")
def analytics() -> str:
    """A chart of posts by author."""
    return render_template("analytics.html")


@app.get("/analytics/counts/")
def counts() -> dict[str, list[list[str | int]]]:
    """What the chart shows."""
    with Session() as session:
        rows = session.execute(
            sa.select(Count.author, Count.posts).order_by(Count.posts.desc(), Count.author).limit(12)
        )
        return {"counts": [[author, posts] for author, posts in rows]}


# -- commands ------------------------------------------------------------------------------------------


@app.cli.command("create-tables")
def create_tables() -> None:
    """Make the tables that are missing."""
    Base.metadata.create_all(engine)


@app.cli.command("relay")
def relay() -> None:
    """Publish what was committed to the outbox, until SIGTERM or Ctrl-C."""
    settings = pubsub.client.settings

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with AsyncPubSub(settings) as client:
            await Relay(client, outbox.store(engine)).run(stop)

    asyncio.run(run())
