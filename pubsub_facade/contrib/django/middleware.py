"""Requests whose publish fails: 503, as for any other service that is away for a moment."""

from __future__ import annotations

import logging
from collections.abc import Callable

from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.utils.deprecation import MiddlewareMixin

from pubsub_facade.errors import ConnectionFailed, SendFailed

log = logging.getLogger("pubsub_facade")


class UnavailableMiddleware(MiddlewareMixin):
    """Answers by 503 where a view did not handle that the broker did not take its message in time."""

    get_response: Callable[[HttpRequest], HttpResponseBase]

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        """None leaves other errors to Django."""
        if not isinstance(error, SendFailed | ConnectionFailed):
            return None
        log.error("%s %s could not publish: %s", request.method, request.path, error)
        return HttpResponse(
            "the message was not published; try again\n",
            status=503,
            headers={"Retry-After": "5"},
            content_type="text/plain",
        )
