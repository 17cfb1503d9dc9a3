"""The analytics service: ``pubsub run analytics:pubsub``, as often as there is work for."""

import time

from social import Post, pubsub


@pubsub.subscriber("social.post.*", subscription="analytics")
def count(post: Post) -> None:
    time.sleep(0.02)  # counting takes a while
    print(f"counts number {post.number}: {len(post.text)} letters", flush=True)
