"""A plain script with threads, as task queues run code: prints the id of each message that was confirmed."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from pubsub_facade import PubSub

pubsub = PubSub()


def one(number: int) -> str:
    return pubsub.publish("social.post.created", {"text": str(number)}, key="1").id


with ThreadPoolExecutor(16) as pool:
    print("\n".join(pool.map(one, range(int(sys.argv[1])))))
