"""Topics and patterns: their grammar, and which pattern matches which topic (contract 1 and 2).

Every backend means the same by ``*`` (exactly one word) and ``#`` (zero or more words) because the
meaning is decided here and nowhere else: drivers subscribe as narrowly as their broker can say and
leave the rest to `PatternSet`. Pure, no I/O; no operation is exponential in a pattern or a topic.
A topic given to a matching function is taken as it is: what a foreign client put on the broker is cut
at its dots, whatever the words hold.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from pubsub_facade.errors import TopicError

MAX_TOPIC: Final = 200
"""Characters a topic or a pattern may have."""

REMEMBERED: Final = 4096
"""Topics each cache holds before it starts again from nothing."""

_COVER_LIMIT: Final = 20_000
_SHOWN: Final = 60
_TOPIC: Final = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_PATTERN: Final = re.compile(r"(?:[A-Za-z0-9_-]+|[*#])(?:\.(?:[A-Za-z0-9_-]+|[*#]))*")
_BAD: Final = re.compile(r"[^A-Za-z0-9_.-]")
_WORD: Final = r"[A-Za-z0-9_-]++"

_good_topics: set[str] = set()

T = TypeVar("T", bound=Hashable)


def check_topic(topic: str) -> str:
    """Return ``topic`` if a message can be published on it (contract 1).

    Arguments:
        topic: dotted words of ``A-Z a-z 0-9 _ -``, at most 200 characters.

    Raises TopicError, which names the value, what is wrong with it and the fix.
    """
    try:
        if topic in _good_topics:
            return topic
    except TypeError:  # unhashable, so not a str: said below
        pass
    if not isinstance(topic, str) or len(topic) > MAX_TOPIC or not _TOPIC.fullmatch(topic):
        raise TopicError(_complaint("topic", topic, wildcards=False))
    if len(_good_topics) >= REMEMBERED:
        _good_topics.clear()
    _good_topics.add(topic)
    return topic


def check_pattern(pattern: str) -> str:
    """Return ``pattern`` if a subscription can have it (contract 2).

    Arguments:
        pattern: a topic whose words may be ``*`` (exactly one word) or ``#`` (zero or more words),
            at most 200 characters.

    Raises TopicError, which names the value, what is wrong with it and the fix.
    """
    if not isinstance(pattern, str) or len(pattern) > MAX_TOPIC or not _PATTERN.fullmatch(pattern):
        raise TopicError(_complaint("pattern", pattern, wildcards=True))
    return pattern


def _complaint(what: str, value: object, *, wildcards: bool) -> str:
    if not isinstance(value, str):
        return (
            f"{what} {_shown(value)} is of type {type(value).__name__}: give a str, as 'social.post.created'"
        )
    if not value:
        example = "'#' is every topic" if wildcards else "as 'social.post.created'"
        return f"{what} '' is empty: give words joined by dots, {example}"
    if len(value) > MAX_TOPIC:
        return f"{what} {_shown(value)} has {len(value)} characters: give at most {MAX_TOPIC}"
    at = 0
    for number, word in enumerate(value.split("."), start=1):
        if not word:
            return (
                f"{what} {_shown(value)} has an empty word at position {at} (word {number}): "
                "put exactly one dot between words and none at the ends"
            )
        bad = None if wildcards and word in ("*", "#") else _BAD.search(word)
        if bad is not None:
            return f"{what} {_shown(value)} has {bad[0]!r} at position {at + bad.start()}: " + _fix(
                bad[0], wildcards=wildcards
            )
        at += len(word) + 1
    raise AssertionError(f"{what} {value!r} is well-formed")  # pragma: no cover


def _fix(character: str, *, wildcards: bool) -> str:
    if character not in "*#":
        return "use only A-Z a-z 0-9 _ - in words, and dots between them"
    if wildcards:
        return "a wildcard is a word of its own, as 'social.*.created'"
    return "wildcards belong in patterns; a message has one topic"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN + 20 else f"{text[:_SHOWN]}…"


def matches(pattern: str, topic: str) -> bool:
    """Whether ``topic`` is one that ``pattern`` means; at most words x words steps.

    For many topics against the same patterns `PatternSet` is faster.
    """
    wanted = pattern.split(".")
    words = topic.split(".")
    at = 0
    retry_at = -1  # where in `wanted` to go on after giving the last '#' one word more
    retry_word = 0
    position = 0
    while position < len(words):
        here = wanted[at] if at < len(wanted) else None
        if here == "#":
            at += 1
            retry_at, retry_word = at, position
        elif here is not None and here in ("*", words[position]):
            at += 1
            position += 1
        elif retry_at >= 0:
            retry_word += 1
            at, position = retry_at, retry_word
        else:
            return False
    return all(word == "#" for word in wanted[at:])


class _Node(Generic[T]):
    """A place in the trie: what may come next, and the values of the patterns that end here."""

    __slots__ = ("children", "many", "values")

    def __init__(self, *, many: bool = False) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.many = many  # reached by '#': a word more changes nothing
        self.values: tuple[T, ...] = ()


def _grow(root: _Node[T], pattern: str) -> _Node[T]:
    """The node where ``pattern`` ends, made where it is not there yet."""
    node = root
    for word in pattern.split("."):
        child = node.children.get(word)
        if child is None:
            child = node.children[word] = _Node(many=word == "#")
        node = child
    return node


def _ends(root: _Node[T], topic: str) -> set[_Node[T]]:
    """Every node reached by the whole of ``topic``: at most one step for each word and node."""
    reached = {root}
    _skip_many(reached)
    for word in topic.split("."):
        following: set[_Node[T]] = set()
        for node in reached:
            if node.many:
                following.add(node)
            child = node.children.get(word)
            if child is not None:
                following.add(child)
            child = node.children.get("*")
            if child is not None:
                following.add(child)
        if not following:
            return following
        _skip_many(following)
        reached = following
    return reached


def _skip_many(nodes: set[_Node[T]]) -> None:
    """Add what is reached without a word: a ``#`` may stand for none."""
    for node in tuple(nodes):
        child = node.children.get("#")
        while child is not None and child not in nodes:
            nodes.add(child)
            child = child.children.get("#")


