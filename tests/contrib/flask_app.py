"""The Flask application that the tests run as real processes."""

from __future__ import annotations

import json
import os

from flask import Flask, Response, current_app, g, jsonify, request

from pubsub_facade import PubSubError
from pubsub_facade.contrib.flask import FlaskPubSub

TIMEOUT = float(os.environ.get("POST_TIMEOUT", "20"))  # s that a view gives the broker
pubsub = FlaskPubSub()


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["PUBSUB"] = json.loads(os.environ.get("SOCIAL_PUBSUB", "null"))
    app.config["OUTPUT"] = os.environ.get("OUTPUT")
    pubsub.init_app(app)

    @app.post("/post")
    def post() -> tuple[Response, int]:
        try:
            message = pubsub.publish(
                "social.post.created", {"text": request.form["text"]}, key="1", timeout=3
            )
        except PubSubError as error:
            return jsonify(error=type(error).__name__), 503
        return jsonify(id=message.id), 200

    @app.post("/apost")
    async def apost() -> tuple[Response, int]:
        message = await pubsub.apublish(
            "social.post.created", {"text": request.form["text"]}, timeout=TIMEOUT
        )
        return jsonify(id=message.id), 200

    @app.teardown_appcontext
    def tell(error: BaseException | None) -> None:
        if "handled" in g and current_app.config["OUTPUT"]:
            with open(current_app.config["OUTPUT"], "a") as file:
                file.write(f"{g.handled}\n")

    return app


@pubsub.subscriber("social.post.*", subscription="analytics")
def count(post: dict[str, str]) -> None:
    assert "handled" not in g
    g.handled = post["text"]


@pubsub.subscriber("social.#", subscription="audit")
async def audit(post: dict[str, str]) -> None:
    assert "handled" not in g
    g.handled = f"audit {post['text']}"
