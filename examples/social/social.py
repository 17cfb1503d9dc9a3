"""What the parts of the social network share: the event, and the client."""

from pydantic import BaseModel

from pubsub_facade import PubSub


class Post(BaseModel):
    """Somebody posted something."""

    number: int
    author: int
    text: str


pubsub = PubSub()  # which broker that is, pubsub.toml or the environment says
