"""The two services: ``manage.py runsubscribers`` runs them. Each gets every post, independently of the other."""

from django.db.models import F
from pydantic import BaseModel

from pubsub_facade.contrib.django import publish_on_commit, subscriber
from social.models import Count, Notification


class PostCreated(BaseModel):
    """The event that the home page publishes."""

    post: int
    author: str
    text: str


@subscriber("social.post.created", subscription="notifications", exactly_once=True)
def notify(post: PostCreated) -> None:
    """Tell the followers; open pages get it by the feed."""
    notification = Notification.objects.create(text=f"{post.author} posted: {post.text}")
    publish_on_commit("social.notification.created", {"text": notification.text})


@subscriber("social.post.*", subscription="analytics", concurrency=2, exactly_once=True)
def count(post: PostCreated) -> None:
    """Count posts by author: exactly once, however often the message comes."""
    Count.objects.get_or_create(author=post.author)
    Count.objects.filter(author=post.author).update(posts=F("posts") + 1)