class PatternSet:
    """Patterns compiled once, asked for each message whether its topic is one of theirs.

    Arguments:
        patterns: one or more; each is checked (TopicError), twins count once.

    Two sets are equal if they hold the same patterns, in any order.
    """

    __slots__ = ("_known", "_patterns", "_root")

    def __init__(self, patterns: Iterable[str]) -> None:
        if isinstance(patterns, str):
            raise TopicError(f"patterns {_shown(patterns)} is one str: give a list, as [{_shown(patterns)}]")
        self._patterns: dict[str, None] = dict.fromkeys(check_pattern(pattern) for pattern in patterns)
        self._root: _Node[bool] = _Node()
        for pattern in self._patterns:
            _grow(self._root, pattern).values = (True,)
        self._known: dict[str, bool] = {}

    def matches(self, topic: str) -> bool:
        """Whether any of the patterns means ``topic``."""
        known = self._known.get(topic)
        if known is not None:
            return known
        answer = any(node.values for node in _ends(self._root, topic))
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[topic] = answer
        return answer

    def __contains__(self, pattern: object) -> bool:
        return pattern in self._patterns

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PatternSet):
            return NotImplemented
        return self._patterns.keys() == other._patterns.keys()

    def __hash__(self) -> int:
        return hash(frozenset(self._patterns))

    def __reduce__(self) -> tuple[type[PatternSet], tuple[list[str]]]:
        return type(self), (list(self._patterns),)

    def __repr__(self) -> str:
        return f"PatternSet({list(self._patterns)!r})"


class TopicRouter(Generic[T]):
    """Values found by topic: who gets a message published there.

    Values are hashable. `add` and `remove` are for one thread at a time; `match` may run beside them
    in others and sees the state before or after, never a stale one later.
    """

    __slots__ = ("_entries", "_known", "_root")

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()
        self._entries: set[tuple[str, T]] = set()
        self._known: dict[str, tuple[T, ...]] = {}

    def add(self, pattern: str, value: T) -> None:
        """Give ``value`` the topics of ``pattern``. Again is the same as once. Raises TopicError."""
        if (check_pattern(pattern), value) in self._entries:
            return
        self._entries.add((pattern, value))
        node = _grow(self._root, pattern)
        node.values = (*node.values, value)
        self._known = {}  # after the change: a match under way fills the dict that nobody reads any more

    def remove(self, pattern: str, value: T) -> None:
        """Take the topics of ``pattern`` from ``value``; KeyError if it did not have them.

        Topics that the value also has by another pattern stay its own.
        """
        self._entries.remove((pattern, value))
        path = [self._root]
        words = pattern.split(".")
        for word in words:
            path.append(path[-1].children[word])
        path[-1].values = tuple(other for other in path[-1].values if other != value)
        for parent, word, node in zip(reversed(path[:-1]), reversed(words), reversed(path), strict=False):
            if node.values or node.children:
                break
            del parent.children[word]
        self._known = {}

    def match(self, topic: str) -> tuple[T, ...]:
        """The values with a pattern that means ``topic``, each once, in no promised order."""
        known = self._known
        values = known.get(topic)
        if values is None:
            values = tuple({value: None for node in _ends(self._root, topic) for value in node.values})
            if len(known) >= REMEMBERED:
                known.clear()
            known[topic] = values
        return values

    def __iter__(self) -> Iterator[tuple[str, T]]:
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


