"""What the social network remembers: posts, and what its two services made of them."""

from django.db import models


class Post(models.Model):
    """Somebody posted something."""

    author = models.CharField(max_length=50)
    text = models.CharField(max_length=280)
    created = models.DateTimeField(auto_now_add=True)


class Notification(models.Model):
    """What the notifications service told the author's followers."""

    text = models.CharField(max_length=400)
    created = models.DateTimeField(auto_now_add=True)


class Count(models.Model):
    """What the analytics service counted."""

    author = models.CharField(max_length=50, unique=True)
    posts = models.IntegerField(default=0)
