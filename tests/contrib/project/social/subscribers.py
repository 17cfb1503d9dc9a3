import os

from django.db.models import F
from project.social.models import Count, Post
from pydantic import BaseModel

from pubsub_facade import Delivery, Reject
from pubsub_facade.contrib.django import publish_on_commit, subscriber


class PostCreated(BaseModel):
    author: int
    text: str


@subscriber("social.post.*", subscription="analytics", concurrency=2, exactly_once=True)
def count(post: PostCreated, delivery: Delivery) -> None:
    if post.text == "reject":
        raise Reject("as asked")
    Count.objects.get_or_create(author=post.author)
    Count.objects.filter(author=post.author).update(posts=F("posts") + 1)
    if post.text == "fail":
        raise RuntimeError("after the effect")
    if post.text == "again":
        publish_on_commit("social.counted", {"author": post.author})


@subscriber("social.post.*", subscription="notifications", filter="lang = 'en'")
async def notify(post: PostCreated) -> None:
    await Post.objects.filter(author=post.author).acount()
    if "NOTIFICATIONS" in os.environ:
        with open(os.environ["NOTIFICATIONS"], "a") as file:  # noqa: ASYNC230
            file.write(post.text + "\n")