def to_regex(pattern: str) -> str:
    """A regular expression for `re.fullmatch` that means exactly the valid topics ``pattern`` means.

    It needs Python 3.11 or later (atomic groups): thanks to them a failing match does not try every
    way to share the words among several ``#``. Raises TopicError.
    """
    before, *behind = _segments(_canonical(check_pattern(pattern)))
    head = r"\.".join(_piece(word) for word in before)
    if not behind:
        return head
    if not before and behind == [[]]:
        return rf"{_WORD}(?:\.{_WORD})*+"
    if not before:  # a leading '#' brings each of its words with the dot behind it
        first, *behind = behind
        head = r"\.".join(_piece(word) for word in first)
        head = rf"(?:{_WORD}\.)*{head}" if not behind else rf"(?>(?:{_WORD}\.)*?{head}(?![A-Za-z0-9_-]))"
        if not behind:
            return head
    *middle, last = behind
    for segment in middle:
        words = "".join(rf"\.{_piece(word)}" for word in segment)
        head += rf"(?>(?:\.{_WORD})*?{words}(?![A-Za-z0-9_-]))"
    return head + rf"(?:\.{_WORD})*" + "".join(rf"\.{_piece(word)}" for word in last)


def _piece(word: str) -> str:
    return _WORD if word == "*" else re.escape(word)


def _canonical(pattern: str) -> list[str]:
    """The words, with each run of wildcards as its ``*`` first and at most one ``#``: the same meaning."""
    out: list[str] = []
    many = False
    for word in pattern.split("."):
        if word == "#":
            many = True
            continue
        if word != "*" and many:
            out.append("#")
            many = False
        out.append(word)
    return [*out, "#"] if many else out


def _segments(words: Sequence[str]) -> list[list[str]]:
    """The words between the ``#``: one list more than there are ``#``."""
    out: list[list[str]] = [[]]
    for word in words:
        if word == "#":
            out.append([])
        else:
            out[-1].append(word)
    return out


class _Automaton:
    """A pattern as a set of positions in a bit mask: bit i is set where word i of it comes next."""

    __slots__ = ("_any", "_many", "_word", "accepting", "start")

    def __init__(self, words: Sequence[str]) -> None:
        self._word: dict[str, int] = {}
        self._any = self._many = 0
        for index, word in enumerate(words):
            if word == "#":
                self._many |= 1 << index
            elif word == "*":
                self._any |= 1 << index
            else:
                self._word[word] = self._word.get(word, 0) | 1 << index
        self.accepting = 1 << len(words)
        self.start = self._close(1)

    def step(self, states: int, word: str) -> int:
        moved = (states & (self._any | self._word.get(word, 0))) << 1
        return self._close(moved | (states & self._many))

    def _close(self, states: int) -> int:
        """Canonical words never have ``#`` behind ``#``, so one step over it is all."""
        return states | (states & self._many) << 1


def covers(wider: str, narrower: str) -> bool:
    """Whether every topic that ``narrower`` means is one that ``wider`` means.

    True is always right. False is right too, unless telling would take more than 20,000 steps: that
    needs a pattern with many ``*`` behind a ``#`` and a word. Raises TopicError.

    A topic's words matter only by which literal words of the two patterns they are: following both
    patterns over these and one word that is none of them visits every case there is.
    """
    outer_words = _canonical(check_pattern(wider))
    inner_words = _canonical(check_pattern(narrower))
    if outer_words == inner_words or outer_words == ["#"]:
        return True
    outer, inner = _Automaton(outer_words), _Automaton(inner_words)
    alphabet = {word for word in (*outer_words, *inner_words) if word not in ("*", "#")} | {""}
    todo = [(inner.start, outer.start)]
    seen: set[tuple[int, int]] = set()  # without the start: a topic has a word at least
    while todo:
        inside, outside = todo.pop()
        for word in alphabet:
            pair = inner.step(inside, word), outer.step(outside, word)
            if not pair[0] or pair in seen:
                continue
            if pair[0] & inner.accepting and not pair[1] & outer.accepting:
                return False
            if len(seen) >= _COVER_LIMIT:
                return False
            seen.add(pair)
            todo.append(pair)
    return True


class JmsDestination(NamedTuple):
    """Where to subscribe on ActiveMQ Classic for a pattern.

    ``exact``: it means the pattern's topics and no others, so that nothing is left for the facade to filter.
    """

    destination: str
    exact: bool


def jms_destination(pattern: str) -> JmsDestination:
    """The narrowest ActiveMQ Classic destination, without prefix, that covers ``pattern``.

    Classic has ``*`` for one word anywhere and ``>`` at the end for the rest
    (activemq.apache.org, Classic, Wildcards). ``name.>`` includes ``name`` itself, as ``name.#`` does:
    its page leaves that open, its sources (DestinationMapNode, PrefixDestinationFilter) do not. So
    everything from the first ``#`` on becomes ``>``. Where ``*`` comes before ``>`` the sources mention
    a shortening that is wider, and ``exact`` is False. Raises TopicError.

    ``>`` alone also gets the broker's own ``ActiveMQ.Advisory`` topics: subscribe below a namespace.
    """
    words = _canonical(check_pattern(pattern))
    if "#" not in words:
        return JmsDestination(pattern, True)
    first = words.index("#")
    destination = ".".join([*words[:first], ">"])
    return JmsDestination(destination, first == len(words) - 1 and "*" not in words)
