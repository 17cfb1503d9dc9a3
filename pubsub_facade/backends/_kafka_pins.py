"""Where a subscription is on each of its partitions: at its commit, else where it was declared or moved to.

What was not committed since begins at the pin that the declaration stored, and a topic that has none began
after it, so that all of it counts. A commit or a pin of a topic that was deleted and made again since says
nothing of the new one, which counts from its beginning: ids tell, and where there are none, times.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pubsub_facade.backends._kafka_cluster import EARLIEST, LATEST, Cluster
from pubsub_facade.backends._kafka_member import committed
from pubsub_facade.backends._kafka_partition import Progress
from pubsub_facade.backends._kafka_records import TP
from pubsub_facade.backends._kafka_registry import Ends, Entry
from pubsub_facade.backends._kafka_wire import same


async def places(
    cluster: Cluster, group: str, retry_topic: str, tps: Collection[TP], entry: Entry
) -> dict[TP, Progress]:
    """Where to go on, for each partition.

    Arguments:
        retry_topic: what waits there is dropped by a move, wherever it goes.
        entry: what the registry holds of the subscription.
    """
    ids = cluster.ids  # of the topics as they were shared out
    found = await committed(cluster, group, tps)
    found = {tp: known for tp, known in found.items() if same(known.topic_id, ids.get(tp[0]))}
    move = entry.move
    pins: dict[TP, Ends] = {}
    times: dict[TP, int] = {}
    for tp in tps:
        known = found.get(tp)
        if known is not None and (known.moves is None or known.moves >= move.number):
            continue
        origin = entry.origin(tp)
        if not same(origin.ids.get(tp[0]), ids.get(tp[0])):
            found[tp] = Progress(0)
            continue
        pins[tp] = origin
        if pins[tp] is move.ends and tp[0] != retry_topic and move.to != "end":
            times[tp] = EARLIEST if isinstance(move.to, str) else int(move.to * 1000)
    sought = await cluster.offsets(times) if times else {}
    pinned = await _offsets(cluster, {tp: ends for tp, ends in pins.items() if sought.get(tp, -1) < 0}, ids)
    for tp in pins:
        found[tp] = Progress(sought[tp] if sought.get(tp, -1) >= 0 else pinned[tp])
    places = {tp: found.get(tp) or Progress(0) for tp in tps}
    doubtful = [tp for tp, progress in places.items() if progress.window]
    ends = await cluster.offsets(dict.fromkeys(doubtful, LATEST)) if doubtful else {}
    for tp in doubtful:  # what came later was in nobody's hands
        places[tp].window = max(0, min(places[tp].window, ends.get(tp, 0) - places[tp].reached))
    for tp, progress in places.items():
        progress.moves = move.number
        progress.topic_id = ids.get(tp[0])
    return places


async def _offsets(cluster: Cluster, pins: Mapping[TP, Ends], ids: Mapping[str, str]) -> dict[TP, int]:
    """The offsets of pins; 0 where the topic was made anew since, so that all in it is younger than the pin."""
    offsets = {tp: ends.offsets.get(tp, 0) for tp, ends in pins.items()}
    unsure = [tp for tp, offset in offsets.items() if offset and not (tp[0] in pins[tp].ids and tp[0] in ids)]
    times = {tp: int(pins[tp].at * 1000) + 1 for tp in unsure}
    if not times:
        return offsets
    last = await cluster.offsets(dict.fromkeys(times, LATEST))
    younger = await cluster.offsets(times)
    doubtful = [tp for tp in times if 0 <= younger.get(tp, -1) < offsets[tp]]
    first = await cluster.offsets(dict.fromkeys(doubtful, EARLIEST)) if doubtful else {}
    for tp in times:
        if last.get(tp, 0) < offsets[tp] or (tp in first and first[tp] == younger[tp]):
            offsets[tp] = 0
    return offsets
