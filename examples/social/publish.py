"""The web application's part: people post, and whoever is interested is told."""

import random
import time

from social import Post, pubsub

WORDS = ["hello", "a walk by the sea", "what a match!", "новый рецепт", "日本の秋", "ça va ?"]


def main(count: int = 40) -> None:
    for number in range(1, count + 1):
        post = Post(number=number, author=random.randint(1, 12), text=random.choice(WORDS))
        pubsub.publish(
            "social.post.created", post, key=str(post.author), headers={"words": len(post.text.split())}
        )
        print(f"user {post.author} posts number {number}: {post.text}", flush=True)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
