import asyncio
import os

from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from project.social.models import Post

from pubsub_facade import PubSubError
from pubsub_facade.contrib.django import apublish, publish, publish_on_commit

TIMEOUT = float(os.environ.get("POST_TIMEOUT", "20"))  # s that a view gives the broker


@csrf_exempt
def post(request: HttpRequest) -> HttpResponse:
    text = request.POST["text"]
    try:
        message = publish(
            "social.post.created", {"author": 1, "text": text}, key="1", headers={"lang": "en"}, timeout=3
        )
    except PubSubError as error:
        return JsonResponse({"error": type(error).__name__}, status=503)
    return JsonResponse({"id": message.id})


@csrf_exempt
async def apost(request: HttpRequest) -> HttpResponse:
    text = request.POST["text"]
    try:
        message = await apublish("social.post.created", {"author": 1, "text": text}, key="1", timeout=TIMEOUT)
    except PubSubError as error:
        return JsonResponse({"error": type(error).__name__}, status=503)
    await asyncio.sleep(0)
    return JsonResponse({"id": message.id})


@csrf_exempt
def outbox(request: HttpRequest) -> HttpResponse:
    with transaction.atomic():
        created = Post.objects.create(author=int(request.POST.get("author", 1)), text=request.POST["text"])
        message = publish_on_commit(
            "social.post.created", {"author": created.author, "text": created.text}, key=str(created.author)
        )
        if request.POST["text"] == "roll back":
            transaction.set_rollback(True)
    return JsonResponse({"id": message.id})
