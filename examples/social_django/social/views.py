"""The pages: post something, see notifications come in, see who posts how much."""

import json
from collections.abc import Iterator

from django import forms
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET

from pubsub_facade import Closed
from pubsub_facade.contrib.django import client, publish_on_commit
from social.models import Count, Notification, Post

PULSE = 15  # s without a notification until the feed says that it is alive


class PostForm(forms.Form):
    """What one can post."""

    author = forms.RegexField(r"^[\w .-]+$", max_length=50)
    text = forms.CharField(max_length=280)


def home(request: HttpRequest) -> HttpResponse:
    """The form, the latest posts, and the live feed."""
    form = PostForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        author, text = form.cleaned_data["author"], form.cleaned_data["text"]
        with transaction.atomic():  # the post and its event are committed together, or not at all
            post = Post.objects.create(author=author, text=text)
            publish_on_commit(
                "social.post.created", {"post": post.pk, "author": author, "text": text}, key=author
            )
        return redirect("home")
    context = {
        "form": form,
        "posts": Post.objects.order_by("-id")[:10],
        "notifications": Notification.objects.order_by("-id")[:10],
    }
    return render(request, "social/home.html", context)


@require_GET
def feed(request: HttpRequest) -> StreamingHttpResponse:
    """Notifications as server-sent events, from now on: an ephemeral subscription for each open page."""
    response = StreamingHttpResponse(_events(), content_type="text/event-stream")
    response["Cache-Control"] = "no-cache"
    return response


def _events() -> Iterator[str]:
    with client().subscribe("social.notification.created") as stream:
        yield "event: live\ndata: {}\n\n"
        while True:
            try:
                delivery = stream.receive(PULSE)
            except TimeoutError:
                yield ": alive\n\n"
                continue
            except Closed:
                return
            delivery.ack()
            yield f"data: {json.dumps(delivery.payload)}\n\n"


@require_GET
def analytics(request: HttpRequest) -> HttpResponse:
    """A chart of posts by author."""
    return render(request, "social/analytics.html")


@require_GET
def counts(request: HttpRequest) -> JsonResponse:
    """What the chart shows."""
    rows = Count.objects.order_by("-posts", "author").values_list("author", "posts")
    return JsonResponse({"counts": list(rows[:12])})
