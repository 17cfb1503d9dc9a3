"""The notifications service: ``pubsub run notifications:pubsub``."""

from social import Post, pubsub


@pubsub.subscriber("social.post.created", subscription="notifications")
def notify(post: Post) -> None:
    print(f"tells the followers of user {post.author} of number {post.number}", flush=True)
